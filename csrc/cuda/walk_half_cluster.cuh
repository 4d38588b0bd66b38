// Device code of the CUDA walk for small batches: a cluster of eight thread blocks carries one
// image, so that its time is not one multiprocessor's. The blocks divide every convolution and
// store what others need of their results to the others' shared memory. Activations, weights and
// the order of sums are those of walk_half.cuh, and so are the logits, bit for bit.
//
// Each block has room for all of an activation, and what it needs of it is in its place there.
// Everything but convolutions (shortcuts, pooling) every block computes for itself, on rows that
// it lacks too; nobody looks at those.

#pragma once

#include "cuda/walk_half.cuh"

namespace blockdrop::walk_half::cluster {

constexpr int kBlocks = 8;
constexpr int kBuffers = 3;  // of weights: one is used, two are on their way

// ------------------------------------------------------------------ who computes what

// Rows of the output are divided into bands; where there are fewer bands than blocks, the blocks of
// a band divide its output channels.
template <int kOut>
struct Share {
  using Out = Layout<kOut>;
  // Of a block:
  static constexpr int kBands = kOut == kFeatures ? 2 : kBlocks;
  static constexpr int kBandRows = Out::kSize / kBands;
  static constexpr int kBandBlocks = kBlocks / kBands;
  static constexpr int kBlockTiles = Out::kChannelTiles / kBandBlocks;  // of output channels
  // Of a warp: 16 channels of 8 pixels in kRows rows. In segment 3 half of the warps have nothing.
  static constexpr int kRows = kOut == kTile ? 2 : 1;
  static constexpr int kBusyWarps = kBlockTiles * Out::kPixelTiles * kBandRows / kRows;
  static_assert(kBusyWarps <= kWarps);

  int part;          // which of the block's tiles of output channels,
  int channel_tile;  // and of all
  int row, tile;
  bool busy = warp_index() < kBusyWarps;

  BLOCKDROP_DEVICE Share() {
    const int rank = cluster_rank(), warp = warp_index();
    part = warp % kBlockTiles;
    channel_tile = rank % kBandBlocks * kBlockTiles + part;
    tile = warp / kBlockTiles % Out::kPixelTiles;
    row = rank / kBandBlocks * kBandRows + warp / (kBlockTiles * Out::kPixelTiles) * kRows;
  }
};

// ------------------------------------------------------------------ shared memory

constexpr uint32_t kBufferBytes = 4 * kPartBytes;  // what a block needs for one convolution

constexpr uint32_t kHiddenAt = kX + Layout<16>::kBytes;
constexpr uint32_t kRingAt = kHiddenAt + Layout<16>::kBytes;
constexpr uint32_t kSharedBytes = kRingAt + kBuffers * kBufferBytes;
static_assert(kRingAt % 16 == 0 && kPartBytes % 16 == 0);

// ------------------------------------------------------------------ weights

// What a block needs of the weights of one image, convolution by convolution.
class ClusterWeights {
 public:
  // Starts to copy the first ones. No block of threads may be using the ring.
  BLOCKDROP_DEVICE explicit ClusterWeights(const Network& network)
      : network_(network), block_(-1), second_(true), use_(0), fill_(0) {
#pragma unroll 1
    for (int i = 0; i < kBuffers - 1; ++i) start_copy();
  }

  // Waits for the next convolution's weights and returns where they are: (slice, channel tile)
  // parts of kPartBytes each. Starts to copy later ones over those that were used before. A
  // barrier of the thread block.
  BLOCKDROP_DEVICE uint32_t advance() {
    wait_for_groups<kBuffers - 2>();
    sync_threads();
    const uint32_t buffer = kRingAt + use_;
    use_ = after(use_);
    start_copy();
    return buffer;
  }

 private:
  static BLOCKDROP_DEVICE uint32_t after(uint32_t offset) {
    return offset == (kBuffers - 1) * kBufferBytes ? 0 : offset + kBufferBytes;
  }

  BLOCKDROP_DEVICE void start_copy() {
    const int second_segment = network_.layers[0];
    const int third_segment = second_segment + network_.layers[1];
    const int end = third_segment + network_.layers[2];
    if (block_ < end) {
      const int segment = (block_ >= second_segment) + (block_ >= third_segment);
      const int tiles = 1 << segment;  // of output channels
      const int block = block_ - (segment == 0 ? 0 : segment == 1 ? second_segment : third_segment);
      // The stem is the second convolution of block -1. All second ones have as many slices.
      const int end_slice = slices_before(kTile * tiles, block + 1), middle = end_slice - tiles;
      const int slice = second_ ? middle : slices_before(kTile * tiles, block);
      const int slices = (second_ ? end_slice : middle) - slice;
      // Segments 1 and 2: all channels, as they lie there; segment 3: a tile of each slice.
      const bool divided = segment == kSegments - 1;
      const unsigned char* source =
          network_.segments[segment] +
          (slice * tiles + (divided ? cluster_rank() % tiles : 0)) * int64_t{kPartBytes};
      uint32_t target = kRingAt + fill_;
#pragma unroll 1
      for (int part = divided ? slices : slices * tiles; part > 0; --part) {
        copy_bytes<kPartBytes>(target, source);
        source += divided ? tiles * kPartBytes : kPartBytes;
        target += kPartBytes;
      }
      if (second_) block_ = next_kept(kKeep, block_ + 1, end);
      second_ = !second_;
      fill_ = after(fill_);
    }
    commit_copies();
  }

