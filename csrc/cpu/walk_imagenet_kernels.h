// The arithmetic of the CPU walk of ImageNet networks, written once with the compiler's vector
// types and compiled for each instruction set by walk_imagenet_<isa>.cpp.
//
// Everything here has internal linkage, and of the standard library nothing is instantiated: an
// inline function compiled with AVX-512 must not be the one the linker picks for everybody.

#pragma once

#include "cpu/vectors.h"
#include "cpu/walk_imagenet.h"
#include "cpu/winograd.h"

namespace blockdrop::walk_imagenet {
namespace {

// Rows and vectors of output channels whose sums are kept in registers at once: kMaxRows *
// kVectors sums, kVectors of weights and an input value. On AVX-512 that are 14 * 2 + 2 + 1 of 32
// registers; a step is 28 multiply-adds (14 cycles, 2 a cycle) with 16 loads (8 cycles).
#if defined(__AVX512F__)
constexpr int kMaxRows = 14;
constexpr int kVectors = 2;
#elif defined(__aarch64__)
constexpr int kMaxRows = 6;  // 6 * 4 + 4 + 1 of 32
constexpr int kVectors = 4;
#else
constexpr int kMaxRows = 6;  // 6 * 2 + 2 + 1 of 16
constexpr int kVectors = 2;
#endif

static_assert(kMaxRows <= kMostRows);
constexpr int kCacheLine = 16;  // floats

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

// ---------------------------------------------------------------- prefetching

// Weights come from memory (those of ResNet-101 are 235 MB), and the hardware's prefetching does
// not hide that. So while a kernel multiplies by some weights it fetches others into the L2 cache,
// a few bytes at each step, that all are there when they are needed and the fetches never queue.
class Fetch {
 public:
  // Fetches `next` during `steps` steps.
  Fetch(Weights next, Index steps) : at_(next.data) {
    if (!next.data || steps == 0) return;
    const Index step = (next.floats + steps - 1) / steps;
    step_ = step < kCacheLine ? (step + 3) / 4 * 4 : step;
    end_ = next.data + next.floats;
  }

  const float* at() const { return at_; }
  Index step() const { return step_; }
  void advance(Index steps) {
    at_ += steps * step_;
    if (at_ >= end_) step_ = 0;
  }

 private:
  const float* at_;
  const float* end_ = nullptr;
  Index step_ = 0;
};

inline Weights piece(Weights of, int index, int pieces) {
  const Index floats = of.floats / pieces;
  return {of.data ? of.data + index * floats : nullptr, floats};
}

// ---------------------------------------------------------------- product of matrices

// y = x * weights + what else there is, for some rows and one panel of output channels.
struct Product {
  const float* x;  // [in_panels, x_panel], of each the first [kRows, kRowStride]
  Index x_panel;   // floats from a panel of input channels to the next
  int in_panels;
  const float* weights;   // [in_panels, kSteps, 32]
  const float* bias;      // [32], or null
  const float* residual;  // [kRows, 32], or null
  bool accumulate;        // y is added, too
  bool relu;
  float* y;  // [kRows, 32]
};

// kSteps: input channels of a panel.
template <int kRows, int kRowStride, int kSteps>
__attribute__((noinline)) void multiply(const Product& of, const float* fetch, Index fetch_step) {
  const Product product = of;  // a copy, that no store can change
  for (int channel = 0; channel < kPanel; channel += kVectors * kLanes) {
    Vec sums[kRows][kVectors] = {};
    const float* weights = product.weights + channel;
    const float* x = product.x;
    for (int panel = 0; panel < product.in_panels; ++panel, x += product.x_panel) {
#pragma GCC unroll 2
      for (int k = 0; k < kSteps; ++k, weights += kPanel) {
        __builtin_prefetch(fetch, 0, 2);
        fetch += fetch_step;
        Vec w[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) w[v] = load(weights + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const float value = x[r * kRowStride + k];
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) sums[r][v] += value * w[v];
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int at = r * kPanel + channel + v * kLanes;
        // Not before all others: the longer a chain of sums, the fewer bits a small sum keeps.
        if (product.bias) sums[r][v] += load(product.bias + channel + v * kLanes);
        if (product.accumulate) sums[r][v] += load(product.y + at);
        if (product.residual) sums[r][v] += load(product.residual + at);
        store(product.y + at, product.relu ? relu(sums[r][v]) : sums[r][v]);
      }
    }
  }
}

using Multiply = void (*)(const Product&, const float* fetch, Index fetch_step);

// `multiply` for 1 ... kMaxRows rows.
template <int kRowStride, int kSteps>
struct Multiplies {
  template <int kRows>
  static constexpr void fill(Multiply* of_rows) {
    if constexpr (kRows > 0) {
      of_rows[kRows] = multiply<kRows, kRowStride, kSteps>;
      fill<kRows - 1>(of_rows);
    }
  }
  Multiply of_rows[kMaxRows + 1] = {};
  constexpr Multiplies() { fill<kMaxRows>(of_rows); }
};

template <int kRowStride, int kSteps>
inline void multiply_rows(int rows, const Product& product, Fetch& fetch) {
  static constexpr Multiplies<kRowStride, kSteps> kMultiplies;
  kMultiplies.of_rows[rows](product, fetch.at(), fetch.step());
  fetch.advance(Index{product.in_panels} * kSteps);
}

// Rows [begin, end) in groups of at most kMaxRows, as equal as can be.
class Groups {
 public:
  Groups(int begin, int end) : begin_(begin), rows_(end - begin) {}
  int count() const { return (rows_ + kMaxRows - 1) / kMaxRows; }
  int begin(int group) const {
    const int base = rows_ / count(), longer = rows_ % count();
    return begin_ + group * base + min(group, longer);
  }

