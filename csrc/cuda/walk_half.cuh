// Device code of the CUDA walk: one thread block carries one CIFAR image at a time through the
// stem, its active blocks and the classifier, all activations in shared memory.
// walk_half_launch.cu has the kernel and its budget; walk_half_cluster.cuh what is different where
// several thread blocks carry one image; blockdrop_fast/ops/walk_half.py the packing of weights.
//
// Activations: [height + 2, width + 1, channels] of 16-bit values, plus one pixel: a border of
// zeros on each side, where a row's right border is the next row's left one.
//
// Convolutions are matrix products, output channels x pixels: a warp computes 16 channels of four
// rows. For each of the nine taps it multiplies 16x16 weights by 16 input channels of 8 pixels.
//
// Weights come in slices, the part of a convolution for 16 input channels: the bias, then for
// every 16 output channels and tap the matrix fragment of each lane. While some are used, the next
// ones that this image needs are on their way.

#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/simt.cuh"
#include "cuda/walk_half.h"

namespace blockdrop::walk_half {

using namespace simt;

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kChunk = 8;  // channels in 16 bytes, what ldmatrix reads of a pixel
constexpr uint32_t kChunkBytes = 16;
constexpr int kPixelsPerTile = 8;

// ------------------------------------------------------------------ shared memory

template <int kChannels>
struct Layout {
  static constexpr int kSize = kImageSize * kTile / kChannels;  // height and width
  static constexpr int kStride = kSize + 1;                     // pixels from row to row
  static constexpr int kPixels = (kSize + 2) * kStride + 1;
  static constexpr int kBytes = kPixels * kChannels * 2;
  static constexpr int kPixelTiles = kSize / kPixelsPerTile;  // in a row
  static constexpr int kChannelTiles = kChannels / kTile;
  static constexpr uint32_t kPixelBytes = kChannels * 2;
  static constexpr uint32_t kRowBytes = kStride * kPixelBytes;
  static constexpr uint32_t kSliceBytes = slice_bytes(kChannels);

