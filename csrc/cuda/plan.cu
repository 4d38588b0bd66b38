// CUDA kernel of `blockdrop_fast::plan`; schema and reference: blockdrop_fast/ops/plan.py.
//
// One launch of ceil(K / 32) + 1 independent thread blocks. Each of the first lists the active
// images of 32 residual blocks, 1024 images at a time; the last one orders the images. Nothing
// waits for the device and no result depends on the order in which threads run.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdint>
#include <tuple>

#include "plan.h"

namespace blockdrop::plan {
namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 32;
constexpr int kThreads = kLanes * kWarps;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kColumns = kLanes;  // residual blocks of a thread block: one a lane
// Images that a thread block looks at in one step: 32 to a warp, one a bit of a lane's word.
constexpr int64_t kImages = kLanes * kWarps;
// Histogram bins that fit beside the 4.1 KB of static shared memory in the 48 KB that need no
// opt-in: 10,240 * 4 B = 40 KB. Networks with more residual blocks use global memory.
constexpr int64_t kMaxSharedBins = 10240;

__device__ unsigned lanes_below() { return (1u << (threadIdx.x % kLanes)) - 1; }

// Lists the active images of residual blocks [first_column, first_column + 32).
//
// Shared memory: 32 warps x 33 ints (padded, so that reading a column meets 32 banks) = 4.1 KB.
__device__ void list_active_images(const bool* __restrict__ decisions,  // [B, K]
                                   int32_t* __restrict__ indices,       // [K, B]
                                   int32_t* __restrict__ counts,        // [K]
                                   int64_t batch, int64_t num_blocks, int64_t first_column) {
  __shared__ int32_t active_before[kWarps][kColumns + 1];  // of a warp's images, in this step
  __shared__ int32_t active_total[kColumns];               // in all steps so far
  const int warp = threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  const int64_t column = first_column + lane;
  const bool has_column = column < num_blocks;
  if (warp == 0) {
    active_total[lane] = 0;
  }

  for (int64_t step_image = 0; step_image < batch; step_image += kImages) {
    // Bit i of a lane's word: the lane's residual block is active for image first_image + i.
    // A warp reads 32 neighbouring bytes a load, and the 32 loads are independent.
    const int64_t first_image = step_image + warp * kLanes;
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const int64_t image = first_image + i;
      if (has_column && image < batch && decisions[image * num_blocks + column]) {
        word |= 1u << i;
      }
    }
    active_before[warp][lane] = __popc(word);
    __syncthreads();

    // Warp w turns the counts of column w into exclusive prefix sums over the 32 warps.
    {
      const int32_t own = active_before[lane][warp];
      int32_t sum = own;
      for (int offset = 1; offset < kLanes; offset *= 2) {
        const int32_t below = __shfl_up_sync(kAllLanes, sum, offset);
        if (lane >= offset) {
          sum += below;
        }
      }
      const int32_t total = active_total[warp];
      active_before[lane][warp] = total + sum - own;
      __syncwarp();  // every lane has read the total
      if (lane == kLanes - 1) {
        active_total[warp] = total + sum;
      }
    }
    __syncthreads();

    // Lane i now stands for image first_image + i, so that a warp's stores are contiguous.
    for (int c = 0; c < kColumns && first_column + c < num_blocks; ++c) {
      const uint32_t column_word = __shfl_sync(kAllLanes, word, c);
      if (column_word >> lane & 1u) {
        const int64_t slot = active_before[warp][c] + __popc(column_word & lanes_below());
        indices[(first_column + c) * batch + slot] = static_cast<int32_t>(first_image + lane);
      }
    }
    __syncthreads();  // before the next step overwrites active_before
  }

  // Warp w finishes column w: its count and its unused tail.
  __syncthreads();  // a batch of any size has written active_total
  if (first_column + warp < num_blocks) {
    const int32_t count = active_total[warp];
    if (lane == 0) {
      counts[first_column + warp] = count;
    }
    int32_t* row = indices + (first_column + warp) * batch;
    for (int64_t slot = count + lane; slot < batch; slot += kLanes) {
      row[slot] = -1;
    }
  }
}

