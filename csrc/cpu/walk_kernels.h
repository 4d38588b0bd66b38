// The arithmetic of the CPU walk, written once with the compiler's vector types and compiled for
// each instruction set by walk_<isa>.cpp.
//
// Everything here has internal linkage and nothing of the standard library is included: an
// inline function compiled with AVX-512 must not be the one the linker picks for everybody.

#pragma once

#include "cpu/walk.h"

namespace blockdrop::walk {
namespace {

// Floats in a vector register, and vectors of output channels and pixels whose sums are kept in
// registers at once. A multiply-add reads one input value for kVectors of them, a load of weights
// serves kPixels; the sums have to cover the latency of the multiply-adds (4 cycles, 2 a cycle)
// and to leave registers for kVectors weights and an input value.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kMaxVectors = 2;  // of 32 registers 16 are sums
constexpr int kSums = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kMaxVectors = 2;  // of 16 registers 8 are sums
constexpr int kSums = 8;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kMaxVectors = 4;  // of 32 registers 16 are sums
constexpr int kSums = 16;
#else
constexpr int kLanes = 4;
constexpr int kMaxVectors = 2;  // of 16 registers (SSE) 8 are sums
constexpr int kSums = 8;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
// The same in memory, at any address of a float.
typedef float VecInMemory __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const VecInMemory*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<VecInMemory*>(p) = v; }

inline Vec relu(Vec v) {
  const Vec zero = {};
  return zero > v ? zero : v;  // in this order NaN stays NaN
}

// One output pixel after the other, kPixels at a time: sums += input * weights over 3x3 taps.
template <int kIn, int kOut, int kStride, int kPixels, int kVectors>
inline void convolve_pixels(const float* x,         // [3.., x_row] at the first tap
                            const float* weights,   // [3, 3, kIn, block_channels(kOut)]
                            const float* bias,      // [kVectors * kLanes]
                            const float* residual,  // [kPixels, kOut] or null
                            float* y,               // [kPixels, kOut]
                            int x_row) {
  constexpr int kBlock = block_channels(kOut);
  Vec sums[kPixels][kVectors];
#pragma GCC unroll 16
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[p][v] = load(bias + v * kLanes);
  }
  for (int ky = 0; ky < 3; ++ky) {
    for (int kx = 0; kx < 3; ++kx) {
      const float* tap = x + ky * x_row + kx * kIn;
      for (int c = 0; c < kIn; ++c, weights += kBlock) {
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
  constexpr int kBlock = block_channels(kOut);
  constexpr int kVectors = kBlock / kLanes < kMaxVectors ? kBlock / kLanes : kMaxVectors;
  constexpr int kPixels = kSums / kVectors;
  const int x_row = (conv.width * kStride + 2) * kIn;
  const int y_row = (conv.width + 2) * kOut;
  for (int block = part.block_begin; block < part.block_end; ++block) {
    const float* weights = conv.weights + kOut + block * 9 * kIn * kBlock;
    for (int row = part.row_begin; row < part.row_end; ++row) {
      const float* x = conv.input + row * kStride * x_row;
      for (int channel = 0; channel < kBlock; channel += kVectors * kLanes) {
        const int out = block * kBlock + channel;
        const int at = (row + 1) * y_row + kOut + out;
        convolve_row<kIn, kOut, kStride, kPixels, kVectors>(
            x, weights + channel, conv.weights + out, conv.residual ? conv.residual + at : nullptr,
            conv.output + at, x_row, 0, conv.width);
      }
    }
  }
}

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

  const int classes = classifier.padded_classes;
  for (int j = 0; j < classes; j += kLanes) {
    Vec sum = load(classifier.weights + j);
    for (int c = 0; c < kChannels; ++c) {
      sum += mean[c] * load(classifier.weights + (c + 1) * classes + j);
    }
    store(classifier.logits + j, sum);
  }
}

constexpr Kernels make_kernels(const char* name) {
  return {name,
          convolve<3, 16, 1>,
          {convolve<16, 16, 1>, convolve<32, 32, 1>, convolve<64, 64, 1>},
          {nullptr, convolve<16, 32, 2>, convolve<32, 64, 2>},
          shorten,
          classify};
}

}  // namespace
}  // namespace blockdrop::walk
