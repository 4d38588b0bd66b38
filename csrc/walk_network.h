// What the kernels of `walk` and `walk_half` check alike. The references' checks are in
// blockdrop_fast/ops/walk_network.py.

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>

namespace blockdrop {

// The images' shape, but for height and width.
inline void check_images(const at::Tensor& images) {
  TORCH_CHECK_VALUE(images.dim() == 4 && images.size(1) == 3,
                    "images: expected shape (B, 3, H, W), got ", images.sizes());
}

// More blocks than any network has, few enough to be counted one by one.
constexpr int64_t kMostBlocksOfSegment = int64_t{1} << 16;

// A network's residual blocks and classes.
inline void check_network(at::IntArrayRef layers, int64_t num_classes) {
  const auto possible = [](int64_t blocks) {
    return blocks >= 1 && blocks <= kMostBlocksOfSegment;
  };
  TORCH_CHECK_VALUE(layers.size() == 3 && std::all_of(layers.begin(), layers.end(), possible),
                    "layers: expected at least one block in 3 segments, got ", layers);
  TORCH_CHECK_VALUE(num_classes >= 1 && num_classes <= std::numeric_limits<int>::max(),
                    "num_classes: expected at least 1, got ", num_classes);
}

// `weights` are a contiguous vector of `length` `unit`.
inline void check_length(const char* name, const at::Tensor& weights, int64_t length,
                         const char* unit) {
  TORCH_CHECK_VALUE(weights.dim() == 1 && weights.numel() == length, name,
                    ": expected a vector of ", length, " ", unit, ", got shape ", weights.sizes());
  TORCH_CHECK_VALUE(weights.is_contiguous(), name, ": expected contiguous memory, got stride ",
                    weights.stride(0));
}

inline void check_decisions(const at::Tensor& decisions, int64_t batch, int64_t num_blocks) {
  TORCH_CHECK_TYPE(decisions.scalar_type() == at::kBool,
                   "decisions: expected dtype torch.bool, got ", decisions.scalar_type());
  TORCH_CHECK_VALUE((decisions.dim() == 2 || decisions.dim() == 3) && decisions.size(-2) == batch &&
                        decisions.size(-1) == num_blocks,
                    "decisions: expected shape (B, K) or (S, B, K) with B = ", batch,
                    " and K = ", num_blocks, ", got ", decisions.sizes());
  TORCH_CHECK_VALUE(decisions.size(0) <= std::numeric_limits<int>::max(),
                    "decisions: too many sets for this kernel, got ", decisions.size(0));
}

}  // namespace blockdrop