  // Where a chunk of a pixel lies. The chunks of 8 neighbours in a row are permuted so that they
  // lie in different banks; 8 columns on, everything repeats. A row further, all is kRowBytes
  // further: rows cost no arithmetic.
  static BLOCKDROP_DEVICE uint32_t offset(int row, int column, int chunk) {
    constexpr uint32_t kChunks = kChannels / kChunk;
    const uint32_t place = static_cast<uint32_t>(column + 1);
    const uint32_t permutation = place / (kChunk / kChunks) % kChunks;
    return static_cast<uint32_t>(row + 1) * kRowBytes +
           (place * kChunks + (static_cast<uint32_t>(chunk) ^ permutation)) * kChunkBytes;
  }
};

constexpr uint32_t kTurn = 0;   // an int: which path is on
constexpr uint32_t kKeep = 16;  // a bit for each block of the network that runs
// Two activations, x and what is hidden inside a residual block, and the ring. Each segment has
// its own arrangement of the same memory; x is at its start in all of them, so that a
// shape-changing shortcut works in place.
constexpr uint32_t kX = kKeep + kMostBlocks / 8;
template <int kChannels>
constexpr uint32_t kHidden = kX + Layout<(kChannels > kTile ? kChannels / 2 : kTile)>::kBytes;
template <int kChannels>
constexpr uint32_t kRing = kHidden<kChannels> + Layout<kChannels>::kBytes;
static_assert(kX % 16 == 0 && kHidden<16> % 16 == 0 && kHidden<32> % 16 == 0);
static_assert(kHidden<64> % 16 == 0 && kRing<16> % 16 == 0 && kRing<32> % 16 == 0);
static_assert(kRing<64> % 16 == 0);
// The classifier's means use what is hidden in segment 3.
constexpr uint32_t kSums = kHidden<64>;

// All of it, with that many slices in the ring.
constexpr uint32_t shared_bytes(int ring) {
  const uint32_t first = kRing<16> + ring * Layout<16>::kSliceBytes;
  const uint32_t second = kRing<32> + ring * Layout<32>::kSliceBytes;
  const uint32_t third = kRing<64> + ring * Layout<64>::kSliceBytes;
  const uint32_t most = first > second ? first : second;
  return most > third ? most : third;
}

// ------------------------------------------------------------------ decisions

// A bit for each block of the network that runs, from shared memory offset `keep` on.

// The first kept block in [block, end), or end.
BLOCKDROP_DEVICE int next_kept(uint32_t keep, int block, int end) {
  while (block < end) {
    const uint32_t word = load_shared<uint32_t>(keep + block / kLanes * 4) >> block % kLanes;
    if (word != 0) {
      block += first_bit(word);
      return block < end ? block : end;
    }
    block = (block / kLanes + 1) * kLanes;
  }
  return end;
}

// Sets the bit of each block for which keeps(block) is true, 32 blocks a warp.
template <typename Keeps>
BLOCKDROP_DEVICE void set_kept(uint32_t keep, int num_blocks, Keeps keeps) {
  for (int first = warp_index() * kLanes; first < num_blocks; first += kThreads) {
    const int block = first + lane_index();
    const unsigned word = ballot(block < num_blocks && keeps(block));
    if (lane_index() == 0) store_shared<uint32_t>(keep + first / kLanes * 4, word);
  }
}

// ------------------------------------------------------------------ weights

// Starts to copy to shared memory, all threads together; the number of steps is constant.
template <uint32_t kBytes>
BLOCKDROP_DEVICE void copy_bytes(uint32_t target, const unsigned char* source) {
  constexpr uint32_t kStep = kThreads * 16;
  const uint32_t first = thread_index() * 16;
#pragma unroll
  for (uint32_t i = 0; i < kBytes; i += kStep) {
    const bool all = kBytes - i >= kStep;
    if (all || first < kBytes - i) copy_async(target + i + first, source + i + first);
  }
}

// The slices that one image needs in one segment, in order. They pass through a ring of two, or
// four where two thread blocks with so much memory fit a multiprocessor. Half of it is used while
// the other half is on its way; then all threads meet.
template <int kChannels>
class WeightStream {
 public:
  // Starts to copy the first slices; the ring must be free. `weights` is the segment's first slice,
  // its blocks are [first_block, end_block) of the network.
  BLOCKDROP_DEVICE WeightStream(const unsigned char* weights, int first_block, int end_block,
                                int ring)
      : weights_(weights),
        first_block_(first_block),
        end_block_(end_block),
        ring_(ring),
        block_(first_block - 1),
        next_(0),
        stop_(slices_before(kChannels, 0)),
        used_(0),
        started_(0) {
    fill(ring_ / 2);
  }

  // Returns where the next slice is, a convolution's `slice_index`-th. If it is the first one in
  // its half of the ring, waits for that half, and starts to copy over what was used before. Then
  // it is a barrier: what any thread has written to shared memory before, all see after.
  BLOCKDROP_DEVICE uint32_t advance(int slice_index) {
    if (slice_index % 2 == 0 || ring_ == 2) {
      wait_for_copies();
      sync_threads();
      fill(ring_);
    }
    return place(used_++);
  }

 private:
  static constexpr uint32_t kSliceBytes = Layout<kChannels>::kSliceBytes;

  BLOCKDROP_DEVICE uint32_t place(int slice) const {
    return kRing<kChannels> + (slice & (ring_ - 1)) * kSliceBytes;
  }

  // Starts to copy until so many slices are there or on their way, or there are no more.
  BLOCKDROP_DEVICE void fill(int most) {
#pragma unroll 1
    for (; started_ - used_ < most; ++started_, ++next_) {
      if (next_ == stop_) {
        const int block = next_kept(kKeep, block_ + 1, end_block_);
        if (block == end_block_) return;
        block_ = block;
        next_ = slices_before(kChannels, block - first_block_);
        stop_ = slices_before(kChannels, block - first_block_ + 1);
      }
      copy_bytes<kSliceBytes>(place(started_), weights_ + static_cast<size_t>(next_) * kSliceBytes);
    }
  }

