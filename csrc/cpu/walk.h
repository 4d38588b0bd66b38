// What the parts of the CPU walk share: the kernels that exist once for each instruction set
// (walk_kernels.h, compiled by walk_<isa>.cpp) and the programs that call them (walk_program.h).
//
// Activations are padded channels-last: [height + 2, width + 2, channels], a border of zeros
// around the image, so that no convolution tests where it is.

#pragma once

namespace blockdrop::walk {

// A panel: output channels that are stored together in packed weights.
constexpr int kPanelChannels = 32;

constexpr int panel_channels(int channels) {
  return channels < kPanelChannels ? channels : kPanelChannels;
}

// Winograd's F(2x2, 3x3) computes 2x2 output pixels from a tile of 4x4 input pixels with 16
// multiplications instead of 36. Tiles are handled in groups: the kTileProducts transformed inputs
// of a group, and as many products, lie in scratch memory, 2 x 16 x 16 x 64 floats = 128 KB for 64
// channels. A group of 16 is one row of tiles with 16 channels (32 KB), the whole image with 64.
constexpr int kTiles = 16;
constexpr int kTileProducts = 16;

// Floats from one of a group's transformed inputs (or products) to the next. The 16 more keep the
// 16 of a tile out of the same set of the L1 cache.
constexpr int product_stride(int channels) { return kTiles * channels + 16; }
constexpr int kScratchFloats = 2 * kTileProducts * product_stride(64);

// A part of one layer: rows [row_begin, row_end) of the output, where row_begin is even and
// row_end is even or the height, and of its panels [panel_begin, panel_end). Every output
// element is the same sum in the same order however a layer is cut into parts.
struct Part {
  int row_begin, row_end;
  int panel_begin, panel_end;
  float* scratch;  // [kScratchFloats], the calling thread's own
};

// output = relu(convolution(input) + bias + residual)
struct Conv {
  const float* input;     // [stride * height + 2, stride * width + 2, in_channels]
  const float* weights;   // [out_channels] bias, then [out_channels / p, 3, 3, in_channels, p],
                          // where p = panel_channels(out_channels), then, if in_channels ==
                          // out_channels, Winograd's [out_channels / p, 4, 4, in_channels, p]
  const float* residual;  // [height + 2, width + 2, out_channels], may be the output; or null
  float* output;          // [height + 2, width + 2, out_channels]
  int height, width;      // of the output
};

// The shortcut of a block that halves the image and doubles the channels.
struct Shortcut {
  const float* input;  // [2 * height + 2, 2 * width + 2, channels]
  float* output;       // [height + 2, width + 2, 2 * channels]
  int height, width;   // of the output
  int channels;        // of the input
  bool subsample;      // every second pixel, zero channels on both sides; else average pooling,
                       // zero channels behind
};

// logits = weights * mean(input over pixels) + bias
struct Classifier {
  const float* input;    // [height + 2, width + 2, 64]
  const float* weights;  // [padded_classes] bias, then [64, padded_classes]
  float* logits;         // [padded_classes]
  int height, width;
  int padded_classes;  // a multiple of 16
};

// sums[y] = sum(input[y] over the pixels of the row), the rows and panels of a part. In rows, so
// that whoever has computed a part of a layer can add it up while it is in its cache.
struct RowSums {
  const float* input;  // [height + 2, width + 2, channels]
  float* sums;         // [height, channels]
  int width;
  int channels;  // 16, 32 or 64
};

// output = share * input, + sum; the rows and panels of a part.
struct Blend {
  const float* input;  // [height + 2, width + 2, channels]
  const float* sum;    // the same, or null
  float share;
  float* output;  // the same, may be any of the two
  int width;
  int channels;
};

// output = mean of each [rows, columns] of the input, 1 or 2 of each; the rows of a part.
struct AveragePool {
  const float* input;  // [rows * height + 2, columns * width + 2, 16]
  float* output;       // [height + 2, width + 2, 16]
  int width;           // of the output
  int rows, columns;
};

struct Kernels {
  const char* name;
  void (*stem)(const Conv&, const Part&);              // 3 -> 16 channels
  void (*convs[3])(const Conv&, const Part&);          // 16, 32, 64 channels
  void (*strided_convs[3])(const Conv&, const Part&);  // null, 16 -> 32, 32 -> 64, stride 2
  void (*shortcut)(const Shortcut&, const Part&);      // uses the rows of the part
  void (*classifier)(const Classifier&);
  void (*row_sums)(const RowSums&, const Part&);
  void (*blend)(const Blend&, const Part&);
  void (*average_pool)(const AveragePool&, const Part&);
  // mean = (sum of sums [rows, channels] over rows) / pixels
  void (*mean)(const float* sums, int rows, int channels, int pixels, float* mean);
  // gate [1 + channels]: bias, then weights -> bias + weights * mean
  float (*score)(const float* gate, const float* mean, int channels);
  // logits [classes] = weights [1 + channels, classes] (the bias first) * mean, classes a multiple
  // of 16
  void (*linear)(const float* weights, const float* mean, int channels, int classes, float* logits);
};

// The last two where the build has them, see csrc/README.md.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace blockdrop::walk
