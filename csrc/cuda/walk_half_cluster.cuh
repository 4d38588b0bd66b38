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
// a band divide its output channels. In segment 3 different warps have different slices.
template <int kIn, int kOut>
struct Share {
  using Out = Layout<kOut>;
  static constexpr bool kDividesSlices = kOut == kFeatures;
  static constexpr int kSlices = Layout<kIn>::kChannelTiles;

  // Of a block:
  static constexpr int kBands = kOut == kFeatures ? 2 : kBlocks;
  static constexpr int kBandRows = Out::kSize / kBands;
  static constexpr int kBandBlocks = kBlocks / kBands;
  static constexpr int kBlockTiles = Out::kChannelTiles / kBandBlocks;  // of output channels

  // Of a warp: `kSlices` slices and one tile of output channels in kRows rows, kTiles tiles each.
  static constexpr int kWarpSlices = kDividesSlices ? 1 : kSlices;
  static constexpr int kRows = kDividesSlices ? kSlices / 2 : 1;
  static constexpr int kTiles = kOut == kTile ? 2 : 1;
  static constexpr int kSliceGroups = kSlices / kWarpSlices;
  static constexpr int kTileGroups = Out::kPixelTiles / kTiles;
  static_assert(kBlockTiles * kSliceGroups * kTileGroups * (kBandRows / kRows) == kWarps);

  int first_row, first_channel_tile;         // the block's
  int channel_tile, slice, first_tile, row;  // the warp's; channel_tile counts from the block's

  BLOCKDROP_DEVICE Share() {
    const int rank = cluster_rank();
    first_row = rank / kBandBlocks * kBandRows;
    first_channel_tile = rank % kBandBlocks * kBlockTiles;
    int warp = warp_index();
    channel_tile = warp % kBlockTiles;
    warp /= kBlockTiles;
    slice = warp % kSliceGroups;
    warp /= kSliceGroups;
    first_tile = warp % kTileGroups * kTiles;
    row = first_row + warp / kTileGroups * kRows;
  }
};

// ------------------------------------------------------------------ shared memory

// A slice's weights for 16 output channels, with their bias.
constexpr uint32_t kBiasBytes = kTile * 4;
constexpr uint32_t kPartBytes = kBiasBytes + kTaps * kLanes * 16;
constexpr uint32_t kBufferBytes = 4 * kPartBytes;  // what a block needs for one convolution
constexpr int kSumsBytes = 16;                     // of a lane for one tile

constexpr uint32_t kHiddenAt = kX + Layout<16>::kBytes;
constexpr uint32_t kRingAt = kHiddenAt + Layout<16>::kBytes;
constexpr uint32_t kPartsAt = kRingAt + kBuffers * kBufferBytes;  // sums, slice by slice
constexpr uint32_t kKeepAt = kPartsAt + 4 * 4 * kLanes * kSumsBytes;
static_assert(kRingAt % 16 == 0 && kPartBytes % 16 == 0);

inline uint32_t shared_bytes(const Paths& paths) { return kKeepAt + keep_bytes(paths); }

struct alignas(16) Sums {
  float values[4];
};

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
      if (block_ < second_segment) {
        copy<16>(network_.segments[0], block_);
      } else if (block_ < third_segment) {
        copy<32>(network_.segments[1], block_ - second_segment);
      } else {
        copy<64>(network_.segments[2], block_ - third_segment);
      }
      if (second_) block_ = next_kept(kKeepAt, block_ + 1, end);
      second_ = !second_;
      fill_ = after(fill_);
    }
    commit_copies();
  }

  // `block` counts from the segment's first, `slices` are the segment's. The stem is the second
  // convolution of block -1.
  template <int kChannels>
  BLOCKDROP_DEVICE void copy(const unsigned char* slices, int block) {
    using L = Layout<kChannels>;
    constexpr int kTiles = L::kChannelTiles;
    using S = Share<kChannels, kChannels>;
    const int end = slices_before(kChannels, block + 1);
    const int middle = end - kTiles;  // the second convolution has as many in all segments
    const int first = second_ ? middle : slices_before(kChannels, block);
    const int parts = ((second_ ? end : middle) - first) * S::kBlockTiles;
    const int first_tile = cluster_rank() % S::kBandBlocks * S::kBlockTiles;
    uint32_t target = kRingAt + fill_;
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      const int tile = first_tile + part % S::kBlockTiles;
      const unsigned char* slice =
          slices + static_cast<size_t>(first + part / S::kBlockTiles) * L::kSliceBytes;
      const unsigned char* bias = slice + tile * kBiasBytes;
      const unsigned char* fragments =
          slice + kTiles * kBiasBytes + tile * (kPartBytes - kBiasBytes);
      for (uint32_t i = thread_index() * 16; i < kPartBytes; i += kThreads * 16) {
        copy_async(target + i, i < kBiasBytes ? bias + i : fragments + (i - kBiasBytes));
      }
      target += kPartBytes;
    }
  }

  const Network& network_;
  int block_;            // whose convolution is copied next,
  bool second_;          // and which of its two
  uint32_t use_, fill_;  // byte offsets in the ring
};

