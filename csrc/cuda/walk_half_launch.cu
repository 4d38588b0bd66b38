// The kernels of the CUDA walk, their budget, and their launch. The device code is in
// walk_half.cuh, and for small batches in walk_half_cluster.cuh; the tests run it on a CPU.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cstdint>

#include "cuda/walk_half.cuh"
#include "cuda/walk_half.h"
#include "cuda/walk_half_cluster.cuh"

namespace blockdrop::walk_half {
namespace {

// Shared memory, bytes: two activations of segment 1, 2 * (34 * 33 + 1) * 16 * 2 = 71,872, and a
// ring of two slices, 2 * (16 * 4 + 9 * 512) = 9,344, are 81,216; the segments that follow need
// less. With 4 for the path and a bit a block (ResNet-110: 8) it is 81,228, and 1,024 are the
// system's. Two thread blocks take 164,504 of the 167,936 that an sm_80 multiprocessor has (sm_90:
// 233,472). sm_86 and sm_89 have room for one (99 KB).
//
// Registers: two blocks of 256 threads leave 128 of 65,536 to each. A convolution holds 32 sums (in
// segment 3 48), 12 registers of weights, 4 of input (12), and addresses; nvcc 13.0 takes 114.
//
// Instructions: 5,416 of 16 bytes; the instruction cache has about 128 KB.
//
// tests/ops/test_cuda_build.py holds the kernels to these lines:
// limits: walk_kernel 128 registers, 0 bytes spilled, 0 bytes static shared memory
// limits: walk_kernel 6000 instructions
// limits: cluster_kernel 255 registers, 0 bytes spilled, 0 bytes static shared memory
// limits: cluster_kernel 6000 instructions
constexpr int kBlocksPerMultiprocessor = 2;

template <typename Format>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    walk_kernel(const __grid_constant__ Paths paths) {
  walk<Format>(paths);
}

// For few images: eight thread blocks, each alone on its multiprocessor, carry one.
//
// Shared memory, bytes: two activations, 71,872; a ring of weights for three convolutions, 16
// output channels of four slices or as much of fewer, 3 * 4 * (64 + 9 * 512) = 56,064; 127,936 in
// all, with decisions 127,944. Only sm_90 has clusters, and 232,448 for a thread block.
//
// Registers: could be 255, and nvcc 13.0 takes 232, as all weights of a convolution that are not in
// registers when it begins (two slices, 72) are fetched ahead.
template <typename Format>
__global__ void __launch_bounds__(kThreads, 1) cluster_kernel(const __grid_constant__ Paths paths) {
  if constexpr (kHasClusters) cluster::walk<Format>(paths);
}

using Kernel = void (*)(Paths);

void allow_shared_memory(Kernel kernel, uint32_t bytes) {
  C10_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                      cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(bytes)));
}

// Launches a cluster a path if the device has clusters and can run all of them at once.
bool launch_clusters(const Paths& paths, bool bfloat16, int device, int multiprocessors,
                     cudaStream_t stream) {
  if (paths.num_paths * cluster::kBlocks > multiprocessors) return false;
  const Kernel kernel = bfloat16 ? &cluster_kernel<Bfloat16> : &cluster_kernel<Float16>;
  int has_clusters = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&has_clusters, cudaDevAttrClusterLaunch, device));
  int most_bytes = 0;  // not all devices with clusters have as much as sm_90
  C10_CUDA_CHECK(
      cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  if (!has_clusters || static_cast<uint32_t>(most_bytes) < cluster::shared_bytes(paths)) {
    return false;
  }
  // Compiled for sm_80, and now for this device by its driver, the kernel is empty.
  cudaFuncAttributes compiled{};
  C10_CUDA_CHECK(cudaFuncGetAttributes(&compiled, reinterpret_cast<const void*>(kernel)));
  if (compiled.ptxVersion < 90) return false;

  cudaLaunchAttribute size{};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim.x = cluster::kBlocks;
  size.val.clusterDim.y = size.val.clusterDim.z = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(paths.num_paths) * cluster::kBlocks);
  launch.blockDim = dim3(kThreads);
  launch.dynamicSmemBytes = cluster::shared_bytes(paths);
  launch.stream = stream;
  launch.attrs = &size;
  launch.numAttrs = 1;
  allow_shared_memory(kernel, cluster::shared_bytes(paths));
  int at_once = 0;
  C10_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&at_once, kernel, &launch));
  if (paths.num_paths > at_once) return false;
  C10_CUDA_CHECK(cudaLaunchKernelEx(&launch, kernel, paths));
  return true;
}

}  // namespace

// At most as many thread blocks as run at once; each takes paths until there are none left. Fewer
// paths than clusters that run at once: a cluster each.
void launch_walk(Paths paths, bool bfloat16) {
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  int device = 0, multiprocessors = 0, resident = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  if (launch_clusters(paths, bfloat16, device, multiprocessors, stream)) return;

  const Kernel kernel = bfloat16 ? &walk_kernel<Bfloat16> : &walk_kernel<Float16>;
  const uint32_t bytes = shared_bytes(paths);
  allow_shared_memory(kernel, bytes);
  C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, bytes));
  TORCH_CHECK(resident > 0, "walk_half: a thread block needs ", bytes,
              " bytes of shared memory, more than this GPU has");
  const int64_t blocks =
      std::min(paths.num_paths, static_cast<int64_t>(resident) * multiprocessors);
  at::Tensor queue;
  if (paths.num_paths > blocks) {
    queue = at::empty({1}, at::device(at::kCUDA).dtype(at::kInt));
    paths.queue = queue.mutable_data_ptr<int32_t>();
    C10_CUDA_CHECK(cudaMemsetAsync(paths.queue, 0, sizeof(int), stream));
  }
  kernel<<<static_cast<unsigned>(blocks), kThreads, bytes, stream>>>(paths);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace blockdrop::walk_half
