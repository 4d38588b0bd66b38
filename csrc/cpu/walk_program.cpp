#include "cpu/walk_program.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <utility>

#include "cpu/walk_isa.h"

namespace blockdrop::walk {
namespace {

// Segment 1 of a 32x32 image has 16 pairs of rows: more threads for an image find nothing to do.
constexpr int kMaxThreadsPerImage = 16;

Part all_panels(Part part, int channels) {
  part.panel_begin = 0;
  part.panel_end = channels / panel_channels(channels);
  return part;
}

}  // namespace

const Kernels& choose_kernels() {
  switch (choose_isa()) {
#ifdef BLOCKDROP_HAVE_AVX512
    case Isa::kAvx512:
      return *avx512_kernels();
#endif
#ifdef BLOCKDROP_HAVE_AVX2
    case Isa::kAvx2:
      return *avx2_kernels();
#endif
    default:
      return *portable_kernels();
  }
}

void clear_border(float* activations, int height, int width, int channels) {
  const int row = (width + 2) * channels;
  std::fill_n(activations, row, 0.f);
  std::fill_n(activations + (height + 1) * row, row, 0.f);
  for (int y = 1; y <= height; ++y) {
    std::fill_n(activations + y * row, channels, 0.f);
    std::fill_n(activations + (y + 1) * row - channels, channels, 0.f);
  }
}

// All scratch memory of the call comes from one tensor, so that torch's filling of uninitialised
// memory (torch.utils.deterministic) reaches it.
Walk::Walk(const Kernels& kernels, const Network& network, const Images& images, int num_spare,
           int num_logits)
    : kernels(kernels),
      network(network),
      images(images),
      num_threads(useful_threads(images.batch, kMaxThreadsPerImage)),
      buffers_(num_threads) {
  const int64_t image_size = int64_t{images.height + 2} * (images.width + 2) * kImageChannels;
  int64_t spare_size = 0;
  for (int segment = 0; segment < kSegments; ++segment) {
    spare_size = std::max(spare_size, activation_size(segment));
  }
  const int64_t sums_size = int64_t{images.height} * kWidths[0];  // alike in all segments
  std::vector<int64_t> sizes{image_size, num_logits, sums_size, kScratchFloats};
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
    buffers.logits = take(num_logits);
    buffers.row_sums = take(sums_size);
    buffers.kernel_scratch = take(kScratchFloats);
    for (int segment = 0; segment < kSegments; ++segment) {
      buffers.x[segment] = take(activation_size(segment));
      buffers.hidden[segment] = take(activation_size(segment));
    }
    for (int i = 0; i < num_spare; ++i) buffers.spare.push_back(take(spare_size));
  }
}

void Walk::clear_borders(const Buffers& buffers) const {
  clear_border(buffers.padded_image, images.height, images.width, kImageChannels);
  for (int segment = 0; segment < kSegments; ++segment) {
    for (float* activation : {buffers.x[segment], buffers.hidden[segment]}) {
      clear_border(activation, height(segment), width(segment), kWidths[segment]);
    }
  }
}

RowSums Walker::row_sums(int segment) const {
  return {buffers.x[segment], buffers.row_sums, walk.width(segment), kWidths[segment]};
}

void Walker::begin(bool sum_rows) {
  step([&] { pad_image(); });
  const Conv stem{buffers.padded_image, walk.network.stem, nullptr,
                  buffers.x[0],         walk.height(0),    walk.width(0)};
  step_in_parts(stem.height, kWidths[0], [&](const Part& part) {
    walk.kernels.stem(stem, part);
    if (sum_rows) walk.kernels.row_sums(row_sums(0), part);
  });
}

void Walker::run_block(int block, bool keep, bool sum_rows, const Blend* blend) {
  const Kernels& kernels = walk.kernels;
  const Network& network = walk.network;
  const int segment = network.segment_of(block);
  const int height = walk.height(segment), width = walk.width(segment);
  const int channels = kWidths[segment];
  float* x = buffers.x[segment];
  float* hidden = buffers.hidden[segment];
  const float* first = network.convs[2 * block];
  if (network.changes_shape(block)) {
    const float* before = buffers.x[segment - 1];
    const Shortcut shortcut{before, x, height, width, kWidths[segment - 1], network.subsample};
    const Conv conv{before, first, nullptr, hidden, height, width};
    step_in_parts(height, channels, [&](const Part& part) {
      // The shortcut moves channels to other panels, so that one part moves those of all.
      if (part.panel_begin == 0) {
        kernels.shortcut(shortcut, part);
        if (sum_rows && !keep) kernels.row_sums(row_sums(segment), all_panels(part, channels));
      }
      if (keep) kernels.strided_convs[segment](conv, part);
    });
  } else if (keep) {
    const Conv conv{x, first, nullptr, hidden, height, width};
    step_in_parts(height, channels, [&](const Part& part) {
      kernels.convs[segment](conv, part);
      if (blend) kernels.blend(*blend, part);
    });
  }
  if (keep) {
    const Conv conv{hidden, network.convs[2 * block + 1], x, x, height, width};
    step_in_parts(height, channels, [&](const Part& part) {
      kernels.convs[segment](conv, part);
      if (sum_rows) kernels.row_sums(row_sums(segment), part);
    });
  }
}

void Walker::classify(float* logits) {
  const Network& network = walk.network;
  const int last = kSegments - 1;
  step([&] {
    walk.kernels.classifier({buffers.x[last], network.classifier, buffers.logits, walk.height(last),
                             walk.width(last), network.padded_classes});
    std::copy_n(buffers.logits, network.num_classes, logits);
  });
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
