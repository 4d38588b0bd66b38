// CUDA kernel of `blockdrop_fast::plan`; schema and reference: blockdrop_fast/ops/plan.py. One
// launch of ceil(K / 32) + 1 thread blocks, whose code is in plan.cuh. Nothing waits for the
// device.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdint>
#include <tuple>

#include "cuda/plan.cuh"
#include "plan.h"

namespace blockdrop::plan {
namespace {

// A thread block of 1024 threads leaves 64 registers to each.
// tests/ops/test_cuda_build.py holds the kernel to these lines:
// limits: plan_kernel 64 registers, 0 bytes spilled, 0 bytes static shared memory
// limits: plan_kernel 2000 instructions
__global__ void __launch_bounds__(kThreads, 1)
    plan_kernel(const __grid_constant__ Arguments arguments) {
  plan(arguments);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> plan_cuda(const at::Tensor& decisions) {
  const c10::cuda::CUDAGuard guard(decisions.device());
  Plan plan = empty_plan(decisions);
  const int64_t batch = decisions.size(0), num_blocks = decisions.size(1);
  TORCH_CHECK_VALUE(num_blocks < kBins * kBins, "decisions: expected fewer than ", kBins * kBins,
                    " blocks on a GPU, got ", num_blocks);
  const at::Tensor contiguous = decisions.contiguous();
  at::Tensor scratch = at::empty({2, batch}, plan.order.options());
  const Arguments arguments{contiguous.const_data_ptr<bool>(),
                            plan.indices.mutable_data_ptr<int32_t>(),
                            plan.counts.mutable_data_ptr<int32_t>(),
                            plan.order.mutable_data_ptr<int32_t>(),
                            scratch.mutable_data_ptr<int32_t>(),
                            batch,
                            num_blocks};
  const int64_t thread_blocks = (num_blocks + kColumns - 1) / kColumns + 1;
  plan_kernel<<<static_cast<unsigned>(thread_blocks), kThreads, kSharedBytes,
                c10::cuda::getCurrentCUDAStream()>>>(arguments);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {plan.indices, plan.counts, plan.order};
}

}  // namespace
}  // namespace blockdrop::plan

TORCH_LIBRARY_IMPL(blockdrop_fast, CUDA, m) { m.impl("plan", &blockdrop::plan::plan_cuda); }
