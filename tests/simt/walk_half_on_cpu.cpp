// The CUDA walk as a library for a CPU: the kernel's own device code over tests/simt.
// tests/ops/test_walk_half.py compiles it and calls it.

#include <cstdint>

#include "cuda/walk_half.cuh"
#include "cuda/walk_half_cluster.cuh"

namespace simt = blockdrop::simt;
using namespace blockdrop::walk_half;

extern "C" {

// Pointers as in Paths.
struct Call {
  const uint16_t* images;
  const bool* given;
  const int* order;
  int64_t num_images, num_paths;
  int64_t num_blocks;
  const unsigned char* weights[2];  // backbone, policy network
  int64_t layers[2][3];
  int64_t num_classes[2];
  int64_t subsample[2];
  float* logits;
  bool* decisions;
  float* policy_logits;
};

// `thread_blocks` 0: a cluster a path.
void run_walk(const Call* call, int thread_blocks, int bfloat16) {
  int queue = 0;
  Paths paths{};
  paths.images = call->images;
  paths.given = call->given;
  paths.order = call->order;
  paths.queue = &queue;
  paths.num_images = call->num_images;
  paths.num_paths = call->num_paths;
  paths.ring = simt::kHasStmatrix ? 4 : 2;  // as on sm_90 or sm_80
  paths.num_blocks = static_cast<int>(call->num_blocks);
  for (int i = 0; i < 2; ++i) {
    Network& network = i == 0 ? paths.backbone : paths.policy;
    network = read_network(call->weights[i], call->layers[i], call->num_classes[i],
                           call->subsample[i] != 0);
  }
  paths.logits = call->logits;
  paths.decisions = call->decisions;
  paths.policy_logits = call->policy_logits;
  if (thread_blocks == 0) {
    const auto kernel = bfloat16 ? cluster::walk<simt::Bfloat16> : cluster::walk<simt::Float16>;
    const int blocks = static_cast<int>(call->num_paths) * cluster::kBlocks;
    simt::machine::launch(
        blocks, kThreads, cluster::kSharedBytes, [&] { kernel(paths); }, cluster::kBlocks);
  } else {
    const auto kernel = bfloat16 ? walk<simt::Bfloat16> : walk<simt::Float16>;
    simt::machine::launch(thread_blocks, kThreads, shared_bytes(paths.ring),
                          [&] { kernel(paths); });
  }
}

// Of the last run: 8x8 matrices loaded and stored, and their bank conflicts.
void count_matrices(int64_t* matrices, int64_t* conflicts) {
  *matrices = simt::machine::state.matrices;
  *conflicts = simt::machine::state.conflicts;
}

}  // extern "C"
