// Kernels with one fault each, that the shim has to find; the argument names the fault.

#include <cstdio>
#include <string>

#include "cuda/simt.cuh"

using namespace blockdrop::simt;

namespace {

constexpr int kThreads = 64;  // two warps
alignas(16) const uint32_t kSource[4] = {1, 2, 3, 4};

void kernel(const std::string& fault) {
  const bool first_warp = warp_index() == 0;
  const uint32_t own = thread_index() * 4;
  const uint32_t other = (thread_index() + kLanes) % kThreads * 4;
  store_shared<uint32_t>(own, thread_index());
  if (fault != "read-without-barrier") sync_threads();
  const uint32_t value = load_shared<uint32_t>(other);
  if (fault != "write-without-barrier") sync_threads();
  store_shared<uint32_t>(own, value);
  sync_threads();
  if (first_warp || fault == "two-writers") store_shared<uint32_t>(0, 1);
  sync_threads();
  if (fault == "out-of-bounds") load_shared<uint32_t>(kThreads * 4);
  if (fault == "misaligned") load_shared<uint32_t>(2);
  if (thread_index() == 0) {
    copy_async(0, kSource);
    if (fault != "copy-not-awaited") wait_for_copies();
  }
  sync_threads();
  if (load_shared<uint32_t>(4) != kSource[1]) {
    std::fprintf(stderr, "read NaN\n");
    std::exit(1);
  }
}

// Two thread blocks: each writes to the other, waits, reads, and writes again.
void cluster_kernel(const std::string& fault) {
  const int other_rank = 1 - cluster_rank();
  const uint32_t own = thread_index() * 16;
  const uint4 value = {1, 2, 3, static_cast<uint32_t>(thread_index())};
  const auto barrier = [&](const char* left_out) {
    // A barrier of the block alone does not do.
    if (fault == left_out) return sync_threads();
    cluster_arrive();
    cluster_wait();
  };
  barrier("write-before-begin");
  if (fault == "no-such-block") store_cluster(2, own, value);
  store_cluster(other_rank, own, value);
  if (fault == "arrives-twice") cluster_arrive();
  barrier("remote-read-without-barrier");
  if (load_shared<uint4>(own).w != value.w) std::exit(1);
  if (fault == "write-before-waiting") {
    cluster_arrive();
    store_cluster(other_rank, own, value);
    cluster_wait();
  }
  barrier("remote-write-without-barrier");
  store_cluster(other_rank, own, value);
  barrier("exit-too-early");
}

}  // namespace

int main(int count, char** arguments) {
  const std::string fault = count > 1 ? arguments[1] : "none";
  machine::launch(1, kThreads, kThreads * 4, [&] { kernel(fault); });
  machine::launch(2, kThreads, kThreads * 16, [&] { cluster_kernel(fault); }, 2);
}