  const unsigned char* weights_;
  int first_block_, end_block_, ring_;
  int block_;           // whose slices are being copied
  int next_, stop_;     // the slice to copy next, the end of the block's slices
  int used_, started_;  // slices handed out, and those whose copies have been started
};

// ------------------------------------------------------------------ convolution

// Stores four 8x8 matrices, transposed: see load_matrices for `offset`.
BLOCKDROP_DEVICE void store_matrices_transposed(uint32_t offset, const uint32_t (&r)[4]) {
  if constexpr (kHasStmatrix) {
    stmatrix_transposed(offset, r);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t row = shuffle(offset, j * 8 + lane_index() / 4);
      store_shared<uint32_t>(row + lane_index() % 4 * 4, transpose_matrix(r[j]));
    }
  }
}

// What a warp computes of a convolution: 16 channels of kTiles times 8 pixels in kRows rows. Each
// row of the input is read once for all rows of the output that it touches: eight rows read ten.
template <int kOut>
struct WarpPart {
  using Out = Layout<kOut>;
  static constexpr int kRows = kOut == kFeatures ? 4 : 8;
  static constexpr int kRowGroups = Out::kSize / kRows;
  static constexpr int kTileGroups = kWarps / (Out::kChannelTiles * kRowGroups);
  static constexpr int kTiles = Out::kPixelTiles / kTileGroups;
  static_assert(Out::kChannelTiles * kRowGroups * kTileGroups == kWarps && kTiles > 0);

  int channel_tile = warp_index() % Out::kChannelTiles;
  int row = warp_index() / Out::kChannelTiles % kRowGroups * kRows;
  int first_tile = warp_index() / (Out::kChannelTiles * kRowGroups) * kTiles;
};

// A convolution has several sets of sums, so that fewer products wait for each other's result,
// which is what a cluster's time is made of (walk_half_cluster.cuh; both add in the same order).
// With 32 input channels each slice has a set. With 64 each column of taps: the image is no wider
// than 8 pixels there, so a column has the pixels of the next one, moved by one; pixels are read
// once, and add_sets moves the sums instead.
template <int kIn>
constexpr int kSets = kIn == kFeatures ? 3 : kIn / kTile;

// Adds to `sums` what the 16 input channels of a slice contribute to kTiles times 8 pixels of the
// rows from `row` on. tap(i) is the weights of a tap.
template <typename Format, int kIn, int kOut, int kTiles, int kRows, typename Tap>
BLOCKDROP_DEVICE void multiply_slice(float (&sums)[kTiles][kSets<kIn>][kRows][4], uint32_t input,
                                     int slice_index, int row, int first_tile, Tap tap) {
  using In = Layout<kIn>;
  constexpr int kStride = kOut / kIn;
  constexpr int kInRows = kStride * (kRows - 1) + 3;
  const int lane = lane_index();
  constexpr bool kShared = kIn == kFeatures;
  constexpr int kTileBytes = kStride * kPixelsPerTile * In::kPixelBytes;
  uint32_t pixels[(kInRows + 1) / 2][4];  // of two rows each
#pragma unroll
  for (int dx = 0; dx < 3; ++dx) {
    // Lanes 0-7 and 8-15 point at the two chunks of 8 pixels, lanes 16-31 at those below.
    const uint32_t address = input + In::offset(kStride * row - 1 + lane / 16,
                                                kStride * (first_tile * kPixelsPerTile + lane % 8) +
                                                    (kShared ? 0 : dx - 1),
                                                slice_index * (kTile / kChunk) + lane / 8 % 2);
    const uint4 taps[3] = {tap(dx), tap(3 + dx), tap(6 + dx)};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int in_row = 0; in_row < kInRows; ++in_row) {
        uint32_t (&pair)[4] = pixels[in_row / 2];
        if (in_row % 2 == 0 && (dx == 0 || !kShared)) {
          load_matrices(pair, address + tile * kTileBytes + in_row * In::kRowBytes,
                        /*four=*/in_row + 1 < kInRows);
        }
#pragma unroll
        for (int dy = 0; dy < 3; ++dy) {
          const int out_row = (in_row - dy) / kStride;
          if (in_row < dy || (in_row - dy) % kStride != 0 || out_row >= kRows) continue;
          Format::multiply(sums[tile][kShared ? dx : slice_index % kSets<kIn>][out_row], taps[dy],
                           pair[in_row % 2 * 2], pair[in_row % 2 * 2 + 1]);
        }
      }
    }
  }
}

