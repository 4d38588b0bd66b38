// What every operator of the CPU walk takes: a batch of images, and a network as packed weights.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

namespace blockdrop::walk {

constexpr int kSegments = 3;
constexpr int kImageChannels = 3;
constexpr int kWidths[kSegments] = {16, 32, 64};
constexpr int kClassMultiple = 16;
constexpr int kSizeMultiple = 4;

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Where the packed weights of each layer begin; the layout is in blockdrop_fast/ops/walk.py.
struct Network {
  int layers[kSegments];
  int num_blocks;
  int num_classes;
  int padded_classes;
  bool subsample;
  const float* stem;
  std::vector<const float*> convs;  // [2 * num_blocks]
  const float* classifier;

  int segment_of(int block) const;
  // The segment whose shape has the input of `block` (for num_blocks: of the classifier).
  int segment_before(int block) const { return block == 0 ? 0 : segment_of(block - 1); }
  bool changes_shape(int block) const { return segment_of(block) != segment_before(block); }
};

// Raises TypeError or ValueError; `name` is the argument's.
Network read_network(const char* name, const at::Tensor& weights, at::IntArrayRef layers,
                     int64_t num_classes, bool subsample);

// `weights`, of the right length, end with a hash of the numbers that describe their network, see
// `signature` in blockdrop_fast/ops/walk_network.py. Else raises ValueError.
void check_signature(const char* name, const at::Tensor& weights,
                     std::initializer_list<at::IntArrayRef> description);

// A batch of images of any strides.
struct Images {
  const float* data;
  int batch, height, width;
  int64_t image_stride, channel_stride, row_stride, column_stride;
};

// Raises TypeError or ValueError, also where height and width are not multiples of `multiple`.
Images read_images(const at::Tensor& images, int64_t multiple);

}  // namespace blockdrop::walk