 private:
  int begin_, rows_;
};

// ---------------------------------------------------------------- direct convolution

// What a row of a convolution reads: one input pixel a tap.
class Taps {
 public:
  explicit Taps(const Conv& conv) : conv_(conv) {}

  // Copies the input of rows [begin, end) at a tap, for some panels: [panels, end - begin, 32].
  void copy(int begin, int end, int tap, int panel_begin, int panel_end, float* out) const {
    const Index panel_size = Index{conv_.images} * conv_.in_height * conv_.in_width * kPanel;
    const int rows = end - begin;
    const int border = conv_.kernel / 2;
    const int dy = tap / conv_.kernel - border, dx = tap % conv_.kernel - border;
    for (int row = begin; row < end; ++row, out += kPanel) {
      const int image = row / (conv_.height * conv_.width);
      const int pixel = row % (conv_.height * conv_.width);
      const int y = pixel / conv_.width * conv_.stride + dy;
      const int x = pixel % conv_.width * conv_.stride + dx;
      const bool inside = y >= 0 && y < conv_.in_height && x >= 0 && x < conv_.in_width;
      const Index at = ((Index{image} * conv_.in_height + y) * conv_.in_width + x) * kPanel;
      for (int panel = panel_begin; panel < panel_end; ++panel) {
        const float* from = conv_.input + panel * panel_size + at;
        float* to = out + Index{panel - panel_begin} * rows * kPanel;
        const Vec zero = {};
        for (int c = 0; c < kPanel; c += kLanes) store(to + c, inside ? load(from + c) : zero);
      }
    }
  }