// sums[0] becomes the sum of all sets.
template <int kRows>
BLOCKDROP_DEVICE void add_sets(float (&)[1][kRows][4]) {}
template <int kRows>
BLOCKDROP_DEVICE void add_sets(float (&sums)[2][kRows][4]) {
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[0][row][i] += sums[1][row][i];
  }
}
template <int kRows>
BLOCKDROP_DEVICE void add_sets(float (&sums)[3][kRows][4]) {
  const int lane = lane_index();
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {  // two channels, of each two pixels
      float *left = &sums[0][row][i], *middle = &sums[1][row][i], *right = &sums[2][row][i];
      const float before = shuffle(left[1], lane - 1), after = shuffle(right[0], lane + 1);
      middle[0] += right[1] + (lane % 4 == 0 ? 0 : before);
      middle[1] += left[0] + (lane % 4 == 3 ? 0 : after);
      left[0] = middle[0];
      left[1] = middle[1];
    }
  }
}

// Sums begin with the bias, one set of them only.
template <int kCount, int kRows>
BLOCKDROP_DEVICE void begin_sums(float (&sums)[kCount][kRows][4], uint32_t bias) {
  const uint32_t own = bias + lane_index() / 4 * 4;
  const float low = load_shared<float>(own), high = load_shared<float>(own + 8 * 4);
#pragma unroll
  for (int set = 0; set < kCount; ++set) {
    const bool biased = set == kCount / 2;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      sums[set][row][0] = sums[set][row][1] = biased ? low : 0;
      sums[set][row][2] = sums[set][row][3] = biased ? high : 0;
    }
  }
}

// output = relu(sums [+ output]) for 8 pixels of two rows, which may be the same. Lanes 0-7 and
// 8-15 point at the two chunks of the first row's pixels, lanes 16-31 at those of the second.
template <typename Format, bool kResidual>
BLOCKDROP_DEVICE void store_rows(const float (&first)[4], const float (&second)[4],
                                 uint32_t address) {
  uint32_t values[4];
  if constexpr (kResidual) load_matrices_transposed(values, address);
#pragma unroll
  for (int half = 0; half < 4; ++half) {
    const float* pair = &(half < 2 ? first : second)[half % 2 * 2];
    float2 sum = {pair[0], pair[1]};
    if constexpr (kResidual) {
      const float2 residual = Format::unpack(values[half]);
      sum.x += residual.x;
      sum.y += residual.y;
    }
    values[half] = Format::pack_relu(sum.x, sum.y);
  }
  store_matrices_transposed(address, values);
}

