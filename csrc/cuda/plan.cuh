// Device code of the CUDA plan; plan.cu has the kernel, and the tests run this on a CPU. Thread
// blocks know nothing of each other: all but the last list the active images of 32 residual blocks
// each, the last one orders the images. No result depends on the order in which threads run.

#pragma once

#include <cstdint>

#include "cuda/simt.cuh"

namespace blockdrop::plan {

using namespace simt;

struct Arguments {
  const bool* decisions;  // [B, K]
  int32_t* indices;       // [K, B]
  int32_t* counts;        // [K]
  int32_t* order;         // [B]
  int32_t* scratch;       // [2, B]
  int64_t batch, num_blocks;
};

constexpr int kWarps = 32;
constexpr int kThreads = kWarps * kLanes;
constexpr int kColumns = kLanes;  // residual blocks of a thread block: one a lane
constexpr int kDigitBits = 8;     // of a number of dropped blocks, sorted by at a time
constexpr int kBins = 1 << kDigitBits;

// Shared memory: an int a warp, and one of all warps, for each bin or column. Lanes meet different
// banks: with neighbouring bins, 33 ints apart, and with neighbouring columns.
constexpr uint32_t bin_at(int bin, int warp) { return 4 * (bin * (kWarps + 1) + warp); }
constexpr uint32_t column_at(int warp, int column) { return 4 * (warp * kColumns + column); }
constexpr uint32_t kSharedBytes = bin_at(kBins, 0);
static_assert(column_at(kWarps + 1, 0) <= kSharedBytes);

// Bit i: residual block `column` is active for image first_image + i. A warp reads 32 neighbouring
// bytes a load. No load has a condition, so that many are on their way at once: beyond the last
// image or block that one is read again.
BLOCKDROP_DEVICE uint32_t active_word(const Arguments& a, int64_t first_image, int64_t column) {
  if (first_image >= a.batch) return 0;
  const int64_t left = a.batch - first_image;
  const uint32_t last = left < kLanes ? static_cast<uint32_t>(left) - 1 : kLanes - 1;
  const bool* first = a.decisions + first_image * a.num_blocks +
                      (column < a.num_blocks ? column : a.num_blocks - 1);
  bool active[kLanes];
#pragma unroll
  for (uint32_t i = 0; i < kLanes; ++i) {
    const uint64_t image = i < last ? i : last;  // 32 bits, so that the address is one instruction
    active[i] = first[image * static_cast<uint32_t>(a.num_blocks)];
  }
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) word |= uint32_t{active[i]} << i;
  return column < a.num_blocks ? word & ~0u >> (kLanes - 1 - last) : 0;
}

// Bit i of lane j's word becomes bit j of lane i's.
BLOCKDROP_DEVICE uint32_t transpose(uint32_t word, int lane) {
  uint32_t low = 0x0000ffff;  // the bits that a lane without `distance` in its number keeps
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2, low ^= low << distance) {
    const uint32_t other = shuffle(word, lane ^ distance);
    word = lane & distance ? (word & ~low) | (other >> distance & low)
                           : (word & low) | (other << distance & ~low);
  }
  return word;
}

// Lists the active images of residual blocks [first_column, first_column + 32), 1024 images a step.
BLOCKDROP_DEVICE void list_active_images(const Arguments& a, int64_t first_column) {
  const int warp = warp_index(), lane = lane_index();
  int32_t active = 0;  // warp 0: images so far for which the lane's residual block is active
  for (int64_t step_image = 0; step_image < a.batch; step_image += kThreads) {
    const int64_t first_image = step_image + warp * kLanes;
    const uint32_t word = active_word(a, first_image, first_column + lane);
    store_shared<int32_t>(column_at(warp, lane), popcount(word));
    sync_threads();
    if (warp == 0) {  // each warp's counts become the places of its first images
#pragma unroll
      for (int other = 0; other < kWarps; ++other) {
        const int32_t own = load_shared<int32_t>(column_at(other, lane));
        store_shared<int32_t>(column_at(other, lane), active);
        active += own;
      }
    }
    sync_threads();
    // Lane i now stands for image first_image + i, so that a warp's stores are contiguous.
    for (int c = 0; c < kColumns && first_column + c < a.num_blocks; ++c) {
      const uint32_t column_word = shuffle(word, c);
      if (column_word >> lane & 1u) {
        const int64_t place =
            load_shared<int32_t>(column_at(warp, c)) + popcount(column_word & ((1u << lane) - 1));
        a.indices[(first_column + c) * a.batch + place] = static_cast<int32_t>(first_image + lane);
      }
    }
    sync_threads();  // before the next step overwrites the counts
  }

  // Warp w finishes column w: its count and its unused tail.
  if (warp == 0) store_shared<int32_t>(column_at(kWarps, lane), active);
  sync_threads();
  const int64_t column = first_column + warp;
  if (column >= a.num_blocks) return;
  const int32_t count = load_shared<int32_t>(column_at(kWarps, warp));
  if (lane == 0) a.counts[column] = count;
  for (int64_t place = count + lane; place < a.batch; place += kLanes) {
    a.indices[column * a.batch + place] = -1;
  }
}

