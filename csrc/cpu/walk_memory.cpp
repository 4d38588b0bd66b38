#include "cpu/walk_memory.h"

#include <ATen/Context.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace blockdrop::walk {
namespace {

constexpr std::size_t kLargePage = std::size_t{2} << 20;  // bytes

// What no call uses at the moment.
struct Pool {
  std::mutex mutex;
  std::vector<CallMemory::Block> blocks;
};

Pool& pool() {
  static Pool* const kept = new Pool;  // never destroyed: threads may outlive static objects
  return *kept;
}

CallMemory::Block take(std::ptrdiff_t floats) {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  std::vector<CallMemory::Block>& blocks = pool().blocks;
  const auto largest = std::max_element(blocks.begin(), blocks.end(),
                                        [](auto& a, auto& b) { return a.floats < b.floats; });
  if (largest == blocks.end()) return {nullptr, 0};
  const CallMemory::Block block = *largest;
  blocks.erase(largest);
  if (block.floats >= floats) return block;
  std::free(block.data);  // the larger one takes its place
  return {nullptr, 0};
}

CallMemory::Block allocate(std::ptrdiff_t floats) {
  const std::size_t wanted = static_cast<std::size_t>(floats) * sizeof(float);
  const std::size_t bytes = (wanted + kLargePage - 1) / kLargePage * kLargePage;
  void* data = std::aligned_alloc(kLargePage, bytes);
  if (!data) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  madvise(data, bytes, MADV_HUGEPAGE);  // advice, that the system need not take
#endif
  return {static_cast<float*>(data), static_cast<std::ptrdiff_t>(bytes / sizeof(float))};
}

}  // namespace

CallMemory::CallMemory(std::ptrdiff_t floats) : block_(take(floats)) {
  if (!block_.data) block_ = allocate(floats);
  // As torch does with a tensor's (torch.utils.deterministic).
  if (at::globalContext().deterministicAlgorithms() &&
      at::globalContext().deterministicFillUninitializedMemory()) {
    std::fill_n(block_.data, floats, std::numeric_limits<float>::quiet_NaN());
  }
}

CallMemory::~CallMemory() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  pool().blocks.push_back(block_);
}

}  // namespace blockdrop::walk