// output = relu(convolution(input) + bias [+ output])
//
// A warp holds at most 64 sums, 12 registers of weights and 12 of input.
template <typename Format, int kIn, int kOut, bool kResidual>
BLOCKDROP_DEVICE void convolve(uint32_t input, uint32_t output, WeightStream<kOut>& weights) {
  using Out = Layout<kOut>;
  using Part = WarpPart<kOut>;
  constexpr int kSlices = Layout<kIn>::kChannelTiles;
  const Part part;
  const int lane = lane_index();
  uint32_t slice = weights.advance(0);
  float sums[Part::kTiles][kSets<kIn>][Part::kRows][4];
#pragma unroll
  for (auto& tile_sums : sums) begin_sums(tile_sums, slice + part.channel_tile * kPartBytes);
#pragma unroll(kSlices == 2 ? 2 : 1)
  for (int slice_index = 0; slice_index < kSlices; ++slice_index) {
    if (slice_index > 0) slice = weights.advance(slice_index);
    multiply_slice<Format, kIn, kOut>(
        sums, input, slice_index, part.row, part.first_tile, [&](int i) {
          return load_shared<uint4>(slice + part.channel_tile * kPartBytes + kBiasBytes +
                                    (i * kLanes + lane) * sizeof(uint4));
        });
  }
  const uint32_t address =
      output + Out::offset(part.row + lane / 16, part.first_tile * kPixelsPerTile + lane % 8,
                           part.channel_tile * (kTile / kChunk) + lane / 8 % 2);
#pragma unroll
  for (int tile = 0; tile < Part::kTiles; ++tile) {
    auto& tile_sums = sums[tile];
    add_sets(tile_sums);
#pragma unroll
    for (int row = 0; row < Part::kRows; row += 2) {
      store_rows<Format, kResidual>(
          tile_sums[0][row], tile_sums[0][row + 1],
          address + tile * kPixelsPerTile * Out::kPixelBytes + row * Out::kRowBytes);
    }
  }
}

// ------------------------------------------------------------------ everything else

BLOCKDROP_DEVICE uint4 zeros() { return {0, 0, 0, 0}; }

template <int kChannels>
BLOCKDROP_DEVICE void clear_border(uint32_t activation) {
  using L = Layout<kChannels>;
  constexpr int kChunks = kChannels / kChunk;
  constexpr int kTop = L::kStride, kBottom = L::kStride + 1;
  constexpr int kBorder = kTop + L::kSize + kBottom;
  for (int i = thread_index(); i < kBorder * kChunks; i += kThreads) {
    const int place = i / kChunks;
    const int pixel = place < kTop              ? place
                      : place < kTop + L::kSize ? (place - kTop + 1) * L::kStride
                                                : L::kPixels - kBorder + place;
    store_shared(activation + pixel * L::kPixelBytes + i % kChunks * kChunkBytes, zeros());
  }
}

// Spreads kRows rows of the image, from `first_row` on, over pixels of 16 channels, the last 13 of
// them zero.
template <int kRows>
BLOCKDROP_DEVICE void load_image(const uint16_t* image, uint32_t activation, int first_row) {
  using L = Layout<kTile>;
  constexpr int kImagePixels = kImageSize * kImageSize;
  static_assert(kRows * kImageSize % kThreads == 0);
#pragma unroll
  for (int i = 0; i < kRows * kImageSize / kThreads; ++i) {
    const int place = first_row * kImageSize + i * kThreads + thread_index();
    const int row = place / kImageSize, column = place % kImageSize;
    const uint32_t red = load_global(image + place);
    const uint32_t green = load_global(image + kImagePixels + place);
    const uint32_t blue = load_global(image + 2 * kImagePixels + place);
    store_shared(activation + L::offset(row, column, 0), uint4{red | green << 16, blue, 0, 0});
    store_shared(activation + L::offset(row, column, 1), zeros());
  }
}

