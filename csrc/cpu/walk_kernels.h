// The arithmetic of the CPU walk, written once with the compiler's vector types and compiled for
// each instruction set by walk_<isa>.cpp.
//
// Everything here has internal linkage and nothing of the standard library is included: an
// inline function compiled with AVX-512 must not be the one the linker picks for everybody.

#pragma once

#include "cpu/vectors.h"
#include "cpu/walk.h"
#include "cpu/winograd.h"

namespace blockdrop::walk {
namespace {

// Vectors of output channels and pixels whose sums are kept in registers at once. A multiply-add
// reads one input value for kVectors of them, a load of weights serves kPixels; the sums have to
// cover the latency of the multiply-adds (4 cycles, 2 a cycle) and to leave registers for kVectors
// weights and an input value.
#if defined(__AVX512F__)
constexpr int kMaxVectors = 2;  // of 32 registers 16 are sums
constexpr int kSums = 16;
#elif defined(__AVX__)
constexpr int kMaxVectors = 2;  // of 16 registers 8 are sums
constexpr int kSums = 8;
#elif defined(__aarch64__)
constexpr int kMaxVectors = 4;  // of 32 registers 16 are sums
constexpr int kSums = 16;
#else
constexpr int kMaxVectors = 2;  // of 16 registers (SSE) 8 are sums
constexpr int kSums = 8;
#endif

// Vectors of output channels that are summed up at once.
constexpr int vectors_at_once(int channels) {
  const int vectors = panel_channels(channels) / kLanes;
  return vectors < kMaxVectors ? vectors : kMaxVectors;
}

// ---------------------------------------------------------------- direct convolution

// One output pixel after the other, kPixels at a time: sums += input * weights over 3x3 taps.
template <int kIn, int kOut, int kStride, int kPixels, int kVectors>
inline void convolve_pixels(const float* x,         // [3.., x_row] at the first tap
                            const float* weights,   // [3, 3, kIn, panel_channels(kOut)]
                            const float* bias,      // [kVectors * kLanes]
                            const float* residual,  // [kPixels, kOut] or null
                            float* y,               // [kPixels, kOut]
                            int x_row) {
  constexpr int kPanel = panel_channels(kOut);
  Vec sums[kPixels][kVectors];
#pragma GCC unroll 16
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[p][v] = load(bias + v * kLanes);
  }
  for (int ky = 0; ky < 3; ++ky) {
    for (int kx = 0; kx < 3; ++kx) {
      const float* tap = x + ky * x_row + kx * kIn;
      for (int c = 0; c < kIn; ++c, weights += kPanel) {
        Vec w[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) w[v] = load(weights + v * kLanes);
#pragma GCC unroll 16
        for (int p = 0; p < kPixels; ++p) {
          const float value = tap[p * kStride * kIn + c];
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) sums[p][v] += value * w[v];
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int at = p * kOut + v * kLanes;
      if (residual) sums[p][v] += load(residual + at);
      store(y + at, relu(sums[p][v]));
    }
  }
}

// Output pixels [column, width) of one row and kVectors vectors of channels; what is left after
// groups of kPixels goes in smaller groups.
template <int kIn, int kOut, int kStride, int kPixels, int kVectors>
inline void convolve_row(const float* x, const float* weights, const float* bias,
                         const float* residual, float* y, int x_row, int column, int width) {
  for (; column + kPixels <= width; column += kPixels) {
    convolve_pixels<kIn, kOut, kStride, kPixels, kVectors>(
        x + column * kStride * kIn, weights, bias, residual ? residual + column * kOut : nullptr,
        y + column * kOut, x_row);
  }
  if constexpr (kPixels > 1) {
    convolve_row<kIn, kOut, kStride, kPixels / 2, kVectors>(x, weights, bias, residual, y, x_row,
                                                            column, width);
  }
}

template <int kIn, int kOut, int kStride>
void convolve(const Conv& conv, const Part& part) {
  constexpr int kPanel = panel_channels(kOut);
  constexpr int kVectors = vectors_at_once(kOut);
  constexpr int kPixels = kSums / kVectors;
  const int x_row = (conv.width * kStride + 2) * kIn;
  const int y_row = (conv.width + 2) * kOut;
  for (int panel = part.panel_begin; panel < part.panel_end; ++panel) {
    const float* weights = conv.weights + kOut + panel * 9 * kIn * kPanel;
    for (int row = part.row_begin; row < part.row_end; ++row) {
      const float* x = conv.input + row * kStride * x_row;
      for (int channel = 0; channel < kPanel; channel += kVectors * kLanes) {
        const int out = panel * kPanel + channel;
        const int at = (row + 1) * y_row + kOut + out;
        convolve_row<kIn, kOut, kStride, kPixels, kVectors>(
            x, weights + channel, conv.weights + out, conv.residual ? conv.residual + at : nullptr,
            conv.output + at, x_row, 0, conv.width);
      }
    }
  }
}

// ---------------------------------------------------------------- Winograd F(2x2, 3x3)

// One of the 16 products for tiles [tile, num_tiles) and kVectors vectors of output channels; what
// is left after groups of kPixels goes in smaller groups.
//
// A deep network's weights in this form (12 MB for ResNet-110) crowd the L3 cache, and the
// hardware's prefetching does not hide what a miss costs: without prefetching the next product's
// weights here, 64 channels run at less than half the speed when the weights are not in L3.
template <int kChannels, int kPixels, int kVectors>
inline void multiply(const float* x,        // [num_tiles, kChannels]
                     const float* weights,  // [kChannels, panel_channels(kChannels)]
                     float* y,              // [num_tiles, kChannels]
                     int tile, int num_tiles) {
  constexpr int kPanel = panel_channels(kChannels);
  constexpr int kCacheLine = 16;
  for (; tile + kPixels <= num_tiles; tile += kPixels) {
    Vec sums[kPixels][kVectors] = {};
#pragma GCC unroll 2
    for (int c = 0; c < kChannels; ++c) {
      const float* row = weights + c * kPanel;
      if (kChannels > 16 && tile == 0) {
#pragma GCC unroll 4
        for (int i = 0; i < kVectors * kLanes; i += kCacheLine) {
          __builtin_prefetch(row + kChannels * kPanel + i);
        }
      }
      Vec w[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) w[v] = load(row + v * kLanes);
#pragma GCC unroll 16
      for (int p = 0; p < kPixels; ++p) {
        const float value = x[(tile + p) * kChannels + c];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[p][v] += value * w[v];
      }
    }
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        store(y + (tile + p) * kChannels + v * kLanes, sums[p][v]);
      }
    }
  }
  if constexpr (kPixels > 1) {
    multiply<kChannels, kPixels / 2, kVectors>(x, weights, y, tile, num_tiles);
  }
}

