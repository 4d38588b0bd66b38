// CPU kernel of `blockdrop_fast::plan`; schema and reference: blockdrop_fast/ops/plan.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "plan.h"

namespace blockdrop::plan {
namespace {

// Decisions that one task looks at, at least: below it, waking another thread costs more.
constexpr int64_t kGrain = 32768;

// Lists the active images of blocks [block_begin, block_end). Image by image, because decisions
// are contiguous in that direction; every block has its own cursor into its row.
void list_active_images(const bool* decisions,  // [B, K]
                        int32_t* indices,       // [K, B]
                        int32_t* counts,        // [K]
                        int64_t batch, int64_t num_blocks, int64_t block_begin, int64_t block_end) {
  std::fill(counts + block_begin, counts + block_end, 0);
  for (int64_t image = 0; image < batch; ++image) {
    const bool* kept = decisions + image * num_blocks;
    for (int64_t block = block_begin; block < block_end; ++block) {
      if (kept[block]) {
        indices[block * batch + counts[block]++] = static_cast<int32_t>(image);
      }
    }
  }
  for (int64_t block = block_begin; block < block_end; ++block) {
    std::fill(indices + block * batch + counts[block], indices + (block + 1) * batch, -1);
  }
}

// Counting sort by descending usage; going through the images in ascending order makes it stable.
void order_by_usage(const int32_t* usage,  // [B], each in [0, num_blocks]
                    int32_t* order,        // [B]
                    int64_t batch, int64_t num_blocks) {
  // next[u]: where the next image of usage u goes.
  std::vector<int64_t> next(num_blocks + 1, 0);
  for (int64_t image = 0; image < batch; ++image) {
    ++next[usage[image]];
  }
  int64_t begin = 0;
  for (int64_t u = num_blocks; u >= 0; --u) {
    begin += std::exchange(next[u], begin);
  }
  for (int64_t image = 0; image < batch; ++image) {
    order[next[usage[image]]++] = static_cast<int32_t>(image);
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> plan_cpu(const at::Tensor& decisions) {
  Plan plan = empty_plan(decisions);
  const int64_t batch = decisions.size(0);
  const int64_t num_blocks = decisions.size(1);
  const at::Tensor contiguous = decisions.contiguous();
  const bool* decisions_data = contiguous.const_data_ptr<bool>();
  int32_t* indices = plan.indices.mutable_data_ptr<int32_t>();
  int32_t* counts = plan.counts.mutable_data_ptr<int32_t>();

  const int64_t blocks_per_task = 1 + kGrain / std::max<int64_t>(batch, 1);
  at::parallel_for(0, num_blocks, blocks_per_task, [&](int64_t begin, int64_t end) {
    list_active_images(decisions_data, indices, counts, batch, num_blocks, begin, end);
  });

  std::vector<int32_t> usage(batch);
  const int64_t images_per_task = 1 + kGrain / std::max<int64_t>(num_blocks, 1);
  at::parallel_for(0, batch, images_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      const bool* kept = decisions_data + image * num_blocks;
      usage[image] = static_cast<int32_t>(std::count(kept, kept + num_blocks, true));
    }
  });
  order_by_usage(usage.data(), plan.order.mutable_data_ptr<int32_t>(), batch, num_blocks);
  return {plan.indices, plan.counts, plan.order};
}

}  // namespace
}  // namespace blockdrop::plan

TORCH_LIBRARY_IMPL(blockdrop_fast, CPU, m) { m.impl("plan", &blockdrop::plan::plan_cpu); }