// The shortcut of a block that halves the image and doubles the channels, in place. A thread
// keeps its part of the result, 8 channels of a pixel or two, until all have read theirs.
template <typename Format, int kIn>
BLOCKDROP_DEVICE void shortcut(uint32_t activation, bool subsample) {
  using In = Layout<kIn>;
  using Out = Layout<2 * kIn>;
  constexpr int kChunks = kIn / kChunk;
  constexpr int kParts = Out::kSize * Out::kSize * kChunks / kThreads;
  static_assert(kParts * kThreads == Out::kSize * Out::kSize * kChunks);
  uint4 parts[kParts];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int i = part * kThreads + thread_index();
    const int row = 2 * (i / kChunks / Out::kSize), column = 2 * (i / kChunks % Out::kSize);
    const auto load = [&](int y, int x) {
      return load_shared<uint4>(activation + In::offset(row + y, column + x, i % kChunks));
    };
    parts[part] = load(0, 0);
    if (!subsample) {
      const uint4 right = load(0, 1), below = load(1, 0), across = load(1, 1);
      const auto mean = [](uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
        const float2 p = Format::unpack(a), q = Format::unpack(b);
        const float2 r = Format::unpack(c), s = Format::unpack(d);
        return Format::pack((p.x + q.x + r.x + s.x) * 0.25f, (p.y + q.y + r.y + s.y) * 0.25f);
      };
      parts[part] = {mean(parts[part].x, right.x, below.x, across.x),
                     mean(parts[part].y, right.y, below.y, across.y),
                     mean(parts[part].z, right.z, below.z, across.z),
                     mean(parts[part].w, right.w, below.w, across.w)};
    }
  }
  sync_threads();
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int i = part * kThreads + thread_index();
    const int row = i / kChunks / Out::kSize, column = i / kChunks % Out::kSize;
    // As many zero chunks as data: behind, or half of them on each side.
    const int chunk = i % kChunks;
    const int data = subsample ? chunk + kChunks / 2 : chunk;
    const int zero = subsample && chunk < kChunks / 2 ? chunk : chunk + kChunks;
    store_shared(activation + Out::offset(row, column, data), parts[part]);
    store_shared(activation + Out::offset(row, column, zero), zeros());
  }
  clear_border<2 * kIn>(activation);
}

// Means of x over its pixels, float32 [64], which a barrier later are at shared memory offset
// `sums`; four times as much is used there.
template <typename Format>
BLOCKDROP_DEVICE void pool(uint32_t sums) {
  using L = Layout<kFeatures>;
  constexpr int kGroups = kThreads / kFeatures;  // of rows, summed by different threads
  constexpr int kRows = L::kSize / kGroups;
  const int channel = thread_index() % kFeatures, group = thread_index() / kFeatures;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kRows * L::kSize; ++i) {
    const int row = group * kRows + i / L::kSize, column = i % L::kSize;
    const uint32_t at = kX + L::offset(row, column, channel / kChunk) + channel % kChunk * 2;
    sum += Format::unpack(load_shared<uint16_t>(at)).x;
  }
  store_shared(sums + thread_index() * 4, sum);
  sync_threads();
  if (thread_index() < kFeatures) {
    float total = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      total += load_shared<float>(sums + (g * kFeatures + channel) * 4);
    }
    store_shared(sums + channel * 4, total * (1.f / (L::kSize * L::kSize)));
  }
}

// The logit of a label from the means at `sums`, in float32.
BLOCKDROP_DEVICE float classify(const Network& network, uint32_t sums, int label) {
  float logit = load_global(network.classifier + label);
  const float* weight = network.classifier + label;  // [64, classes], behind the bias
#pragma unroll                                       // all weights are waited for at once
  for (int i = 0; i < kFeatures; ++i) {
    weight += network.num_classes;
    logit += load_global(weight) * load_shared<float>(sums + i * 4);
  }
  return logit;
}

// ------------------------------------------------------------------ a network

// The kept blocks in [block, end_block), all of which keep the shape.
template <typename Format, int kChannels>
BLOCKDROP_DEVICE void run_blocks(WeightStream<kChannels>& weights, int block, int end_block) {
  for (block = next_kept(kKeep, block, end_block); block < end_block;
       block = next_kept(kKeep, block + 1, end_block)) {
    convolve<Format, kChannels, kChannels, false>(kX, kHidden<kChannels>, weights);
    convolve<Format, kChannels, kChannels, true>(kHidden<kChannels>, kX, weights);
  }
}