  const Network& network_;
  int block_;            // whose convolution is copied next,
  bool second_;          // and which of its two
  uint32_t use_, fill_;  // byte offsets in the ring
};

// ------------------------------------------------------------------ convolution

// output = relu(sums [+ output]) for a warp's pixels, here and in all blocks that need a row for
// results `reach` rows away.
template <typename Format, int kOut, bool kResidual, int kRows>
BLOCKDROP_DEVICE void store_sums(const float (&sums)[kRows][4], uint32_t output,
                                 const Share<kOut>& share, int reach) {
  using Out = Layout<kOut>;
  using S = Share<kOut>;
  static_assert(kRows <= 2);
  const int lane = lane_index();
  const int row = share.row + lane / 16 % kRows;  // one row is stored twice
  const uint32_t address =
      output + Out::offset(row, share.tile * kPixelsPerTile + lane % 8,
                           share.channel_tile * (kTile / kChunk) + lane / 8 % 2);
  store_rows<Format, kResidual>(sums[0], sums[kRows - 1], address);
  sync_warp();
  // A lane passes on 8 channels of a pixel; where two lanes have the same, to every other block.
  const uint4 chunk = load_shared<uint4>(address);
  const int top = row - reach, bottom = row + reach;
  const int first = (top < 0 ? 0 : top / S::kBandRows) * S::kBandBlocks;
  const int last = (bottom >= Out::kSize ? S::kBands - 1 : bottom / S::kBandRows) * S::kBandBlocks +
                   S::kBandBlocks - 1;
#pragma unroll 1
  for (int rank = first + lane / 16 % (2 / kRows); rank <= last; rank += 2 / kRows) {
    if (rank != cluster_rank()) store_cluster(rank, address, chunk);
  }
}

// output = relu(convolution(input) + bias [+ output])
//
// Begins, with the weights at hand, by waiting for the cluster; the caller arrives when it has done
// what else others wait for. A convolution takes as long as the products that need one another's
// result, 9 in segments 1 and 2, 12 in segment 3, not as long as the work.
template <typename Format, int kIn, int kOut, bool kResidual>
BLOCKDROP_DEVICE void convolve(uint32_t input, uint32_t output, ClusterWeights& weights,
                               int reach) {
  using S = Share<kOut>;
  constexpr int kSlices = Layout<kIn>::kChannelTiles;
  constexpr int kEarly = kSlices < 2 ? kSlices : 2;  // slices that are in registers before
  const S share;
  const uint32_t part = weights.advance() + share.part * kPartBytes;
  const auto load = [&](int slice, int tap) {
    return load_shared<uint4>(part + slice * S::kBlockTiles * kPartBytes + kBiasBytes +
                              (tap * kLanes + lane_index()) * sizeof(uint4));
  };
  uint4 taps[kEarly][kTaps];
  float sums[1][kSets<kIn>][S::kRows][4];
  if (share.busy) {
#pragma unroll
    for (int slice = 0; slice < kEarly; ++slice) {
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) taps[slice][tap] = load(slice, tap);
    }
    begin_sums(sums[0], part);
  }
  cluster_wait();
  if (!share.busy) return;
#pragma unroll
  for (int slice = 0; slice < kSlices; ++slice) {
    multiply_slice<Format, kIn, kOut>(sums, input, slice, share.row, share.tile, [&](int tap) {
      return slice < kEarly ? taps[slice % kEarly][tap] : load(slice, tap);
    });
  }
  add_sets(sums[0]);
  store_sums<Format, kOut, kResidual>(sums[0][0], output, share, reach);
}

// ------------------------------------------------------------------ a network

// The kept blocks from `block` on that are before `end_block` and keep the shape; returns the next
// kept one. reach_of(next) is how far x must reach if `next` follows.
template <typename Format, int kChannels, typename Reach>
BLOCKDROP_DEVICE int run_blocks(ClusterWeights& weights, int block, int end_block, int end,
                                Reach reach_of) {
  while (block < end_block) {
    const int next = next_kept(kKeep, block + 1, end);
    convolve<Format, kChannels, kChannels, false>(kX, kHiddenAt, weights, 1);
    cluster_arrive();
    convolve<Format, kChannels, kChannels, true>(kHiddenAt, kX, weights, reach_of(next));
    cluster_arrive();
    block = next;
  }
  return block;
}