 private:
  const Conv& conv_;
};

// Weights are read block by block, in the order in which they are packed: for kBlockOut output
// channels, for each tap, for kBlockIn input channels [panels of outputs, inputs, 32]. A group of
// rows (14 x 256 floats, 14 KB) then stays in the L1 cache while the block's panels pass by.
//
// kInPlace: the rows are read where they are, which only 1x1 kernels of stride 1 allow; otherwise
// those of a tap are copied together first.
template <bool kInPlace>
void convolve(const Conv& conv, const Part& part) {
  constexpr int kPanelsIn = kBlockIn / kPanel, kPanelsOut = kBlockOut / kPanel;
  const Index in_pixels = Index{conv.images} * conv.in_height * conv.in_width;
  const Index pixels = Index{conv.images} * conv.height * conv.width;
  const int taps = conv.kernel * conv.kernel;
  const Groups groups(part.row_begin, part.row_end);
  const float* bias = conv.weights;
  const float* weights = conv.weights + conv.out_panels * kPanel;

  for (int out = 0; out < conv.out_panels; out += kPanelsOut) {
    const int block_out = min(kPanelsOut, conv.out_panels - out);
    const int begin = max(part.panel_begin, out), end = min(part.panel_end, out + block_out);
    for (int tap = 0; tap < taps; ++tap) {
      for (int in = 0; in < conv.in_panels; in += kPanelsIn) {
        const int block_in = min(kPanelsIn, conv.in_panels - in);
        const Index panel_weights = Index{block_in} * kPanel * kPanel;
        const float* block = weights;
        weights += block_out * panel_weights;
        if (begin >= end) continue;

        const bool first = tap == 0 && in == 0;
        const bool last = tap == taps - 1 && in + block_in == conv.in_panels;
        // The next block is as large, mostly.
        const Weights next{weights + (begin - out) * panel_weights, (end - begin) * panel_weights};
        Fetch fetch(last && end == part.panel_end ? part.next : next,
                    Index{end - begin} * groups.count() * block_in * kPanel);
        for (int group = 0; group < groups.count(); ++group) {
          const int row = groups.begin(group), rows = groups.begin(group + 1) - row;
          const float* x = conv.input + (in * in_pixels + row) * kPanel;
          Index x_panel = in_pixels * kPanel;
          if (!kInPlace) {
            Taps(conv).copy(row, row + rows, tap, in, in + block_in, part.scratch);
            x = part.scratch;
            x_panel = rows * kPanel;
          }
          for (int panel = begin; panel < end; ++panel) {
            const Index at = (panel * pixels + row) * kPanel;
            const Product product{x, x_panel, block_in, block + (panel - out) * panel_weights,
                                  first ? bias + panel * kPanel : nullptr,
                                  // With the first block: the output may be in its place.
                                  first && conv.residual ? conv.residual + at : nullptr, !first,
                                  last && conv.relu, conv.output + at};
            multiply_rows<kPanel, kPanel>(rows, product, fetch);
          }
        }
      }
    }
  }
}

// ---------------------------------------------------------------- Winograd F(2x2, 3x3)

// A tile of the output and what it reads.
struct Tile {
  Tile() = default;
  Tile(const Conv& conv, int tile) {
    const int tiles_in_row = (conv.width + 1) / 2;
    const int tiles_in_image = num_tiles(conv.height, conv.width);
    const int of_image = tile % tiles_in_image;
    y = of_image / tiles_in_row * 2;
    x = of_image % tiles_in_row * 2;
    pixel = (Index{tile / tiles_in_image} * conv.height + y) * conv.width + x;
    reads_border = y == 0 || x == 0 || y + 3 > conv.height || x + 3 > conv.width;
    complete = y + 2 <= conv.height && x + 2 <= conv.width;
  }

  int y, x;
  Index pixel;        // its first, of all images
  bool reads_border;  // of its 4x4 inputs some are outside
  bool complete;      // all of its 2x2 outputs are inside
};

// The 4x4 inputs of a tile at the border, with zeros around: [4, 4, 32].
inline void copy_with_border(const Conv& conv, const Tile& tile, const float* panel, float* out) {
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j, out += kPanel) {
      const int y = tile.y + i - 1, x = tile.x + j - 1;
      const bool inside = y >= 0 && y < conv.height && x >= 0 && x < conv.width;
      const float* from = panel + (tile.pixel + Index{i - 1} * conv.width + j - 1) * kPanel;
      const Vec zero = {};
      for (int c = 0; c < kPanel; c += kLanes) store(out + c, inside ? load(from + c) : zero);
    }
  }
}

inline void transform_inputs(const Conv& conv, const Tile* tiles, int num_tiles, float* out) {
  const Index panel_size = Index{conv.images} * conv.height * conv.width * kPanel;
  const int stride = product_stride(num_tiles);
  const int row = conv.width * kPanel;
  float with_border[4 * 4 * kPanel];
  for (int panel = 0; panel < conv.in_panels; ++panel) {
    const float* input = conv.input + panel * panel_size;
    float* to = out + Index{panel} * kTileProducts * stride;
    for (int t = 0; t < num_tiles; ++t, to += kPanel) {
      const Tile& tile = tiles[t];
      if (tile.reads_border) {
        copy_with_border(conv, tile, input, with_border);
        transform_input<kPanel>(with_border, 4 * kPanel, to, stride);
      } else {
        transform_input<kPanel>(input + (tile.pixel - conv.width - 1) * kPanel, row, to, stride);
      }
    }
  }
}

