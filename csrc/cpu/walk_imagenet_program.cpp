#include "cpu/walk_imagenet_program.h"

#include <cstring>
#include <utility>

namespace blockdrop::walk_imagenet {
namespace {

// Layers of a 224x224 image have 4 panels (segment 1, by rows more) or 16 (segment 4) to divide.
constexpr int kMaxThreadsPerGroup = 16;
// A part of fewer rows reads all of its weights for little.
constexpr int kMinRows = 14;
constexpr int kAlignment = 16;  // floats
// In a small network's last layers, of 16 pixels an image, say, it takes longer to read the weights
// than to multiply by them: several images share them, while all of their activations stay in L2.
constexpr Index kGroupFloats = 200 * 1024;
constexpr int kMaxGroup = 4;

int divide_up(int count, int by) { return (count + by - 1) / by; }

int halved(int size) { return divide_up(size, 2); }

// Part `part` of `parts` of what is 0 ... count - 1.
std::pair<int, int> cut(int count, int part, int parts) {
  const auto at = [&](int i) { return static_cast<int>(int64_t{count} * i / parts); };
  return {at(part), at(part + 1)};
}

int padded_height(int height) { return height + 2 * kStemBorder; }
int padded_row(int width) { return (width + 2 * kStemBorder) * kImageChannels; }

// Hands out memory piece by piece; from nullptr it counts what is needed.
class Memory {
 public:
  explicit Memory(float* data) : data_(data) {}
  float* take(Index floats) {
    const Index at = std::exchange(taken_, taken_ + walk::round_up(floats, kAlignment));
    return data_ ? data_ + at : nullptr;
  }
  Index taken() const { return taken_; }