// Segment 2 or 3, of which `block` is the first kept one or beyond it.
template <typename Format, int kChannels, typename Reach>
BLOCKDROP_DEVICE int run_segment(ClusterWeights& weights, int block, int first_block, int end_block,
                                 int end, bool subsample, Reach reach_of) {
  constexpr int kIn = kChannels / 2;
  const bool keep = block == first_block;
  if (keep) {
    convolve<Format, kIn, kChannels, false>(kX, kHiddenAt, weights, 1);
  } else {
    cluster_wait();
  }
  clear_border<kChannels>(kHiddenAt);
  shortcut<Format, kIn>(kX, subsample);
  cluster_arrive();
  if (keep) {
    block = next_kept(kKeep, block + 1, end);
    convolve<Format, kChannels, kChannels, true>(kHiddenAt, kX, weights, reach_of(block));
    cluster_arrive();
  }
  return run_blocks<Format, kChannels>(weights, block, end_block, end, reach_of);
}

// Image to the last activation, which every block then has; the bits from kKeep on say which
// blocks run.
//
// How far from a row its value is needed: a convolution needs neighbours; behind a shape-changing
// block that is dropped, neighbours of rows twice as high; beyond that (segment 3, where blocks
// have half of the rows, and pooling) a block gets all.
template <typename Format>
BLOCKDROP_DEVICE void run_network(const Network& network, const uint16_t* image) {
  constexpr int kAll = kImageSize;
  const int second = network.layers[0], third = second + network.layers[1];
  const int end = third + network.layers[2];
  ClusterWeights weights(network);
  clear_border<16>(kX);
  clear_border<16>(kHiddenAt);
  {  // eight rows with those that the stem needs
    const int first_row = cluster_rank() * Share<16>::kBandRows - 2;
    const int last = kImageSize - 8;
    load_image<8>(image, kHiddenAt, first_row < 0 ? 0 : first_row > last ? last : first_row);
  }
  cluster_arrive();
  const auto reach = [&](int next) { return next <= second ? 1 : next < third ? 2 : kAll; };
  int block = next_kept(kKeep, 0, end);
  convolve<Format, 16, 16, false>(kHiddenAt, kX, weights, reach(block));
  cluster_arrive();
  block = run_blocks<Format, 16>(weights, block, second, end, reach);
  block = run_segment<Format, 32>(weights, block, second, third, end, network.subsample,
                                  [&](int next) { return next < third ? 1 : kAll; });
  run_segment<Format, 64>(weights, block, third, end, end, network.subsample,
                          [&](int next) { return next < end ? 1 : kAll; });
  cluster_wait();
}

// A cluster takes the path of its number.
template <typename Format>
BLOCKDROP_DEVICE void walk(const Paths& paths) {
  const int turn = block_index() / kBlocks;
  const int64_t path = paths.order ? paths.order[turn] : turn;
  if (paths.given) {
    const bool* decisions = paths.given + path * paths.num_blocks;
    set_kept(kKeep, paths.num_blocks, [&](int block) { return decisions[block]; });
  } else {
    set_kept(kKeep, num_blocks_of(paths.policy), [](int) { return true; });
  }
  sync_threads();
  // Policy network, then backbone; one copy of the code.
#pragma unroll 1
  for (int step = paths.given ? 1 : 0; step < 2; ++step) {
    const Network& network = step == 0 ? paths.policy : paths.backbone;
    cluster::run_network<Format>(network, paths.images + path % paths.num_images * kImageValues);
    pool<Format>(kHiddenAt);
    sync_threads();
    if (step == 0) {
      // Every block computes the decisions, one writes them down.
      float* logits = paths.policy_logits + path * paths.num_blocks;
      bool* decisions = paths.decisions + path * paths.num_blocks;
      set_kept(kKeep, paths.num_blocks, [&](int block) {
        const float logit = classify(network, kHiddenAt, block);
        if (cluster_rank() == 0) {
          logits[block] = logit;
          decisions[block] = logit >= 0;
        }
        return logit >= 0;
      });
      sync_threads();
    } else {
      float* logits = paths.logits + path * network.num_classes;
      for (int label = cluster_rank() * kThreads + thread_index(); label < network.num_classes;
           label += kBlocks * kThreads) {
        logits[label] = classify(network, kHiddenAt, label);
      }
    }
  }
}

}  // namespace blockdrop::walk_half::cluster
