// What the CPU and the CUDA kernel of `blockdrop_fast::plan` share: input check and outputs.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <limits>

namespace blockdrop::plan {

struct Plan {
  at::Tensor indices;  // [K, B] int32
  at::Tensor counts;   // [K] int32
  at::Tensor order;    // [B] int32
};

// Checks the decisions, (B, K) bool, and allocates the plan for them, uninitialised.
inline Plan empty_plan(const at::Tensor& decisions) {
  TORCH_CHECK_TYPE(decisions.scalar_type() == at::kBool,
                   "decisions: expected dtype torch.bool, got ", decisions.scalar_type());
  TORCH_CHECK_VALUE(decisions.dim() == 2, "decisions: expected shape (B, K), got ",
                    decisions.sizes());
  const int64_t batch = decisions.size(0);
  const int64_t num_blocks = decisions.size(1);
  TORCH_CHECK_VALUE(batch <= std::numeric_limits<int32_t>::max(),
                    "decisions: image numbers are int32, got a batch of ", batch);
  const auto options = decisions.options().dtype(at::kInt);
  return {at::empty({num_blocks, batch}, options), at::empty({num_blocks}, options),
          at::empty({batch}, options)};
}

}  // namespace blockdrop::plan
