// CUDA kernels of `blockdrop_fast::walk_half` and `walk_half_policy`: images to logits in one
// launch. Schemas, references and the layout of packed weights: blockdrop_fast/ops/walk_half.py.
// The device code is in walk.cuh, and for small batches in walk_cluster.cuh; the tests run it on a
// CPU.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

#include "cuda/walk.cuh"
#include "cuda/walk_cluster.cuh"

namespace blockdrop::walk_half {
namespace {

// Shared memory, bytes: two activations of segment 1, 2 * (34 * 33 + 1) * 16 * 2 = 71,872, and a
// ring of two slices, 2 * (16 * 4 + 9 * 512) = 9,344, are 81,216; the segments that follow need
// less. With 4 for the path and a bit a block (ResNet-110: 8) it is 81,228, and 1,024 are the
// system's. Two thread blocks take 164,504 of the 167,936 that an sm_80 multiprocessor has (sm_90:
// 233,472). sm_86 and sm_89 have room for one (99 KB).
//
// Registers: two blocks of 256 threads leave 128 of 65,536 to each. A convolution holds 32 sums, 12
// registers of weights, 4 of input, and addresses; nvcc 13.0 takes 125. All 64 sums of segment 1
// at a time (four tiles of 8 pixels instead of twice two) would spare a second reading of its
// weights from shared memory, and spill.
//
// tests/ops/test_cuda_build.py holds the kernels to these lines:
// limits: walk_kernel 128 registers, 0 bytes spilled, 0 bytes static shared memory
// limits: cluster_kernel 160 registers, 0 bytes spilled, 0 bytes static shared memory
constexpr int kBlocksPerMultiprocessor = 2;

template <typename Format>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    walk_kernel(const __grid_constant__ Paths paths) {
  walk<Format>(paths);
}

// For few images: eight thread blocks, each alone on its multiprocessor, carry one.
//
// Shared memory, bytes: two activations, 71,872; a ring of weights for three convolutions, 16
// output channels of four slices or as much of fewer, 3 * 4 * (64 + 9 * 512) = 56,064; sums of four
// tiles slice by slice, 4 * 4 * 512 = 8,192; 136,128 in all, with decisions 136,136. Only sm_90 has
// clusters, and 232,448 for a thread block.
//
// Registers: could be 255. A convolution holds the weights of one slice, 36, in segment 2 of two,
// 72, and 4 or 8 sums; nvcc 13.0 takes 123.
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
bool launch_clusters(const Paths& paths, at::ScalarType dtype, int device, int multiprocessors,
                     cudaStream_t stream) {
  if (paths.num_paths * cluster::kBlocks > multiprocessors) return false;
  const Kernel kernel =
      dtype == at::kBFloat16 ? &cluster_kernel<Bfloat16> : &cluster_kernel<Float16>;
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

// At most as many thread blocks as run at once; each takes paths until there are none left. Fewer
// paths than clusters that run at once: a cluster each.
void launch_walk(Paths paths, at::ScalarType dtype, const at::TensorOptions& options) {
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  int device = 0, multiprocessors = 0, resident = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  if (launch_clusters(paths, dtype, device, multiprocessors, stream)) return;

  const Kernel kernel = dtype == at::kBFloat16 ? &walk_kernel<Bfloat16> : &walk_kernel<Float16>;
  const uint32_t bytes = shared_bytes(paths);
  allow_shared_memory(kernel, bytes);
  C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, bytes));
  TORCH_CHECK(resident > 0, "walk_half: a thread block needs ", bytes,
              " bytes of shared memory, more than this GPU has");
  const int64_t blocks =
      std::min(paths.num_paths, static_cast<int64_t>(resident) * multiprocessors);
  at::Tensor queue;
  if (paths.num_paths > blocks) {
    queue = at::empty({1}, options.dtype(at::kInt));
    paths.queue = queue.mutable_data_ptr<int32_t>();
    C10_CUDA_CHECK(cudaMemsetAsync(paths.queue, 0, sizeof(int), stream));
  }
  kernel<<<static_cast<unsigned>(blocks), kThreads, bytes, stream>>>(paths);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// The packed weights of a network, checked.
Network read_network(const char* name, const at::Tensor& weights, at::IntArrayRef layers,
                     int64_t num_classes, bool subsample, const at::Tensor& images) {
  TORCH_CHECK_VALUE(
      layers.size() == kSegments && *std::min_element(layers.begin(), layers.end()) > 0,
      "layers: expected at least one block in 3 segments, got ", layers);
  TORCH_CHECK_VALUE(num_classes > 0, "num_classes: expected at least 1, got ", num_classes);
  TORCH_CHECK_TYPE(weights.scalar_type() == at::kByte, name, ": expected dtype torch.uint8, got ",
                   weights.scalar_type());
  TORCH_CHECK_VALUE(weights.device() == images.device(), name, ": expected on ", images.device(),
                    ", got on ", weights.device());
  const int64_t classifier = (1 + 2 * layers[0]) * Layout<16>::kSliceBytes +
                             (4 * layers[1] - 1) * Layout<32>::kSliceBytes +
                             (8 * layers[2] - 2) * Layout<64>::kSliceBytes;
  const int64_t bytes = classifier + (1 + kFeatures) * num_classes * sizeof(float);
  TORCH_CHECK_VALUE(weights.dim() == 1 && weights.numel() == bytes && weights.is_contiguous(), name,
                    ": expected a vector of ", bytes, " packed bytes, got shape ", weights.sizes());
  const auto* data = weights.const_data_ptr<uint8_t>();
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(data) % 16 == 0, name,
                    ": expected memory aligned to 16 bytes");
  Network network{};
  network.weights = data;
  network.classifier = reinterpret_cast<const float*>(data + classifier);
  std::copy(layers.begin(), layers.end(), network.layers);
  network.num_classes = static_cast<int>(num_classes);
  network.subsample = subsample;
  return network;
}

int num_blocks(const Network& network) {
  return network.layers[0] + network.layers[1] + network.layers[2];
}

void check_images(const at::Tensor& images) {
  TORCH_CHECK_TYPE(images.scalar_type() == at::kBFloat16 || images.scalar_type() == at::kHalf,
                   "images: expected dtype torch.bfloat16 or torch.float16, got ",
                   images.scalar_type());
  TORCH_CHECK_VALUE(images.dim() == 4 && images.size(1) == kImageChannels &&
                        images.size(2) == kImageSize && images.size(3) == kImageSize,
                    "images: expected shape (B, 3, 32, 32), got ", images.sizes());
}

int64_t checked_paths(int64_t paths) {
  // Thread blocks number paths in an int, beyond the last one by their own number.
  TORCH_CHECK_VALUE(paths < std::numeric_limits<int>::max() / 2,
                    "images: expected fewer than 2^30 images and sets of decisions, got ", paths);
  return paths;
}

at::Tensor walk_half(const at::Tensor& images, const at::Tensor& decisions,
                     const at::Tensor& weights, at::IntArrayRef layers, int64_t num_classes,
                     bool subsample, const std::optional<at::Tensor>& order) {
  check_images(images);
  const c10::cuda::CUDAGuard guard(images.device());
  Paths paths{};
  paths.backbone = read_network("weights", weights, layers, num_classes, subsample, images);
  paths.num_blocks = num_blocks(paths.backbone);
  paths.num_images = images.size(0);
  TORCH_CHECK_TYPE(decisions.scalar_type() == at::kBool,
                   "decisions: expected dtype torch.bool, got ", decisions.scalar_type());
  TORCH_CHECK_VALUE((decisions.dim() == 2 || decisions.dim() == 3) &&
                        decisions.size(-2) == paths.num_images &&
                        decisions.size(-1) == paths.num_blocks,
                    "decisions: expected shape (B, K) or (S, B, K) with B = ", paths.num_images,
                    " and K = ", paths.num_blocks, ", got ", decisions.sizes());
  TORCH_CHECK_VALUE(decisions.device() == images.device(), "decisions: expected on ",
                    images.device(), ", got on ", decisions.device());
  paths.num_paths = checked_paths(decisions.numel() / paths.num_blocks);
  const at::Tensor contiguous_images = images.contiguous();
  const at::Tensor contiguous_decisions = decisions.contiguous();
  at::Tensor contiguous_order;
  if (order) {
    TORCH_CHECK_TYPE(order->scalar_type() == at::kInt, "order: expected dtype torch.int32, got ",
                     order->scalar_type());
    TORCH_CHECK_VALUE(order->dim() == 1 && order->numel() == paths.num_paths &&
                          order->device() == images.device(),
                      "order: expected a vector of ", paths.num_paths, " on ", images.device(),
                      ", got shape ", order->sizes(), " on ", order->device());
    contiguous_order = order->contiguous();
    paths.order = contiguous_order.const_data_ptr<int32_t>();
  }
  auto shape = decisions.sizes().vec();
  shape.back() = num_classes;
  at::Tensor logits = at::empty(shape, images.options().dtype(at::kFloat));
  if (paths.num_paths == 0) return logits;
  paths.images = static_cast<const uint16_t*>(contiguous_images.const_data_ptr());
  paths.given = contiguous_decisions.const_data_ptr<bool>();
  paths.logits = logits.mutable_data_ptr<float>();
  launch_walk(paths, images.scalar_type(), images.options());
  return logits;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> walk_half_policy(const at::Tensor& images,
                                                                const at::Tensor& weights,
                                                                at::IntArrayRef layers,
                                                                int64_t num_classes, bool subsample,
                                                                const at::Tensor& policy_weights,
                                                                at::IntArrayRef policy_layers) {
  check_images(images);
  const c10::cuda::CUDAGuard guard(images.device());
  Paths paths{};
  paths.backbone = read_network("weights", weights, layers, num_classes, subsample, images);
  paths.num_blocks = num_blocks(paths.backbone);
  paths.policy = read_network("policy_weights", policy_weights, policy_layers, paths.num_blocks,
                              /*subsample=*/false, images);
  paths.num_images = paths.num_paths = checked_paths(images.size(0));
  const at::Tensor contiguous_images = images.contiguous();
  const auto floats = images.options().dtype(at::kFloat);
  at::Tensor logits = at::empty({paths.num_images, num_classes}, floats);
  at::Tensor policy_logits = at::empty({paths.num_images, paths.num_blocks}, floats);
  at::Tensor decisions =
      at::empty({paths.num_images, paths.num_blocks}, images.options().dtype(at::kBool));
  if (paths.num_paths > 0) {
    paths.images = static_cast<const uint16_t*>(contiguous_images.const_data_ptr());
    paths.logits = logits.mutable_data_ptr<float>();
    paths.decisions = decisions.mutable_data_ptr<bool>();
    paths.policy_logits = policy_logits.mutable_data_ptr<float>();
    launch_walk(paths, images.scalar_type(), images.options());
  }
  return {logits, decisions, policy_logits};
}

}  // namespace
}  // namespace blockdrop::walk_half

TORCH_LIBRARY_IMPL(blockdrop_fast, CUDA, m) {
  m.impl("walk_half", &blockdrop::walk_half::walk_half);
  m.impl("walk_half_policy", &blockdrop::walk_half::walk_half_policy);
}
