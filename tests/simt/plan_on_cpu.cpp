// The CUDA plan as a library for a CPU: the kernel's own device code over tests/simt.
// tests/ops/test_plan.py compiles it and calls it.

#include "cuda/plan.cuh"

extern "C" void run_plan(const bool* decisions, int* indices, int* counts, int* order, int* scratch,
                         int64_t batch, int64_t num_blocks) {
  using namespace blockdrop::plan;
  const Arguments arguments{decisions, indices, counts, order, scratch, batch, num_blocks};
  const auto thread_blocks = static_cast<int>((num_blocks + kColumns - 1) / kColumns) + 1;
  machine::launch(thread_blocks, kThreads, kSharedBytes, [&] { plan(arguments); });
}