// Of one panel of output channels.
inline void transform_outputs(const Conv& conv, const Tile* tiles, int num_tiles, int panel,
                              const float* products) {
  const Index panel_size = Index{conv.images} * conv.height * conv.width * kPanel;
  const int stride = product_stride(num_tiles);
  const float* bias = conv.weights + panel * kPanel;
  const float* residual = conv.residual ? conv.residual + panel * panel_size : nullptr;
  float* output = conv.output + panel * panel_size;
  const int row = conv.width * kPanel;
  for (int t = 0; t < num_tiles; ++t, products += kPanel) {
    const Tile& tile = tiles[t];
    const Index at = tile.pixel * kPanel;
    if (tile.complete) {
      for (int c = 0; c < kPanel; c += kLanes) {
        transform_output<kPanel>(products + c, stride, load(bias + c),
                                 residual ? residual + at + c : nullptr, output + at + c, row);
      }
      continue;
    }
    // Heights and widths that are odd: some of the tile's pixels are not there.
    const int rows = min(2, conv.height - tile.y), columns = min(2, conv.width - tile.x);
    float before[4 * kPanel] = {}, after[4 * kPanel];
    for (int pixel = 0; pixel < 4 && residual; ++pixel) {
      if (pixel / 2 >= rows || pixel % 2 >= columns) continue;
      const float* from = residual + at + pixel / 2 * row + pixel % 2 * kPanel;
      for (int c = 0; c < kPanel; ++c) before[pixel * kPanel + c] = from[c];
    }
    for (int c = 0; c < kPanel; c += kLanes) {
      transform_output<kPanel>(products + c, stride, load(bias + c),
                               residual ? before + c : nullptr, after + c, 2 * kPanel);
    }
    for (int pixel = 0; pixel < 4; ++pixel) {
      if (pixel / 2 >= rows || pixel % 2 >= columns) continue;
      float* to = output + at + pixel / 2 * row + pixel % 2 * kPanel;
      for (int c = 0; c < kPanel; ++c) to[c] = after[pixel * kPanel + c];
    }
  }
}

// Weights are [out_panels, 16, inputs, 32]. A panel's 16 products of all tiles of the chunk are
// computed one after the other, then transformed.
void convolve_winograd(const Conv& conv, const Part& part) {
  const Index product_weights = Index{conv.in_panels} * kPanel * kPanel;
  const float* weights = conv.weights + conv.out_panels * kPanel;
  const float* first_weights = weights + part.panel_begin * kTileProducts * product_weights;
  const int tiles = part.row_end - part.row_begin;
  const int at_once = tiles_at_once(conv.in_panels);
  const int chunks = (tiles + at_once - 1) / at_once;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int begin = part.row_begin + static_cast<int>(Index{tiles} * chunk / chunks);
    const int end = part.row_begin + static_cast<int>(Index{tiles} * (chunk + 1) / chunks);
    const int stride = product_stride(end - begin);
    const Groups groups(0, end - begin);
    float* inputs = part.scratch;
    float* products = inputs + Index{conv.in_panels} * kTileProducts * stride;
    Tile tile_of[kMaxTiles];
    for (int t = begin; t < end; ++t) tile_of[t - begin] = Tile(conv, t);
    transform_inputs(conv, tile_of, end - begin, inputs);
    for (int panel = part.panel_begin; panel < part.panel_end; ++panel) {
      for (int i = 0; i < kTileProducts; ++i) {
        const float* own = weights + (Index{panel} * kTileProducts + i) * product_weights;
        const bool last = panel + 1 == part.panel_end && i + 1 == kTileProducts;
        // Beside the last panel's products what comes after the layer is fetched, a piece at each.
        const bool leaves = panel + 1 == part.panel_end && chunk + 1 == chunks;
        const int staying = !leaves ? groups.count() : last ? 0 : (groups.count() + 1) / 2;
        const Index steps = Index{conv.in_panels} * kPanel;  // of a group
        Fetch fetch({last ? first_weights : own + product_weights, product_weights},
                    staying * steps);
        Fetch fetch_after(piece(part.next, i, kTileProducts), (groups.count() - staying) * steps);
        for (int group = 0; group < groups.count(); ++group) {
          const int tile = groups.begin(group);
          const Product product{inputs + i * stride + tile * kPanel,
                                Index{kTileProducts} * stride,
                                conv.in_panels,
                                own,
                                nullptr,
                                nullptr,
                                false,
                                false,
                                products + i * stride + tile * kPanel};
          multiply_rows<kPanel, kPanel>(groups.begin(group + 1) - tile, product,
                                        group < staying ? fetch : fetch_after);
        }
      }
      transform_outputs(conv, tile_of, end - begin, panel, products);
    }
  }
}