// A layer with even height and width.
template <int kChannels>
void convolve_winograd(const Conv& conv, const Part& part) {
  constexpr int kPanel = panel_channels(kChannels);
  constexpr int kVectors = vectors_at_once(kChannels);
  constexpr int kStride = product_stride(kChannels);
  const int row = (conv.width + 2) * kChannels;
  const int tiles_in_row = conv.width / 2;
  const int first_tile = part.row_begin / 2 * tiles_in_row;
  const int last_tile = part.row_end / 2 * tiles_in_row;
  const float* all_weights = conv.weights + kChannels + 9 * kChannels * kChannels;
  float* inputs = part.scratch;
  float* products = part.scratch + kTileProducts * kStride;
  for (int begin = first_tile; begin < last_tile; begin += kTiles) {
    const int num_tiles = last_tile - begin < kTiles ? last_tile - begin : kTiles;
    for (int t = 0; t < num_tiles; ++t) {
      const int y = (begin + t) / tiles_in_row * 2;
      const int x = (begin + t) % tiles_in_row * 2;
      transform_input<kChannels>(conv.input + y * row + x * kChannels, row, inputs + t * kChannels,
                                 kStride);
    }
    for (int panel = part.panel_begin; panel < part.panel_end; ++panel) {
      for (int i = 0; i < kTileProducts; ++i) {
        const float* weights = all_weights + (panel * kTileProducts + i) * kChannels * kPanel;
        for (int channel = 0; channel < kPanel; channel += kVectors * kLanes) {
          multiply<kChannels, kSums / kVectors, kVectors>(
              inputs + i * kStride, weights + channel,
              products + i * kStride + panel * kPanel + channel, 0, num_tiles);
        }
      }
    }
    for (int t = 0; t < num_tiles; ++t) {
      const int y = (begin + t) / tiles_in_row * 2;
      const int x = (begin + t) % tiles_in_row * 2;
      const int at = (y + 1) * row + (x + 1) * kChannels;
      for (int c = part.panel_begin * kPanel; c < part.panel_end * kPanel; c += kLanes) {
        transform_output<kChannels>(products + t * kChannels + c, kStride, load(conv.weights + c),
                                    conv.residual ? conv.residual + at + c : nullptr,
                                    conv.output + at + c, row);
      }
    }
  }
}

