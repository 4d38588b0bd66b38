// Winograd's F(2x2, 3x3): 2x2 output pixels of a 3x3 convolution from a tile of 4x4 input pixels,
// with 16 multiplications instead of 36. The transforms of A. Lavin and S. Gray, "Fast Algorithms
// for Convolutional Neural Networks" (2016), section 4.1: Y = A^T [(G g G^T) * (B^T d B)] A. The
// larger F(4x4, 3x3) would multiply less still, but its rounding errors are beyond the project's
// tolerance.

#pragma once

#include "cpu/vectors.h"

namespace blockdrop {
namespace {

// B^T d B of one tile.
template <int kChannels>
inline void transform_input(const float* x,  // [4.., x_row] at the tile's first pixel
                            int x_row,
                            float* out,  // [16, product_stride]
                            int product_stride) {
  for (int c = 0; c < kChannels; c += kLanes) {
    Vec rows[4][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const float* column = x + j * kChannels + c;
      const Vec x0 = load(column);
      const Vec x1 = load(column + x_row);
      const Vec x2 = load(column + 2 * x_row);
      const Vec x3 = load(column + 3 * x_row);
      rows[0][j] = x0 - x2;
      rows[1][j] = x1 + x2;
      rows[2][j] = x2 - x1;
      rows[3][j] = x1 - x3;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      float* row = out + 4 * i * product_stride + c;
      store(row, rows[i][0] - rows[i][2]);
      store(row + product_stride, rows[i][1] + rows[i][2]);
      store(row + 2 * product_stride, rows[i][2] - rows[i][1]);
      store(row + 3 * product_stride, rows[i][1] - rows[i][3]);
    }
  }
}

// A^T m A of one tile and one vector of channels, then what follows every convolution.
template <int kChannels>
inline void transform_output(const float* products,  // [16, product_stride]
                             int product_stride, Vec bias,
                             const float* residual,  // like y, or null
                             float* y,               // [2, y_row]
                             int y_row) {
  Vec rows[2][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const float* column = products + j * product_stride;
    const Vec m0 = load(column);
    const Vec m1 = load(column + 4 * product_stride);
    const Vec m2 = load(column + 8 * product_stride);
    const Vec m3 = load(column + 12 * product_stride);
    rows[0][j] = m0 + (m1 + m2);
    rows[1][j] = (m1 - m2) - m3;
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const Vec* row = rows[i];
    Vec left = row[0] + (row[1] + row[2]) + bias;
    Vec right = (row[1] - row[2]) - row[3] + bias;
    if (residual) {
      left += load(residual + i * y_row);
      right += load(residual + i * y_row + kChannels);
    }
    store(y + i * y_row, relu(left));
    store(y + i * y_row + kChannels, relu(right));
  }
}

}  // namespace
}  // namespace blockdrop
