// CPU kernels of `blockdrop_fast::walk` and `walk_policy`; schemas and references:
// blockdrop_fast/ops/walk.py. Here are the operators and the program of an image whose decisions
// are known. What it is made of is in walk_program.h, who runs it in walk_queue.h, the arithmetic
// in walk_kernels.h.

#include "cpu/walk.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ge.h>
#include <torch/library.h>

#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

#include "cpu/walk_arguments.h"
#include "cpu/walk_paths.h"
#include "cpu/walk_program.h"
#include "walk_network.h"

namespace blockdrop::walk {
namespace {

// The paths of one image, in order of running.
class PathProgram {
 public:
  PathProgram(Walker& walker,
              const Path* paths,  // [num_sets]
              int num_sets, float* logits)
      : walker_(walker), paths_(paths), num_sets_(num_sets), logits_(logits) {}

  void run() {
    const Walk& walk = walker_.walk;
    const int num_classes = walk.network.num_classes;
    walker_.begin();
    for (int i = 0; i < num_sets_; ++i) {
      const int fork = paths_[i].fork;
      if (i > 0) copy(walker_.buffers.spare[i - 1], x_before(fork), fork);
      run_blocks(i);
      const int64_t row = int64_t{paths_[i].set} * walk.images.batch + walker_.image;
      walker_.classify(logits_ + row * num_classes);
    }
  }

 private:
  // The blocks of path `i` from its fork on.
  void run_blocks(int i) {
    const int num_blocks = walker_.walk.network.num_blocks;
    for (int block = paths_[i].fork; block < num_blocks; ++block) {
      save_for_forks(i, block);
      walker_.run_block(block, paths_[i].keep[block]);
    }
    save_for_forks(i, num_blocks);
  }

  // Keeps the activations before `block` for the paths that part from path `i` there.
  void save_for_forks(int i, int block) {
    for (int j = i + 1; j < num_sets_; ++j) {
      if (paths_[j].source == i && paths_[j].fork == block) {
        copy(x_before(block), walker_.buffers.spare[j - 1], block);
      }
    }
  }

  float* x_before(int block) const {
    return walker_.buffers.x[walker_.walk.network.segment_before(block)];
  }

  void copy(const float* from, float* to, int block) {
    const Walk& walk = walker_.walk;
    const int64_t size = walk.activation_size(walk.network.segment_before(block));
    walker_.step([&] { std::memcpy(to, from, size * sizeof(float)); });
  }

  Walker& walker_;
  const Path* const paths_;
  const int num_sets_;
  float* const logits_;  // [num_sets, batch, num_classes]
};

// decisions: [S, B, K] contiguous -> logits [S, B, num_classes]
at::Tensor run_network(const Network& network, const Images& images, const at::Tensor& decisions) {
  const int num_sets = static_cast<int>(decisions.size(0));
  at::Tensor logits = at::empty({num_sets, images.batch, network.num_classes}, at::kFloat);
  if (logits.numel() == 0) return logits;
  const std::vector<Path> paths =
      order_paths(decisions.const_data_ptr<bool>(), num_sets, images.batch, network.num_blocks);
  float* data = logits.mutable_data_ptr<float>();
  // Input and stem; for each path restoring, two a block, classifier, and at most one copy for
  // each other path.
  const int64_t max_steps = 2 + int64_t{num_sets} * (2 * network.num_blocks + 2 + num_sets);
  Walk walk(choose_kernels(), network, images, num_sets - 1, network.padded_classes);
  walk.run(order_images(paths, num_sets, images.batch, network.num_blocks), max_steps,
           [&](Walker& walker) {
             const Path* own = &paths[static_cast<size_t>(walker.image) * num_sets];
             PathProgram(walker, own, num_sets, data).run();
           });
  return logits;
}

at::Tensor walk(const at::Tensor& images, const at::Tensor& decisions, const at::Tensor& weights,
                at::IntArrayRef layers, int64_t num_classes, bool subsample) {
  const Network network = read_network("weights", weights, layers, num_classes, subsample);
  const Images batch = read_images(images, kSizeMultiple);
  check_decisions(decisions, batch.batch, network.num_blocks);
  const at::Tensor contiguous = decisions.contiguous();
  if (decisions.dim() == 3) return run_network(network, batch, contiguous);
  return run_network(network, batch, contiguous.unsqueeze(0)).squeeze(0);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> walk_policy(const at::Tensor& images,
                                                           const at::Tensor& weights,
                                                           at::IntArrayRef layers,
                                                           int64_t num_classes, bool subsample,
                                                           const at::Tensor& policy_weights,
                                                           at::IntArrayRef policy_layers) {
  const Network network = read_network("weights", weights, layers, num_classes, subsample);
  const Network policy =
      read_network("policy_weights", policy_weights, policy_layers, network.num_blocks, false);
  const Images batch = read_images(images, kSizeMultiple);
  at::Tensor all_blocks = at::empty({1, batch.batch, policy.num_blocks}, at::kBool);
  all_blocks.fill_(true);
  const at::Tensor policy_logits = run_network(policy, batch, all_blocks).squeeze(0);
  const at::Tensor decisions = at::ge(policy_logits, 0);
  return {run_network(network, batch, decisions.unsqueeze(0)).squeeze(0), decisions, policy_logits};
}

}  // namespace
}  // namespace blockdrop::walk

TORCH_LIBRARY_IMPL(blockdrop_fast, CPU, m) {
  m.impl("walk", &blockdrop::walk::walk);
  m.impl("walk_policy", &blockdrop::walk::walk_policy);
}