template <int kChannels>
void convolve_same(const Conv& conv, const Part& part) {
  if (conv.height % 2 == 0 && conv.width % 2 == 0) {
    convolve_winograd<kChannels>(conv, part);
  } else {
    convolve<kChannels, kChannels, 1>(conv, part);
  }
}

// ---------------------------------------------------------------- shortcut and classifier

void shorten(const Shortcut& shortcut, const Part& part) {
  const int channels = shortcut.channels;
  const int x_row = (2 * shortcut.width + 2) * channels;
  const int y_row = (shortcut.width + 2) * 2 * channels;
  const int before = shortcut.subsample ? channels / 2 : 0;
  for (int row = part.row_begin; row < part.row_end; ++row) {
    const float* x = shortcut.input + (2 * row + 1) * x_row + channels;
    float* y = shortcut.output + (row + 1) * y_row + 2 * channels;
    for (int column = 0; column < shortcut.width; ++column) {
      for (int c = 0; c < before; ++c) y[c] = 0;
      for (int c = 0; c < channels; c += kLanes) {
        Vec value = load(x + c);
        if (!shortcut.subsample) {
          value += load(x + channels + c);
          value += load(x + x_row + c);
          value += load(x + x_row + channels + c);
          value *= 0.25f;
        }
        store(y + before + c, value);
      }
      for (int c = before + channels; c < 2 * channels; ++c) y[c] = 0;
      x += 2 * channels;
      y += 2 * channels;
    }
  }
}

void linear(const float* weights, const float* mean, int channels, int classes, float* logits) {
  for (int j = 0; j < classes; j += kLanes) {
    Vec sum = load(weights + j);
    for (int c = 0; c < channels; ++c) sum += mean[c] * load(weights + (c + 1) * classes + j);
    store(logits + j, sum);
  }
}

void classify(const Classifier& classifier) {
  constexpr int kChannels = 64;
  constexpr int kVectors = kChannels / kLanes;
  const int row = (classifier.width + 2) * kChannels;
  Vec sums[kVectors] = {};
  for (int y = 0; y < classifier.height; ++y) {
    const float* x = classifier.input + (y + 1) * row + kChannels;
    for (int column = 0; column < classifier.width; ++column, x += kChannels) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sums[v] += load(x + v * kLanes);
    }
  }
  float mean[kChannels];
  const float pixels = static_cast<float>(classifier.height * classifier.width);
  for (int v = 0; v < kVectors; ++v) store(mean + v * kLanes, sums[v] / pixels);

  linear(classifier.weights, mean, kChannels, classifier.padded_classes, classifier.logits);
}

