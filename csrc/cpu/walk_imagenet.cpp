// CPU kernels of `blockdrop_fast::walk_imagenet` and `walk_imagenet_policy`; schemas and
// references: blockdrop_fast/ops/walk_imagenet.py. Here are the operators and the program of a
// group of images whose decisions are known. What it is made of is in walk_imagenet_program.h, who
// runs it in walk_queue.h, the arithmetic in walk_imagenet_kernels.h.

#include "cpu/walk_imagenet.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ge.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "cpu/walk_arguments.h"
#include "cpu/walk_imagenet_network.h"
#include "cpu/walk_imagenet_program.h"
#include "cpu/walk_isa.h"
#include "cpu/walk_paths.h"
#include "walk_network.h"

namespace blockdrop::walk_imagenet {
namespace {

const Kernels& choose_kernels() {
  switch (walk::choose_isa()) {
#ifdef BLOCKDROP_HAVE_AVX512
    case walk::Isa::kAvx512:
      return *avx512_kernels();
#endif
#ifdef BLOCKDROP_HAVE_AVX2
    case walk::Isa::kAvx2:
      return *avx2_kernels();
#endif
    default:
      return *portable_kernels();
  }
}

// The paths of a group, in order of running.
class PathProgram {
 public:
  PathProgram(Walker& walker,
              const walk::Path* paths,  // [num_sets], of every image of the group
              int num_sets, float* logits)
      : walker_(walker), paths_(paths), num_sets_(num_sets), logits_(logits) {}

  void run() {
    walker_.begin();
    for (int i = 0; i < num_sets_; ++i) {
      if (i > 0) {
        const int fork = paths_[i].fork;
        walker_.copy(walker_.buffers.spare[i - 1], x_before(fork), fork);
      }
      run_path(i);
    }
  }

 private:
  // Path `i` from its fork on.
  void run_path(int i) {
    const walk::Path& path = paths_[i];
    const int num_blocks = walker_.walk.network.num_blocks;
    std::vector<size_t> ends;  // of each block's layers
    layers_.clear();
    for (int block = path.fork; block < num_blocks; ++block) {
      walker_.add_block(block, path.keep[block], layers_);
      ends.push_back(layers_.size());
    }
    walker_.add_classifier(layers_);

    size_t layer = 0;
    for (int block = path.fork; block < num_blocks; ++block) {
      save_for_forks(i, block);
      for (; layer < ends[block - path.fork]; ++layer) run_layer(layer);
    }
    save_for_forks(i, num_blocks);
    walker_.average();
    run_layer(layer);
    store_logits(path.set);
  }

  void run_layer(size_t layer) {
    walker_.run(layers_[layer], layer + 1 < layers_.size() ? &layers_[layer + 1] : nullptr);
  }

  // Keeps the activations before `block` for the paths that part from path `i` there.
  void save_for_forks(int i, int block) {
    for (int j = i + 1; j < num_sets_; ++j) {
      if (paths_[j].source == i && paths_[j].fork == block) {
        walker_.copy(x_before(block), walker_.buffers.spare[j - 1], block);
      }
    }
  }

  float* x_before(int block) { return walker_.buffers.x[walker_.walk.x_before(block)]; }

  void store_logits(int set) {
    const int64_t num_classes = walker_.walk.network.num_classes;
    std::vector<float*> rows;
    for (int i = 0; i < walker_.num_images; ++i) {
      const int64_t row = int64_t{set} * walker_.walk.images.batch + walker_.images[i];
      rows.push_back(logits_ + row * num_classes);
    }
    walker_.store_logits(rows);
  }