// Orders the images by descending usage, equal ones ascending: a radix sort by the number of
// dropped blocks, one pass for up to 255 of them. Each warp has a run of places, takes them 32 at a
// time, and counts in bins of its own: warps meet at barriers only.
//
// For B = 1024, K = 54, sm_90a: counting is 540 instructions a warp, 8 warps a scheduler, with 32
// loads of each under way; sorting mostly waits at barriers. NOTES.md has the prediction.
BLOCKDROP_DEVICE void order_by_usage(const Arguments& a) {
  const int warp = warp_index(), lane = lane_index(), thread = thread_index();
  const int64_t run = (a.batch + kThreads - 1) / kThreads * kLanes;
  const int64_t first = warp * run, end = first + run < a.batch ? first + run : a.batch;
  int32_t* dropped = a.scratch;  // blocks of each image
  for (int64_t image = first; image < end; image += kLanes) {
    int32_t kept = 0;
    for (int64_t column = 0; column < a.num_blocks; column += kLanes) {
      kept += popcount(transpose(active_word(a, image, column + lane), lane));
    }
    if (image + lane < end) dropped[image + lane] = static_cast<int32_t>(a.num_blocks) - kept;
  }

  for (int shift = 0; shift == 0 || a.num_blocks >> shift != 0; shift += kDigitBits) {
    const int32_t* from = a.scratch + a.batch;  // filled by the first of two passes
    const bool is_last = a.num_blocks >> shift < kBins;
    int32_t* to = is_last ? a.order : a.scratch + a.batch;
    const int bins = is_last ? static_cast<int>(a.num_blocks >> shift) + 1 : kBins;
    // Moves each image to the place that its bin of this warp has, which then is one further on.
    const auto for_images = [&](bool move) {
      for (int64_t place = first + lane; place - lane < end; place += kLanes) {
        const bool is_image = place < end;
        const auto image = is_image && shift ? from[place] : static_cast<int32_t>(place);
        const int bin = is_image ? dropped[image] >> shift & (kBins - 1) : 0;
        unsigned peers = ballot(is_image);  // becomes: the lanes with the same bin
#pragma unroll
        for (int bit = 0; bit < kDigitBits; ++bit) {
          const unsigned votes = ballot(bin >> bit & 1);
          peers &= bin >> bit & 1 ? votes : ~votes;
        }
        const int rank = popcount(peers & ((1u << lane) - 1));
        const int32_t target = load_shared<int32_t>(bin_at(bin, warp)) + rank;
        if (move && is_image) to[target] = image;
        sync_warp();  // all lanes have read their targets
        if (is_image && rank == 0) {
          store_shared<int32_t>(bin_at(bin, warp), target + popcount(peers));
        }
        sync_warp();
      }
      sync_threads();
    };

#pragma unroll 1
    for (int i = thread; i < bins * (kWarps + 1); i += kThreads) store_shared<int32_t>(4 * i, 0);
    sync_threads();
    for_images(false);
    // A thread has a bin: counts become places, behind all of lower bins and of lower warps.
    int32_t count = 0, next = 0;
    if (thread < bins) {
#pragma unroll
      for (int i = 0; i < kWarps; ++i) count += load_shared<int32_t>(bin_at(thread, i));
      store_shared<int32_t>(bin_at(thread, kWarps), count);
    }
    sync_threads();
    if (thread < bins) {
#pragma unroll 8
      for (int bin = 0; bin < thread; ++bin) next += load_shared<int32_t>(bin_at(bin, kWarps));
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        count = load_shared<int32_t>(bin_at(thread, i));
        store_shared<int32_t>(bin_at(thread, i), next);
        next += count;
      }
    }
    sync_threads();
    for_images(true);
  }
}

BLOCKDROP_DEVICE void plan(const Arguments& a) {
  if (block_index() + 1 == num_thread_blocks()) return order_by_usage(a);
  list_active_images(a, static_cast<int64_t>(block_index()) * kColumns);
}

}  // namespace blockdrop::plan