// Orders the images by descending usage, equal ones ascending: a counting sort by one thread
// block. The parts that have to go through bins or images in order are done by its first warp,
// 32 at a time; B / 32 short steps are few for the batches that fit a GPU.
__device__ void order_by_usage(const bool* __restrict__ decisions,  // [B, K]
                               int32_t* __restrict__ order,         // [B]
                               int32_t* dropped,                    // [B] scratch: dropped blocks
                               int32_t* bins,                       // [K + 1] scratch
                               int64_t batch, int64_t num_blocks) {
  const int warp = threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  // bins[d]: images that drop d blocks, so that ascending bins are descending usage.
  for (int64_t bin = threadIdx.x; bin <= num_blocks; bin += kThreads) {
    bins[bin] = 0;
  }
  __syncthreads();

  for (int64_t image = warp; image < batch; image += kWarps) {
    int32_t sum = 0;
    for (int64_t block = lane; block < num_blocks; block += kLanes) {
      sum += !decisions[image * num_blocks + block];
    }
    sum = __reduce_add_sync(kAllLanes, sum);
    if (lane == 0) {
      dropped[image] = sum;
      atomicAdd(&bins[sum], 1);
    }
  }
  __syncthreads();
  if (warp != 0) {
    return;
  }

  // bins[d] becomes the place of the first image that drops d blocks.
  int32_t placed = 0;
  for (int64_t first_bin = 0; first_bin <= num_blocks; first_bin += kLanes) {
    const int64_t bin = first_bin + lane;
    const int32_t own = bin <= num_blocks ? bins[bin] : 0;
    int32_t sum = own;
    for (int offset = 1; offset < kLanes; offset *= 2) {
      const int32_t below = __shfl_up_sync(kAllLanes, sum, offset);
      if (lane >= offset) {
        sum += below;
      }
    }
    if (bin <= num_blocks) {
      bins[bin] = placed + sum - own;
    }
    placed += __shfl_sync(kAllLanes, sum, kLanes - 1);
  }
  __syncwarp();

  // Images in ascending order, 32 at a time: those of one bin find their rank among each other,
  // and the first of them moves the bin's place on. The next key is read ahead.
  int32_t next_key = lane < batch ? dropped[lane] : -1;
  for (int64_t first_image = 0; first_image < batch; first_image += kLanes) {
    const int64_t image = first_image + lane;
    const int32_t key = next_key;
    next_key = image + kLanes < batch ? dropped[image + kLanes] : -1;
    const unsigned peers = __match_any_sync(kAllLanes, key);
    const int rank = __popc(peers & lanes_below());
    const int32_t place = key >= 0 ? bins[key] : 0;
    __syncwarp();  // every lane has read its place
    if (key >= 0) {
      order[place + rank] = static_cast<int32_t>(image);
      if (rank == 0) {
        bins[key] = place + __popc(peers);
      }
    }
    __syncwarp();  // the places are seen by the next step
  }
}

// A thread block of 1024 threads leaves 64 registers to each.
// tests/ops/test_cuda_build.py holds the kernel to this line:
// limits: plan_kernel 64 registers, 0 bytes spilled, 4352 bytes static shared memory
__global__ void __launch_bounds__(kThreads)
    plan_kernel(const bool* __restrict__ decisions,  // [B, K]
                int32_t* __restrict__ indices,       // [K, B]
                int32_t* __restrict__ counts,        // [K]
                int32_t* __restrict__ order,         // [B]
                int32_t* scratch,                    // [B], or [B + K + 1] without shared bins
                int64_t batch, int64_t num_blocks) {
  extern __shared__ int32_t shared_bins[];  // [K + 1], or nothing
  if (blockIdx.x + 1 < gridDim.x) {
    list_active_images(decisions, indices, counts, batch, num_blocks,
                       static_cast<int64_t>(blockIdx.x) * kColumns);
  } else {
    int32_t* bins = num_blocks < kMaxSharedBins ? shared_bins : scratch + batch;
    order_by_usage(decisions, order, scratch, bins, batch, num_blocks);
  }
}

void launch_plan(const bool* decisions, int32_t* indices, int32_t* counts, int32_t* order,
                 int32_t* scratch, int64_t batch, int64_t num_blocks, cudaStream_t stream) {
  const int64_t thread_blocks = (num_blocks + kColumns - 1) / kColumns + 1;
  const size_t bin_bytes = num_blocks < kMaxSharedBins ? (num_blocks + 1) * sizeof(int32_t) : 0;
  plan_kernel<<<static_cast<unsigned>(thread_blocks), kThreads, bin_bytes, stream>>>(
      decisions, indices, counts, order, scratch, batch, num_blocks);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> plan_cuda(const at::Tensor& decisions) {
  const c10::cuda::CUDAGuard guard(decisions.device());
  Plan plan = empty_plan(decisions);
  const int64_t batch = decisions.size(0);
  const int64_t num_blocks = decisions.size(1);
  const at::Tensor contiguous = decisions.contiguous();
  const int64_t global_bins = num_blocks < kMaxSharedBins ? 0 : num_blocks + 1;
  at::Tensor scratch = at::empty({batch + global_bins}, plan.order.options());
  launch_plan(contiguous.const_data_ptr<bool>(), plan.indices.mutable_data_ptr<int32_t>(),
              plan.counts.mutable_data_ptr<int32_t>(), plan.order.mutable_data_ptr<int32_t>(),
              scratch.mutable_data_ptr<int32_t>(), batch, num_blocks,
              c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {plan.indices, plan.counts, plan.order};
}

}  // namespace
}  // namespace blockdrop::plan

TORCH_LIBRARY_IMPL(blockdrop_fast, CUDA, m) { m.impl("plan", &blockdrop::plan::plan_cuda); }
