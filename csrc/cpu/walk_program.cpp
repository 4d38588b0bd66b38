#include "cpu/walk_program.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace blockdrop::walk {
namespace {

// Segment 1 of a 32x32 image has 16 pairs of rows: more threads for an image find nothing to do.
constexpr int kMaxThreadsPerImage = 16;

int useful_threads(int batch) {
  const int64_t useful = int64_t{batch} * kMaxThreadsPerImage;
  return at::in_parallel_region()
             ? 1
             : static_cast<int>(std::min<int64_t>(at::get_num_threads(), useful));
}

void clear_border(float* activation, int height, int width, int channels) {
  const int row = (width + 2) * channels;
  std::fill_n(activation, row, 0.f);
  std::fill_n(activation + (height + 1) * row, row, 0.f);
  for (int y = 1; y <= height; ++y) {
    std::fill_n(activation + y * row, channels, 0.f);
    std::fill_n(activation + (y + 1) * row - channels, channels, 0.f);
  }
}

}  // namespace

// All scratch memory of the call comes from one tensor, so that torch's filling of uninitialised
// memory (torch.utils.deterministic) reaches it.
Walk::Walk(const Kernels& kernels, const Network& network, const Images& images, int num_spare)
    : kernels(kernels),
      network(network),
      images(images),
      num_threads(useful_threads(images.batch)),
      buffers_(num_threads) {
  const int64_t image_size = int64_t{images.height + 2} * (images.width + 2) * kImageChannels;
  int64_t spare_size = 0;
  for (int segment = 0; segment < kSegments; ++segment) {
    spare_size = std::max(spare_size, activation_size(segment));
  }
  std::vector<int64_t> sizes{image_size, network.padded_classes, kScratchFloats};
  for (int segment = 0; segment < kSegments; ++segment) {
    sizes.insert(sizes.end(), 2, activation_size(segment));
  }
  sizes.insert(sizes.end(), num_spare, spare_size);
  int64_t slot_size = 0;
  for (int64_t size : sizes) slot_size += round_up(size, 16);
  scratch_ = at::empty({num_threads, slot_size}, at::kFloat);

  float* next = scratch_.mutable_data_ptr<float>();
  auto take = [&](int64_t size) { return std::exchange(next, next + round_up(size, 16)); };
  for (Buffers& buffers : buffers_) {
    buffers.padded_image = take(image_size);
    buffers.logits = take(network.padded_classes);
    buffers.kernel_scratch = take(kScratchFloats);
    for (int segment = 0; segment < kSegments; ++segment) {
      buffers.x[segment] = take(activation_size(segment));
      buffers.hidden[segment] = take(activation_size(segment));
    }
    for (int i = 0; i < num_spare; ++i) buffers.spare.push_back(take(spare_size));
  }
}

int Walk::segment_before(int block) const {
  int segment = 0;
  for (int end = network.layers[0]; segment < kSegments - 1 && block > end;) {
    end += network.layers[++segment];
  }
  return segment;
}

void Walk::clear_borders(const Buffers& buffers) const {
  clear_border(buffers.padded_image, images.height, images.width, kImageChannels);
  for (int segment = 0; segment < kSegments; ++segment) {
    for (float* activation : {buffers.x[segment], buffers.hidden[segment]}) {
      clear_border(activation, height(segment), width(segment), kWidths[segment]);
    }
  }
}

void Walker::begin() {
  steps_.run(1, [&](int) { pad_image(); });
  convolve(walk.kernels.stem, walk.network.stem, buffers.padded_image, nullptr, buffers.x[0], 0);
}

void Walker::run_block(int block, int segment, bool changes_shape, bool keep) {
  const Kernels& kernels = walk.kernels;
  const Network& network = walk.network;
  float* x = buffers.x[segment];
  float* hidden = buffers.hidden[segment];
  if (changes_shape) {
    const float* before = buffers.x[segment - 1];
    const Shortcut shortcut{
        before,           x, walk.height(segment), walk.width(segment), kWidths[segment - 1],
        network.subsample};
    const Conv conv{before, network.convs[2 * block], nullptr,
                    hidden, walk.height(segment),     walk.width(segment)};
    step_in_parts(segment, [&](const Part& part) {
      if (part.panel_begin == 0) kernels.shortcut(shortcut, part);
      if (keep) kernels.strided_convs[segment](conv, part);
    });
  } else if (keep) {
    convolve(kernels.convs[segment], network.convs[2 * block], x, nullptr, hidden, segment);
  }
  if (keep) {
    convolve(kernels.convs[segment], network.convs[2 * block + 1], hidden, x, x, segment);
  }
}

void Walker::copy(const float* from, float* to, int block) {
  const int64_t size = walk.activation_size(walk.segment_before(block));
  steps_.run(1, [&](int) { std::memcpy(to, from, size * sizeof(float)); });
}

void Walker::classify(float* logits) {
  const Network& network = walk.network;
  const int last = kSegments - 1;
  steps_.run(1, [&](int) {
    walk.kernels.classifier({buffers.x[last], network.classifier, buffers.logits, walk.height(last),
                             walk.width(last), network.padded_classes});
    std::copy_n(buffers.logits, network.num_classes, logits);
  });
}

template <class Run>
void Walker::step_in_parts(int segment, const Run& run) {
  const int height = walk.height(segment);
  const int panels = kWidths[segment] / panel_channels(kWidths[segment]);
  if (!steps_.together()) {
    run(Part{0, height, 0, panels, kernel_scratch_});
    return;
  }
  // Panels first: parts of different panels read different weights.
  const int pairs = (height + 1) / 2;
  const int row_parts = std::min((walk.num_threads + panels - 1) / panels, pairs);
  steps_.run(panels * row_parts, [&](int part) {
    const int panel = part % panels;
    const int rows = part / panels;
    run(Part{2 * (pairs * rows / row_parts), std::min(2 * (pairs * (rows + 1) / row_parts), height),
             panel, panel + 1, kernel_scratch_});
  });
}

void Walker::convolve(void (*kernel)(const Conv&, const Part&), const float* weights,
                      const float* input, const float* residual, float* output, int segment) {
  const Conv conv{input, weights, residual, output, walk.height(segment), walk.width(segment)};
  step_in_parts(segment, [&](const Part& part) { kernel(conv, part); });
}

void Walker::pad_image() {
  const Images& images = walk.images;
  const float* pixels = images.data + image * images.image_stride;
  float* out = buffers.padded_image + (images.width + 2) * kImageChannels;
  for (int y = 0; y < images.height; ++y) {
    out += kImageChannels;
    for (int x = 0; x < images.width; ++x) {
      const float* pixel = pixels + y * images.row_stride + x * images.column_stride;
      for (int c = 0; c < kImageChannels; ++c) *out++ = pixel[c * images.channel_stride];
    }
    out += kImageChannels;
  }
}

}  // namespace blockdrop::walk