// ---------------------------------------------------------------- stem and mean

// The larger of two values; NaN if one is, as torch has it.
inline Vec larger(Vec a, Vec b) { return (b > a) | (b != b) ? b : a; }

// A row of the 7x7 convolution, all panels: [out_panels, conv_width, 32].
inline void convolve_stem_row(const Stem& stem, int image, int row, float* out) {
  constexpr int kSteps = kStemKernel * kImageChannels;
  constexpr int kStride = 2 * kImageChannels;
  const int in_row = (stem.in_width + 2 * kStemBorder) * kImageChannels;
  const float* x =
      stem.input + (Index{image} * (stem.in_height + 2 * kStemBorder) + 2 * row) * in_row;
  const float* weights = stem.weights + stem.out_panels * kPanel;
  const Groups groups(0, stem.conv_width);
  Fetch nothing({}, 1);
  for (int group = 0; group < groups.count(); ++group) {
    const int column = groups.begin(group);
    for (int panel = 0; panel < stem.out_panels; ++panel) {
      const Product product{x + column * kStride,
                            in_row,
                            kStemKernel,
                            weights + panel * kStemKernel * kSteps * kPanel,
                            stem.weights + panel * kPanel,
                            nullptr,
                            false,
                            true,
                            out + (Index{panel} * stem.conv_width + column) * kPanel};
      multiply_rows<kStride, kSteps>(groups.begin(group + 1) - column, product, nothing);
    }
  }
}

// The rows that a row of pooled pixels reads are computed when it needs them, and the last of
// them serves the next one too; a ring of them lies in scratch memory.
void convolve_stem(const Stem& stem, const Part& part) {
  const Index conv_row = Index{stem.out_panels} * stem.conv_width * kPanel;
  int computed = -1;  // the last row that is in the ring, of all images
  for (int row = part.row_begin; row < part.row_end; ++row) {
    const int image = row / stem.height, y = row % stem.height;
    const int first = max(2 * y - 1, 0), last = min(2 * y + 1, stem.conv_height - 1);
    for (int i = first; i <= last; ++i) {
      const int of_all = image * stem.conv_height + i;
      if (of_all <= computed) continue;
      convolve_stem_row(stem, image, i, part.scratch + i % kStemRing * conv_row);
      computed = of_all;
    }
    for (int panel = 0; panel < stem.out_panels; ++panel) {
      float* out = stem.output +
                   ((Index{panel} * stem.images + image) * stem.height + y) * stem.width * kPanel;
      for (int x = 0; x < stem.width; ++x, out += kPanel) {
        const int left = max(2 * x - 1, 0), right = min(2 * x + 1, stem.conv_width - 1);
        for (int c = 0; c < kPanel; c += kLanes) {
          Vec most = {};  // what is pooled is not negative
          for (int i = first; i <= last; ++i) {
            const float* from = part.scratch + i % kStemRing * conv_row +
                                Index{panel} * stem.conv_width * kPanel + c;
            for (int j = left; j <= right; ++j) most = larger(most, load(from + j * kPanel));
          }
          store(out + c, most);
        }
      }
    }
  }
}

void average(const Mean& mean, const Part& part) {
  const float pixels = static_cast<float>(mean.pixels);
  for (int panel = part.panel_begin; panel < part.panel_end; ++panel) {
    for (int image = 0; image < mean.images; ++image) {
      const Index of_panel = Index{panel} * mean.images + image;
      const float* x = mean.input + of_panel * mean.pixels * kPanel;
      Vec sums[kPanel / kLanes] = {};
      for (int pixel = 0; pixel < mean.pixels; ++pixel, x += kPanel) {
#pragma GCC unroll 8
        for (int v = 0; v < kPanel / kLanes; ++v) sums[v] += load(x + v * kLanes);
      }
      for (int v = 0; v < kPanel / kLanes; ++v) {
        store(mean.output + of_panel * kPanel + v * kLanes, sums[v] / pixels);
      }
    }
  }
}

constexpr Kernels make_kernels(const char* name) {
  return {name, convolve<true>, convolve<false>, convolve_winograd, convolve_stem, average};
}

}  // namespace
}  // namespace blockdrop::walk_imagenet
