// The kernels of the CUDA walk, their budget, and their launch. The device code is in
// walk_half.cuh, and for small batches in walk_half_cluster.cuh; the tests run it on a CPU.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "cuda/walk_half.cuh"
#include "cuda/walk_half.h"
#include "cuda/walk_half_cluster.cuh"

namespace blockdrop::walk_half {
namespace {

// Shared memory, bytes: 1,040 say which path is on and what it keeps. Segment 1 has two
// activations, 2 * (34 * 33 + 1) * 16 * 2 = 71,872, segment 3 19,648 + 11,648; a slice of weights
// takes 16 * 4 + 9 * 512 = 4,672 in segment 1, 18,688 in segment 3. With a ring of two, segment 1
// needs most: 82,256; with 1,024 of the system, twice that is 166,560 of the 167,936 that an sm_80
// multiprocessor has. With a ring of four it is segment 3: 107,088, twice 216,224 of 233,472 on
// sm_90. sm_86 and sm_89 have room for one thread block (99 KB).
//
// Registers: two blocks of 256 threads leave 128 of 65,536 to each. A convolution holds 64 sums (in
// segment 3 48), 12 registers of weights, 4 of input (12), and addresses.
//
// Instructions are of 16 bytes; the instruction cache has about 128 KB. NOTES.md has what nvcc
// takes.
//
// tests/ops/test_cuda_build.py holds the kernels to these lines:
// limits: walk_kernel 128 registers, 0 bytes spilled, 0 bytes static shared memory
// limits: walk_kernel 7500 instructions
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
// Shared memory, bytes: 1,040; two activations, 71,872; a ring of weights for three convolutions,
// 16 output channels of four slices or as much of fewer, 3 * 4 * 4,672 = 56,064; 128,976 in all.
// Only sm_90 has clusters, and 232,448 for a thread block.
//
// Registers: could be 255, and nearly are, as all weights of a convolution that are not in
// registers when it begins (two slices, 72) are fetched ahead.
template <typename Format>
__global__ void BLOCKDROP_CLUSTER(cluster::kBlocks) __launch_bounds__(kThreads, 1)
    cluster_kernel(const __grid_constant__ Paths paths) {
  if constexpr (kHasClusters) cluster::walk<Format>(paths);
}

// The kernels for a format, and what of each runs at once on a device: thread blocks, clusters.
struct Capacity {
  void (*walk)(Paths);
  void (*clusters)(Paths);
  int ring;  // slices of weights that a thread block has room for
  int64_t num_blocks, num_clusters;
};

// BLOCKDROP_CLUSTERS=0 does without clusters: if a first run hangs, that tells which kernel does.
bool clusters_wanted() {
  const char* variable = std::getenv("BLOCKDROP_CLUSTERS");
  const std::string value = variable ? variable : "";
  TORCH_CHECK_VALUE(value.empty() || value == "0" || value == "1",
                    "BLOCKDROP_CLUSTERS: expected 0 or 1, got '", value, "'");
  return value != "0";
}

template <typename Format>
Capacity ask_capacity(int device) {
  Capacity capacity{&walk_kernel<Format>, &cluster_kernel<Format>, 2, 0, 0};
  int multiprocessors = 0, all_bytes = 0, most_bytes = 0, resident = 0, clusters = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  C10_CUDA_CHECK(
      cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  C10_CUDA_CHECK(
      cudaDeviceGetAttribute(&all_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  constexpr int kSystemBytes = 1024;
  if (all_bytes >= kBlocksPerMultiprocessor * (static_cast<int>(shared_bytes(4)) + kSystemBytes)) {
    capacity.ring = 4;
  }
  for (const auto kernel : {capacity.walk, capacity.clusters}) {
    C10_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes));
    C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                        cudaSharedmemCarveoutMaxShared));
  }
  C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, capacity.walk, kThreads,
                                                               shared_bytes(capacity.ring)));
  TORCH_CHECK(resident > 0, "walk_half: a thread block needs ", shared_bytes(capacity.ring),
              " bytes of shared memory, more than this GPU has");
  capacity.num_blocks = static_cast<int64_t>(resident) * multiprocessors;

  // Compiled for sm_90, and not by a driver for another GPU; for all others the kernel is empty.
  cudaFuncAttributes compiled{};
  C10_CUDA_CHECK(cudaFuncGetAttributes(&compiled, capacity.clusters));
  if (clusters_wanted() && compiled.ptxVersion == 90 && compiled.binaryVersion == 90) {
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(cluster::kBlocks);
    launch.blockDim = dim3(kThreads);
    launch.dynamicSmemBytes = cluster::kSharedBytes;
    // An error means that there are none, say where MIG leaves too few multiprocessors.
    C10_CUDA_IGNORE_ERROR(cudaOccupancyMaxActiveClusters(&clusters, capacity.clusters, &launch));
    capacity.num_clusters = clusters;
  }
  return capacity;
}

// Asks the runtime once for each device and format: it takes as long as a small batch.
Capacity capacity_of(bool bfloat16, int device) {
  static std::mutex mutex;
  static std::map<std::pair<int, bool>, Capacity> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::pair key(device, bfloat16);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  const auto ask = bfloat16 ? &ask_capacity<Bfloat16> : &ask_capacity<Float16>;
  return known.emplace(key, ask(device)).first->second;
}

}  // namespace

// A cluster a path, if all of them run at once. Else at most as many thread blocks as do; each
// takes paths until there are none left.
void launch_walk(Paths paths, bool bfloat16) {
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  const Capacity capacity = capacity_of(bfloat16, stream.device_index());
  const bool clusters = paths.num_paths <= capacity.num_clusters;
  const auto kernel = clusters ? capacity.clusters : capacity.walk;
  paths.ring = capacity.ring;
  const uint32_t bytes = clusters ? cluster::kSharedBytes : shared_bytes(paths.ring);
  const int64_t blocks = clusters ? paths.num_paths * cluster::kBlocks
                                  : std::min(paths.num_paths, capacity.num_blocks);
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