// ------------------------------------------------------------------ convolution

// output = relu(sums [+ output]) for 16 channels of kTiles tiles in one row, here and in all blocks
// that need the row for results `reach` rows away.
template <typename Format, int kOut, bool kResidual, int kTiles>
BLOCKDROP_DEVICE void store_row(const float (&sums)[kTiles][4], uint32_t output, int channel_tile,
                                int row, int first_tile, int reach) {
  using Out = Layout<kOut>;
  using S = Share<kOut, kOut>;
  static_assert(kTiles <= 2);
  // Four matrices: two tiles, or one twice.
  const int lane = lane_index();
  const int column = (first_tile + lane / 16 % kTiles) * kPixelsPerTile + lane % 8;
  const uint32_t address =
      output + Out::offset(Out::pixel(row, column), channel_tile * (kTile / kChunk) + lane / 8 % 2);
  uint32_t values[4];
  if constexpr (kResidual) load_matrices_transposed(values, address);
#pragma unroll
  for (int half = 0; half < 4; ++half) {
    const float* pair = &sums[half / 2 % kTiles][half % 2 * 2];
    float2 sum = {pair[0], pair[1]};
    if constexpr (kResidual) {
      const float2 residual = Format::unpack(values[half]);
      sum.x += residual.x;
      sum.y += residual.y;
    }
    values[half] = Format::pack_relu(sum.x, sum.y);
  }
  store_matrices_transposed(address, values);
  sync_warp();
  // A lane passes on 8 channels of a pixel; where two lanes have the same, to every other block.
  const uint4 chunk = load_shared<uint4>(address);
  const int top = row - reach, bottom = row + reach;
  const int first = (top < 0 ? 0 : top / S::kBandRows) * S::kBandBlocks;
  const int last = (bottom >= Out::kSize ? S::kBands - 1 : bottom / S::kBandRows) * S::kBandBlocks +
                   S::kBandBlocks - 1;
  for (int rank = first + lane / 16 % (2 / kTiles); rank <= last; rank += 2 / kTiles) {
    if (rank != cluster_rank()) store_cluster(rank, address, chunk);
  }
}

// output = relu(convolution(input) + bias [+ output])
//
// Begins, with the weights at hand, by waiting for the cluster; the caller arrives when it has done
// what else others wait for. The sums of a warp are few: a convolution takes as long as 9 (18 in
// segment 2) products that need one another's result, not as long as the work.
template <typename Format, int kIn, int kOut, bool kResidual>
BLOCKDROP_DEVICE void convolve(uint32_t input, uint32_t output, ClusterWeights& weights,
                               int reach) {
  using S = Share<kIn, kOut>;
  const uint32_t buffer = weights.advance();
  const S share;
  const int lane = lane_index();
  const uint32_t part = buffer + (share.slice * S::kBlockTiles + share.channel_tile) * kPartBytes;
  uint4 taps[S::kWarpSlices][3][3];
#pragma unroll
  for (int slice = 0; slice < S::kWarpSlices; ++slice) {
    const uint32_t fragments = part + slice * S::kBlockTiles * kPartBytes + kBiasBytes + lane * 16;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      taps[slice][tap % 3][tap / 3] = load_shared<uint4>(fragments + tap * kLanes * 16);
    }
  }
  const bool biased = share.slice == 0;
  const float low = biased ? load_shared<float>(part + lane / 4 * 4) : 0;
  const float high = biased ? load_shared<float>(part + lane / 4 * 4 + 8 * 4) : 0;
  float sums[S::kRows][S::kTiles][4];