 private:
  float* const data_;
  Index taken_ = 0;
};

}  // namespace

Walk::Walk(const Kernels& kernels, const Network& network, const walk::Images& images, int pool,
           bool alike, int num_spare)
    : kernels(kernels), network(network), images(images), pool(pool) {
  image_ = {images.height / pool, images.width / pool};
  Size size{halved(halved(image_.height)), halved(halved(image_.width))};
  for (int segment = 0; segment < network.num_segments; ++segment) {
    sizes_.push_back(size);
    size = {halved(size.height), halved(size.width)};
  }
  x_before_ = {0};
  for (const Block& block : network.blocks) {
    const int x = x_before_.back();
    x_before_.push_back(block.projection.weights ? 1 - x : x);
  }
  if (alike) {
    const int threads = walk::useful_threads(images.batch, kMaxThreadsPerGroup);
    const auto fitting = static_cast<int>(std::min<Index>(kGroupFloats / x_size(), kMaxGroup));
    group = std::clamp(divide_up(images.batch, threads), 1, std::max(fitting, 1));
  }
  num_threads = walk::useful_threads(divide_up(images.batch, group), kMaxThreadsPerGroup);
  buffers_.resize(num_threads);
  allocate(num_spare);
}

// Floats of one image's largest input of a block or the classifier.
Index Walk::x_size() const {
  Index size = 0;
  for (int block = 0; block <= network.num_blocks; ++block) {
    size = std::max(size, panels_before(block) * kPanel * size_before(block).pixels());
  }
  return size;
}

// All of it at once, so that calls of a kind take the same memory each time.
void Walk::allocate(int num_spare) {
  const Index x = x_size() * group;
  Index hidden = 0;
  for (int block = 0; block < network.num_blocks; ++block) {
    const Index panel = size_before(block).pixels() * kPanel * group;
    hidden = std::max(hidden, network.blocks[block].convs[0].out_panels * panel);
  }
  const Index of_group = Index{kPanel} * group;
  const Index padded = Index{padded_height(image_.height)} * padded_row(image_.width) * group;
  const auto lay_out = [&](Memory& memory) {
    for (Buffers& buffers : buffers_) {
      buffers.padded_images = memory.take(padded);
      for (float*& one : buffers.x) one = memory.take(x);
      for (float*& one : buffers.hidden) one = memory.take(hidden);
      buffers.means = memory.take(network.classifier.in_panels * of_group);
      buffers.logits = memory.take(network.classifier.out_panels * of_group);
      buffers.kernel_scratch = memory.take(scratch_size());
      for (float*& one : buffers.spare) one = memory.take(x);
    }
  };
  for (Buffers& buffers : buffers_) buffers.spare.resize(num_spare);
  Memory counted(nullptr);
  lay_out(counted);
  memory_ = std::make_unique<walk::CallMemory>(counted.taken());
  Memory memory(memory_->data());
  lay_out(memory);
}

Index Walk::scratch_size() const {
  Index size =
      std::max(kDirectScratch, stem_scratch(halved(image_.width), network.stem.out_panels));
  for (const Block& block : network.blocks) {
    for (const PackedConv& conv : block.convs) {
      if (conv.winograd) size = std::max(size, winograd_scratch(conv.in_panels));
    }
  }
  return size;
}

int Walk::panels_before(int block) const {
  return block == network.num_blocks ? network.classifier.in_panels
                                     : network.blocks[block].convs[0].in_panels;
}

void Walker::begin() {
  const PackedConv& stem = walk.network.stem;
  const Size in = walk.image_size(), out = walk.size_before(0);
  run_parts(num_images * padded_height(in.height),
            [&](int begin, int end) { pad_rows(begin, end); });
  const Stem layer{buffers.padded_images,
                   stem.weights,
                   buffers.x[0],
                   stem.out_panels,
                   num_images,
                   in.height,
                   in.width,
                   halved(in.height),
                   halved(in.width),
                   out.height,
                   out.width};
  run_parts(num_images * out.height, [&](int begin, int end) {
    walk.kernels.stem(layer, Part{begin, end, 0, stem.out_panels, kernel_scratch_});
  });
}

template <class Run>
void Walker::run_parts(int rows, const Run& run) {
  // In pairs of rows at least: a part of the stem computes a row again that the part before it has
  // computed.
  const int parts = std::min(2 * walk.num_threads, halved(rows));
  steps_.run(
      parts,
      [&](int part) {
        const auto [begin, end] = cut(rows, part, parts);
        run(begin, end);
      },
      [&] { run(0, rows); });
}

template <class Run>
void Walker::run_once(const Run& run) {
  steps_.run(1, [&](int) { run(); }, run);
}

void Walker::add_block(int block, bool keep, std::vector<Layer>& layers) const {
  const Block& of = walk.network.blocks[block];
  Size size = walk.size_before(block);
  float* const x = buffers.x[walk.x_before(block)];
  float* const y = buffers.x[walk.x_before(block + 1)];
  const int last = static_cast<int>(of.convs.size()) - 1;
  const float* input = x;
  for (int i = 0; i < last && keep; ++i) {
    layers.push_back(make_layer(of.convs[i], size, input, nullptr, buffers.hidden[i], true));
    size = {layers.back().conv.height, layers.back().conv.width};
    input = buffers.hidden[i];
  }
  if (of.projection.weights) {
    layers.push_back(make_layer(of.projection, walk.size_before(block), x, nullptr, y, false));
  }
  if (keep) layers.push_back(make_layer(of.convs[last], size, input, y, y, true));
}

void Walker::add_classifier(std::vector<Layer>& layers) const {
  const Size pixel{1, 1};
  layers.push_back(
      make_layer(walk.network.classifier, pixel, buffers.means, nullptr, buffers.logits, false));
}

Layer Walker::make_layer(const PackedConv& conv, Size size, const float* input,
                         const float* residual, float* output, bool relu) const {
  const Size out = conv.stride == 2 ? Size{halved(size.height), halved(size.width)} : size;
  const Kernels& kernels = walk.kernels;
  Layer layer{kernels.direct,
              {input, conv.weights, residual, output, conv.in_panels, conv.out_panels, num_images,
               size.height, size.width, out.height, out.width, conv.kernel, conv.stride, relu},
              conv.winograd,
              num_images * static_cast<int>(out.pixels())};
  Index values = Index{conv.kernel} * conv.kernel;
  if (conv.winograd) {
    layer.kernel = kernels.winograd;
    layer.rows = num_images * num_tiles(out.height, out.width);
    values = kTileProducts;
  } else if (conv.kernel == 1 && conv.stride == 1) {
    layer.kernel = kernels.pointwise;
  }
  // Threads that share the rows read all of the weights each, those that share the panels all of
  // the input (and transform it, in Winograd's form): what is less is read by all.
  const Index weights = values * conv.in_panels * kPanel * conv.out_panels * kPanel;
  const Index inputs = Index{conv.in_panels} * kPanel * num_images * size.pixels();
  const int threads = walk.num_threads;
  const int most_row_parts = (layer.rows + kMinRows - 1) / kMinRows;
  if (weights < inputs) {
    layer.row_parts = std::min(2 * threads, most_row_parts);
    layer.panel_parts = std::min(divide_up(threads, layer.row_parts), conv.out_panels);
  } else {
    layer.panel_parts = std::min(threads, conv.out_panels);
    layer.row_parts = std::min(divide_up(threads, layer.panel_parts), most_row_parts);
  }
  return layer;
}

Part Layer::part(int index) const {
  const auto [row_begin, row_end] = cut(rows, index / panel_parts, row_parts);
  const auto [begin, end] = cut(conv.out_panels, index % panel_parts, panel_parts);
  return {row_begin, row_end, begin, end, nullptr};
}

Weights Layer::first_weights(int panel_begin, int panel_end) const {
  const float* weights = conv.weights + conv.out_panels * kPanel;
  const Index of_inputs = Index{conv.in_panels} * kPanel * kPanel;
  if (winograd) {  // for two products: there is time until the others are read
    return {weights + panel_begin * kTileProducts * of_inputs, 2 * of_inputs};
  }
  constexpr int kPanels = kBlockOut / kPanel;
  const int block_begin = panel_begin / kPanels * kPanels;
  const Index of_block = Index{std::min(conv.in_panels * kPanel, kBlockIn)} * kPanel;
  return {weights + block_begin * conv.kernel * conv.kernel * of_inputs +
              (panel_begin - block_begin) * of_block,
          (std::min(panel_end, block_begin + kPanels) - panel_begin) * of_block};
}

void Walker::run(const Layer& layer, const Layer* next) {
  const auto run_whole = [&] {
    Part whole{0, layer.rows, 0, layer.conv.out_panels, kernel_scratch_};
    if (next) whole.next = next->first_weights(0, next->conv.out_panels);
    layer.kernel(layer.conv, whole);
  };
  const auto run_part = [&](int index) {
    Part part = layer.part(index);
    part.scratch = kernel_scratch_;
    if (next) {
      // Each thread goes on with about the same share of the next layer.
      const Part after = next->part(index * next->parts() / layer.parts());
      part.next = next->first_weights(after.panel_begin, after.panel_end);
    }
    layer.kernel(layer.conv, part);
  };
  steps_.run(layer.parts(), run_part, run_whole);
}

void Walker::copy(const float* from, float* to, int block) {
  const Index size =
      walk.panels_before(block) * kPanel * num_images * walk.size_before(block).pixels();
  run_once([&] { std::memcpy(to, from, size * sizeof(float)); });
}

void Walker::average() {
  const int last = walk.network.num_blocks;
  const Mean mean{buffers.x[walk.x_before(last)], buffers.means, walk.panels_before(last),
                  num_images, static_cast<int>(walk.size_before(last).pixels())};
  run_once([&] { walk.kernels.mean(mean, Part{0, 0, 0, mean.panels, kernel_scratch_}); });
}

void Walker::store_logits(const std::vector<float*>& rows) {
  const int num_classes = walk.network.num_classes;
  run_once([&] {
    for (int i = 0; i < num_images; ++i) {
      for (int begin = 0; begin < num_classes; begin += kPanel) {
        std::copy_n(buffers.logits + (Index{begin / kPanel} * num_images + i) * kPanel,
                    std::min(kPanel, num_classes - begin), rows[i] + begin);
      }
    }
  });
}

// Rows of the padded images: with a border of zeros, channels last, and pooled.
void Walker::pad_rows(int begin, int end) {
  const walk::Images& all = walk.images;
  const Size size = walk.image_size();
  const int height = padded_height(size.height), row = padded_row(size.width);
  const int border = kStemBorder * kImageChannels;
  const int pool = walk.pool;
  const float share = 1.f / static_cast<float>(pool * pool);
  for (int of_all = begin; of_all < end; ++of_all) {
    float* out = buffers.padded_images + Index{of_all} * row;
    const int y = of_all % height - kStemBorder;
    if (y < 0 || y >= size.height) {
      std::fill_n(out, row, 0.f);
      continue;
    }
    std::fill_n(out, border, 0.f);
    std::fill_n(out + row - border, border, 0.f);
    out += border;
    const float* image = all.data + images[of_all / height] * all.image_stride;
    for (int c = 0; c < kImageChannels; ++c) {
      const float* rows = image + c * all.channel_stride + y * pool * all.row_stride;
      const Index step = all.column_stride;
      if (pool == 1) {
        for (int x = 0; x < size.width; ++x) out[x * kImageChannels + c] = rows[x * step];
        continue;
      }
      for (int x = 0; x < size.width; ++x) {
        float sum = 0;
        for (int i = 0; i < pool; ++i) {
          const float* pixels = rows + i * all.row_stride + x * pool * step;
          for (int j = 0; j < pool; ++j) sum += pixels[j * step];
        }
        out[x * kImageChannels + c] = sum * share;
      }
    }
  }
}

}  // namespace blockdrop::walk_imagenet