// Segment 2 or 3; x becomes half as large and twice as deep.
template <typename Format, int kChannels>
BLOCKDROP_DEVICE void run_segment(const unsigned char* slices, int first_block, int end_block,
                                  bool subsample, int ring) {
  constexpr int kIn = kChannels / 2;
  sync_threads();  // the previous segment is done with its memory
  WeightStream<kChannels> weights(slices, first_block, end_block, ring);
  const bool keep = next_kept(kKeep, first_block, end_block) == first_block;
  clear_border<kChannels>(kHidden<kChannels>);
  if (keep) convolve<Format, kIn, kChannels, false>(kX, kHidden<kChannels>, weights);
  shortcut<Format, kIn>(kX, subsample);
  if (keep) convolve<Format, kChannels, kChannels, true>(kHidden<kChannels>, kX, weights);
  run_blocks<Format>(weights, first_block + 1, end_block);
}

// Image to pooled features; the bits from kKeep on say which blocks run.
template <typename Format>
BLOCKDROP_DEVICE void run_network(const Network& network, const uint16_t* image, int ring) {
  const int second = network.layers[0];
  {
    WeightStream<16> weights(network.segments[0], 0, second, ring);
    clear_border<16>(kX);
    clear_border<16>(kHidden<16>);
    load_image<kImageSize>(image, kHidden<16>, 0);
    convolve<Format, 16, 16, false>(kHidden<16>, kX, weights);
    run_blocks<Format>(weights, 0, second);
  }
  const int third = second + network.layers[1];
  run_segment<Format, 32>(network.segments[1], second, third, network.subsample, ring);
  run_segment<Format, 64>(network.segments[2], third, third + network.layers[2], network.subsample,
                          ring);
}

// Takes paths until there are none left. What is not needed for a convolution is read again where
// it is, from shared memory and the kernel's arguments: registers are what limits the kernel.
template <typename Format>
BLOCKDROP_DEVICE void walk(const Paths& paths) {
  if (thread_index() == 0) store_shared<int>(kTurn, block_index());
  sync_threads();
  const auto path = [&]() -> int64_t {
    const int turn = load_shared<int>(kTurn);
    return paths.order ? paths.order[turn] : turn;
  };
  while (load_shared<int>(kTurn) < paths.num_paths) {
    if (paths.given) {
      const bool* decisions = paths.given + path() * paths.num_blocks;
      set_kept(kKeep, paths.num_blocks, [&](int block) { return decisions[block]; });
    } else {
      set_kept(kKeep, num_blocks_of(paths.policy), [](int) { return true; });
    }
    sync_threads();
    // Policy network, then backbone; one copy of the code.
#pragma unroll 1
    for (int step = paths.given ? 1 : 0; step < 2; ++step) {
      const Network& network = step == 0 ? paths.policy : paths.backbone;
      run_network<Format>(network, paths.images + path() % paths.num_images * kImageValues,
                          paths.ring);
      sync_threads();
      pool<Format>(kSums);
      sync_threads();
      if (step == 0) {
        float* logits = paths.policy_logits + path() * paths.num_blocks;
        bool* decisions = paths.decisions + path() * paths.num_blocks;
        set_kept(kKeep, paths.num_blocks, [&](int block) {
          const float logit = classify(network, kSums, block);
          logits[block] = logit;
          return decisions[block] = logit >= 0;
        });
      } else {
        float* logits = paths.logits + path() * network.num_classes;
        for (int label = thread_index(); label < network.num_classes; label += kThreads) {
          logits[label] = classify(network, kSums, label);
        }
      }
      sync_threads();
    }
    if (thread_index() == 0) {
      const bool none_left = paths.num_paths <= num_thread_blocks();
      store_shared<int>(
          kTurn, none_left ? num_thread_blocks() : num_thread_blocks() + take_ticket(paths.queue));
    }
    sync_threads();
  }
}

}  // namespace blockdrop::walk_half