// ---------------------------------------------------------------- what gates look at

void sum_rows(const RowSums& rows, const Part& part) {
  const int channels = rows.channels, panel = panel_channels(channels);
  constexpr int kChains = 4;  // of additions that do not wait for each other
  for (int row = part.row_begin; row < part.row_end; ++row) {
    const float* x = rows.input + ((row + 1) * (rows.width + 2) + 1) * channels;
    for (int c = part.panel_begin * panel; c < part.panel_end * panel; c += kLanes) {
      Vec sums[kChains] = {};
      int column = 0;
      for (; column + kChains <= rows.width; column += kChains) {
#pragma GCC unroll 4
        for (int i = 0; i < kChains; ++i) sums[i] += load(x + (column + i) * channels + c);
      }
      for (; column < rows.width; ++column) sums[0] += load(x + column * channels + c);
      store(rows.sums + row * channels + c, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
  }
}

void mean_of_rows(const float* sums, int rows, int channels, int pixels, float* mean) {
  for (int c = 0; c < channels; c += kLanes) {
    Vec sum = {};
    for (int row = 0; row < rows; ++row) sum += load(sums + row * channels + c);
    store(mean + c, sum / static_cast<float>(pixels));
  }
}

float score(const float* gate, const float* mean, int channels) {
  Vec products = {};
  for (int c = 0; c < channels; c += kLanes) products += load(gate + 1 + c) * load(mean + c);
  float lanes[kLanes];
  store(lanes, products);
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  }
  return gate[0] + lanes[0];
}

// ---------------------------------------------------------------- what gates ask for

template <bool kHasSum>
void blend_rows(const Blend& blend, const Part& part) {
  const int channels = blend.channels, panel = panel_channels(channels);
  for (int row = part.row_begin; row < part.row_end; ++row) {
    for (int column = 0; column < blend.width; ++column) {
      const int at = ((row + 1) * (blend.width + 2) + column + 1) * channels;
      for (int c = part.panel_begin * panel; c < part.panel_end * panel; c += kLanes) {
        Vec value = blend.share * load(blend.input + at + c);
        if (kHasSum) value = load(blend.sum + at + c) + value;
        store(blend.output + at + c, value);
      }
    }
  }
}

void blend(const Blend& arguments, const Part& part) {
  arguments.sum ? blend_rows<true>(arguments, part) : blend_rows<false>(arguments, part);
}

void average_pool(const AveragePool& pool, const Part& part) {
  constexpr int kChannels = 16;
  const int x_row = (pool.columns * pool.width + 2) * kChannels;
  const float scale = 1.f / static_cast<float>(pool.rows * pool.columns);
  for (int row = part.row_begin; row < part.row_end; ++row) {
    const float* x = pool.input + (pool.rows * row + 1) * x_row + kChannels;
    float* y = pool.output + ((row + 1) * (pool.width + 2) + 1) * kChannels;
    for (int column = 0; column < pool.width; ++column, y += kChannels) {
      for (int c = 0; c < kChannels; c += kLanes) {
        Vec sum = {};
        for (int i = 0; i < pool.rows; ++i) {
          for (int j = 0; j < pool.columns; ++j) sum += load(x + i * x_row + j * kChannels + c);
        }
        store(y + c, sum * scale);
      }
      x += pool.columns * kChannels;
    }
  }
}

constexpr Kernels make_kernels(const char* name) {
  return {name,
          convolve<3, 16, 1>,
          {convolve_same<16>, convolve_same<32>, convolve_same<64>},
          {nullptr, convolve<16, 32, 2>, convolve<32, 64, 2>},
          shorten,
          classify,
          sum_rows,
          blend,
          average_pool,
          mean_of_rows,
          score,
          linear};
}

}  // namespace
}  // namespace blockdrop::walk