#pragma unroll
  for (int row = 0; row < S::kRows; ++row) {
#pragma unroll
    for (int tile = 0; tile < S::kTiles; ++tile) {
      sums[row][tile][0] = sums[row][tile][1] = low;
      sums[row][tile][2] = sums[row][tile][3] = high;
    }
  }
  cluster_wait();
#pragma unroll
  for (int slice = 0; slice < S::kWarpSlices; ++slice) {
#pragma unroll
    for (int dx = 0; dx < 3; ++dx) {
      multiply_column<Format, kIn, kOut>(sums, taps[slice][dx], input, share.slice + slice, dx,
                                         share.row, share.first_tile);
    }
  }
  const int channel_tile = share.first_channel_tile + share.channel_tile;
  if constexpr (!S::kDividesSlices) {
    static_assert(S::kRows == 1);
    store_row<Format, kOut, kResidual>(sums[0], output, channel_tile, share.row, share.first_tile,
                                       reach);
  } else {
    const auto place = [&](int row, int slice) {
      return kPartsAt + ((row * S::kSlices + slice) * kLanes + lane) * kSumsBytes;
    };
#pragma unroll
    for (int row = 0; row < S::kRows; ++row) {
      const float (&values)[4] = sums[row][0];
      store_shared(place(share.row - share.first_row + row, share.slice),
                   Sums{{values[0], values[1], values[2], values[3]}});
    }
    sync_threads();
    const int row = warp_index();
    if (row >= S::kBandRows) return;
    float total[1][4] = {};
#pragma unroll
    for (int slice = 0; slice < S::kSlices; ++slice) {
      const Sums more = load_shared<Sums>(place(row, slice));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        total[0][i] = slice == 0 ? more.values[i] : total[0][i] + more.values[i];
      }
    }
    store_row<Format, kOut, kResidual>(total, output, channel_tile, share.first_row + row, 0,
                                       reach);
  }
}

// ------------------------------------------------------------------ a network

// The kept blocks from `block` on that are before `end_block` and keep the shape; returns the next
// kept one. reach_of(next) is how far x must reach if `next` follows.
template <typename Format, int kChannels, typename Reach>
BLOCKDROP_DEVICE int run_blocks(ClusterWeights& weights, int block, int end_block, int end,
                                Reach reach_of) {
  while (block < end_block) {
    const int next = next_kept(kKeepAt, block + 1, end);
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
    block = next_kept(kKeepAt, block + 1, end);
    convolve<Format, kChannels, kChannels, true>(kHiddenAt, kX, weights, reach_of(block));
    cluster_arrive();
  }
  return run_blocks<Format, kChannels>(weights, block, end_block, end, reach_of);
}

// Image to the last activation, which every block then has; the bits from kKeepAt on say which
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
    const int first_row = Share<16, 16>().first_row - 2;
    const int last = kImageSize - 8;
    load_image<8>(image, kHiddenAt, first_row < 0 ? 0 : first_row > last ? last : first_row);
  }
  cluster_arrive();
  const auto reach = [&](int next) { return next <= second ? 1 : next < third ? 2 : kAll; };
  int block = next_kept(kKeepAt, 0, end);
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
  constexpr int kTogether = kFeatures;
  const int turn = block_index() / kBlocks;
  const int64_t path = paths.order ? paths.order[turn] : turn;
  if (paths.given) {
    const bool* decisions = paths.given + path * paths.num_blocks;
    set_kept(kKeepAt, paths.num_blocks, [&](int block) { return decisions[block]; });
  } else {
    set_kept(kKeepAt, num_blocks_of(paths.policy), [](int) { return true; });
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
      set_kept(kKeepAt, paths.num_blocks, [&](int block) {
        const float logit = classify<kTogether>(network, kHiddenAt, block);
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
        logits[label] = classify<kTogether>(network, kHiddenAt, label);
      }
    }
  }
}

}  // namespace blockdrop::walk_half::cluster
