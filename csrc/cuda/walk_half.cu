// CUDA kernels of `blockdrop_fast::walk_half` and `walk_half_policy`: images to logits in one
// launch. Schemas, references and the layout of packed weights: blockdrop_fast/ops/walk_half.py.
// Here are their checks and outputs; the launch is in walk_half_launch.cu, the device code in
// walk_half.cuh.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

#include "cuda/walk_half.h"
#include "walk_network.h"

namespace blockdrop::walk_half {
namespace {

// A network, checked.
Network checked_network(const char* name, const at::Tensor& weights, at::IntArrayRef layers,
                        int64_t num_classes, bool subsample, const at::Tensor& images) {
  TORCH_CHECK_TYPE(weights.scalar_type() == at::kByte, name, ": expected dtype torch.uint8, got ",
                   weights.scalar_type());
  TORCH_CHECK_VALUE(weights.device() == images.device(), name, ": expected on ", images.device(),
                    ", got on ", weights.device());
  check_network(layers, num_classes);
  TORCH_CHECK_VALUE(c10::sum_integers(layers) <= kMostBlocks, name, ": expected at most ",
                    kMostBlocks, " blocks, got ", c10::sum_integers(layers));
  const auto* data = weights.const_data_ptr<uint8_t>();
  const Network network = read_network(data, layers.data(), num_classes, subsample);
  check_length(name, weights, packed_bytes(network), "packed bytes");
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(data) % 16 == 0, name,
                    ": expected memory aligned to 16 bytes");
  return network;
}

void check_half_images(const at::Tensor& images) {
  TORCH_CHECK_TYPE(images.scalar_type() == at::kBFloat16 || images.scalar_type() == at::kHalf,
                   "images: expected dtype torch.bfloat16 or torch.float16, got ",
                   images.scalar_type());
  check_images(images);
  TORCH_CHECK_VALUE(images.size(2) == kImageSize && images.size(3) == kImageSize,
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
  check_half_images(images);
  const c10::cuda::CUDAGuard guard(images.device());
  Paths paths{};
  paths.backbone = checked_network("weights", weights, layers, num_classes, subsample, images);
  paths.num_blocks = num_blocks_of(paths.backbone);
  paths.num_images = images.size(0);
  check_decisions(decisions, paths.num_images, paths.num_blocks);
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
  launch_walk(paths, images.scalar_type() == at::kBFloat16);
  return logits;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> walk_half_policy(const at::Tensor& images,
                                                                const at::Tensor& weights,
                                                                at::IntArrayRef layers,
                                                                int64_t num_classes, bool subsample,
                                                                const at::Tensor& policy_weights,
                                                                at::IntArrayRef policy_layers) {
  check_half_images(images);
  const c10::cuda::CUDAGuard guard(images.device());
  Paths paths{};
  paths.backbone = checked_network("weights", weights, layers, num_classes, subsample, images);
  paths.num_blocks = num_blocks_of(paths.backbone);
  paths.policy = checked_network("policy_weights", policy_weights, policy_layers, paths.num_blocks,
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
    launch_walk(paths, images.scalar_type() == at::kBFloat16);
  }
  return {logits, decisions, policy_logits};
}

}  // namespace
}  // namespace blockdrop::walk_half

TORCH_LIBRARY_IMPL(blockdrop_fast, CUDA, m) {
  m.impl("walk_half", &blockdrop::walk_half::walk_half);
  m.impl("walk_half_policy", &blockdrop::walk_half::walk_half_policy);
}
