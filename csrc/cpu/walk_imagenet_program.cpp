#include "cpu/walk_imagenet_program.h"

#include <ATen/Parallel.h>

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

int useful_threads(int batch, int group) {
  const int64_t useful = int64_t{(batch + group - 1) / group} * kMaxThreadsPerGroup;
  return at::in_parallel_region()
             ? 1
             : static_cast<int>(std::min<int64_t>(at::get_num_threads(), useful));
}

int halved(int size) { return (size + 1) / 2; }

// Part `part` of `parts` of what is 0 ... count - 1.
std::pair<int, int> cut(int count, int part, int parts) {
  const auto at = [&](int i) { return static_cast<int>(int64_t{count} * i / parts); };
  return {at(part), at(part + 1)};
}

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
    const int threads = useful_threads(images.batch, 1);
    const auto fitting = static_cast<int>(std::min<Index>(kGroupFloats / x_size(), kMaxGroup));
    group = std::clamp((images.batch + threads - 1) / threads, 1, std::max(fitting, 1));
  }
  num_threads = useful_threads(images.batch, group);
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
  const Index padded = Index{image_.height + 2 * kStemBorder} * padded_row(image_.width) * group;
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
  steps_.run(num_images, [&](int index) { pad_image(index); });
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
  // In pairs of rows at least: a part computes a row again that the part before it has computed.
  const int rows = num_images * out.height;
  const int parts = steps_.together() ? std::min(2 * walk.num_threads, halved(rows)) : 1;
  steps_.run(parts, [&](int part) {
    const auto [begin, end] = cut(rows, part, parts);
    walk.kernels.stem(layer, Part{begin, end, 0, stem.out_panels, kernel_scratch_, nullptr});
  });
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
              num_images * static_cast<int>(out.pixels()),
              Index{conv.kernel * conv.kernel} * conv.in_panels * conv.out_panels * kPanel * kPanel,
              Index{std::min(conv.in_panels * kPanel, kBlockIn)} * kPanel};
  if (conv.winograd) {
    layer.kernel = kernels.winograd;
    layer.rows = num_images * num_tiles(out.height, out.width);
    layer.of_panel = Index{kTileProducts} * conv.in_panels * kPanel * kPanel;
    layer.weights = layer.of_panel * conv.out_panels;
  } else if (conv.kernel == 1 && conv.stride == 1) {
    layer.kernel = kernels.pointwise;
  }
  return layer;
}

void Walker::run(const Layer& layer, const Layer* next) {
  const int panels = layer.conv.out_panels;
  const auto first_weights = [&](int panel) -> const float* {
    if (!next) return nullptr;
    panel = std::min(panel, next->conv.out_panels - 1);
    return next->conv.weights + next->conv.out_panels * kPanel + panel * next->of_panel;
  };
  if (!steps_.together()) {
    layer.kernel(layer.conv, Part{0, layer.rows, 0, panels, kernel_scratch_, first_weights(0)});
    return;
  }
  // Threads that share the rows read all of the weights each, those that share the panels all of
  // the input (and transform it, in Winograd's form): what is less is read by all.
  const int threads = walk.num_threads;
  const int most_row_parts = (layer.rows + kMinRows - 1) / kMinRows;
  int row_parts, panel_parts;
  if (layer.weights < layer.inputs()) {
    row_parts = std::min(2 * threads, most_row_parts);
    panel_parts = std::min((threads + row_parts - 1) / row_parts, panels);
  } else {
    panel_parts = std::min(threads, panels);
    row_parts = std::min((threads + panel_parts - 1) / panel_parts, most_row_parts);
  }
  steps_.run(panel_parts * row_parts, [&](int part) {
    const auto [row_begin, row_end] = cut(layer.rows, part / panel_parts, row_parts);
    const auto [begin, end] = cut(panels, part % panel_parts, panel_parts);
    layer.kernel(layer.conv, Part{row_begin, row_end, begin, end, kernel_scratch_,
                                  first_weights(panel_parts > 1 ? begin : 0)});
  });
}

void Walker::copy(const float* from, float* to, int block) {
  const Index size =
      walk.panels_before(block) * kPanel * num_images * walk.size_before(block).pixels();
  steps_.run(1, [&](int) { std::memcpy(to, from, size * sizeof(float)); });
}

void Walker::average() {
  const int last = walk.network.num_blocks;
  const Mean mean{buffers.x[walk.x_before(last)], buffers.means, walk.panels_before(last),
                  num_images, static_cast<int>(walk.size_before(last).pixels())};
  steps_.run(1, [&](int) {
    walk.kernels.mean(mean, Part{0, 0, 0, mean.panels, kernel_scratch_, nullptr});
  });
}

void Walker::store_logits(const std::vector<float*>& rows) {
  const int num_classes = walk.network.num_classes;
  steps_.run(1, [&](int) {
    for (int i = 0; i < num_images; ++i) {
      for (int begin = 0; begin < num_classes; begin += kPanel) {
        std::copy_n(buffers.logits + (Index{begin / kPanel} * num_images + i) * kPanel,
                    std::min(kPanel, num_classes - begin), rows[i] + begin);
      }
    }
  });
}

// With a border of zeros, channels last, and pooled.
void Walker::pad_image(int index) {
  const walk::Images& all = walk.images;
  const Size size = walk.image_size();
  const float* image = all.data + images[index] * all.image_stride;
  const int row = padded_row(size.width), border = kStemBorder * kImageChannels;
  const int pool = walk.pool;
  const float share = 1.f / static_cast<float>(pool * pool);
  float* out = buffers.padded_images + Index{index} * (size.height + 2 * kStemBorder) * row;
  out = std::fill_n(out, kStemBorder * row, 0.f);
  for (int y = 0; y < size.height; ++y) {
    out = std::fill_n(out, border, 0.f);
    for (int x = 0; x < size.width; ++x) {
      const float* pixel = image + y * pool * all.row_stride + x * pool * all.column_stride;
      for (int c = 0; c < kImageChannels; ++c) {
        float sum = 0;
        for (int i = 0; i < pool; ++i) {
          for (int j = 0; j < pool; ++j) {
            sum += pixel[c * all.channel_stride + i * all.row_stride + j * all.column_stride];
          }
        }
        *out++ = pool == 1 ? sum : sum * share;
      }
    }
    out = std::fill_n(out, border, 0.f);
  }
  std::fill_n(out, kStemBorder * row, 0.f);
}

}  // namespace blockdrop::walk_imagenet