  Walker& walker_;
  const walk::Path* const paths_;
  const int num_sets_;
  float* const logits_;  // [num_sets, batch, num_classes]
  std::vector<Layer> layers_;
};

// Input, stem; for each path restoring, at most four layers a block, mean, classifier, logits, and
// at most one copy for each other path.
int64_t max_steps(const Network& network, int num_sets) {
  return 2 + int64_t{num_sets} * (1 + 4 * int64_t{network.num_blocks} + 3 + num_sets);
}

// decisions: [S, B, K] contiguous -> logits [S, B, num_classes]
at::Tensor run_network(const Network& network, const walk::Images& images, int pool,
                       const at::Tensor& decisions) {
  const int num_sets = static_cast<int>(decisions.size(0));
  at::Tensor logits = at::empty({num_sets, images.batch, network.num_classes}, at::kFloat);
  if (logits.numel() == 0) return logits;
  const bool* keep = decisions.const_data_ptr<bool>();
  const std::vector<walk::Path> paths =
      walk::order_paths(keep, num_sets, images.batch, network.num_blocks);
  const bool complete =
      num_sets == 1 && std::all_of(keep, keep + decisions.numel(), [](bool one) { return one; });
  float* data = logits.mutable_data_ptr<float>();
  Walk(choose_kernels(), network, images, pool, complete, num_sets - 1)
      .run(walk::order_images(paths, num_sets, images.batch, network.num_blocks),
           max_steps(network, num_sets), [&](Walker& walker) {
             const walk::Path* first = &paths[static_cast<size_t>(walker.images[0]) * num_sets];
             PathProgram(walker, first, num_sets, data).run();
           });
  return logits;
}

walk::Images read_images(const at::Tensor& images) { return walk::read_images(images, 1); }

at::Tensor walk_imagenet(const at::Tensor& images, const at::Tensor& decisions,
                         const at::Tensor& weights, bool bottleneck, at::IntArrayRef layers,
                         at::IntArrayRef channels, at::IntArrayRef widths, int64_t num_classes,
                         int64_t winograd) {
  const Network network = read_network(
      "weights", {weights, bottleneck, layers, channels, widths, num_classes, winograd});
  const walk::Images batch = read_images(images);
  check_decisions(decisions, batch.batch, network.num_blocks);
  const at::Tensor contiguous = decisions.contiguous();
  if (decisions.dim() == 3) return run_network(network, batch, 1, contiguous);
  return run_network(network, batch, 1, contiguous.unsqueeze(0)).squeeze(0);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> walk_imagenet_policy(
    const at::Tensor& images, const at::Tensor& weights, bool bottleneck, at::IntArrayRef layers,
    at::IntArrayRef channels, at::IntArrayRef widths, int64_t num_classes, int64_t winograd,
    const at::Tensor& policy_weights, bool policy_bottleneck, at::IntArrayRef policy_layers,
    at::IntArrayRef policy_channels, at::IntArrayRef policy_widths, int64_t policy_winograd,
    int64_t pool) {
  const Network network = read_network(
      "weights", {weights, bottleneck, layers, channels, widths, num_classes, winograd});
  const Network policy = read_network(
      "policy_weights", {policy_weights, policy_bottleneck, policy_layers, policy_channels,
                         policy_widths, network.num_blocks, policy_winograd});
  const walk::Images batch = read_images(images);
  TORCH_CHECK_VALUE(pool >= 1 && pool <= std::min(batch.height, batch.width),
                    "pool: expected 1 to the images' size, got ", pool, " for ", batch.height, "x",
                    batch.width);
  at::Tensor all_blocks = at::empty({1, batch.batch, policy.num_blocks}, at::kBool);
  all_blocks.fill_(true);
  const at::Tensor policy_logits =
      run_network(policy, batch, static_cast<int>(pool), all_blocks).squeeze(0);
  const at::Tensor decisions = at::ge(policy_logits, 0);
  return {run_network(network, batch, 1, decisions.unsqueeze(0)).squeeze(0), decisions,
          policy_logits};
}

}  // namespace
}  // namespace blockdrop::walk_imagenet

TORCH_LIBRARY_IMPL(blockdrop_fast, CPU, m) {
  m.impl("walk_imagenet", &blockdrop::walk_imagenet::walk_imagenet);
  m.impl("walk_imagenet_policy", &blockdrop::walk_imagenet::walk_imagenet_policy);
}
