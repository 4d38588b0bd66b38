// What the parts of the CPU walk of ImageNet networks share: the kernels that exist once for each
// instruction set (walk_imagenet_kernels.h, compiled by walk_imagenet_<isa>.cpp) and the program
// that calls them (walk_imagenet.cpp).
//
// Activations lie in panels of 32 channels, [channels / 32, pixels, 32], without a border; the
// pixels are those of one image or of several, [images, height, width]. So every convolution is
// a product of matrices whose rows are 32 floats apart, however many channels there are, and a
// panel of its output is contiguous. Channels are filled up to whole panels with zeros.

#pragma once

#include <cstddef>

namespace blockdrop::walk_imagenet {

using Index = std::ptrdiff_t;

constexpr int kPanel = 32;
constexpr int kImageChannels = 3;
constexpr int kTileProducts = 16;  // of a tile in Winograd's form, see winograd.h

// The stem: a 7x7 convolution of stride 2, then 3x3 max pooling of stride 2.
constexpr int kStemKernel = 7;
constexpr int kStemBorder = 3;

// Packed weights of a convolution are cut into blocks of so many input and output channels, 512
// KB, which stay in the L2 cache (1 MB and more a core) while all rows are multiplied by them.
// Chains of 256 products also keep rounding errors below PyTorch's.
constexpr int kBlockIn = 256;
constexpr int kBlockOut = 512;

// Rows that a kernel multiplies at once, at most, with any instruction set.
constexpr int kMostRows = 14;

// Winograd's tiles of 2x2 output pixels are handled in chunks. The transformed inputs of a chunk,
// [in_panels, 16, tiles, 32], and the products of one panel of output channels, [16, tiles, 32],
// lie in scratch memory and should stay in the L2 cache: 49 tiles with 256 channels, the image of
// 14x14 pixels, are 803 KB + 100 KB.
constexpr int kMaxTiles = 56;
constexpr int kMinTiles = kMostRows;
constexpr int kScratchPanels = 49 * 8;  // tiles * in_panels

constexpr int tiles_at_once(int in_panels) {
  const int fitting = kScratchPanels / in_panels;
  return fitting < kMinTiles ? kMinTiles : fitting > kMaxTiles ? kMaxTiles : fitting;
}

// Floats from one of a chunk's transformed inputs (or products) to the next. The 16 more keep the
// 16 of a tile out of the same set of the L1 cache.
constexpr int product_stride(int tiles) { return tiles * kPanel + 16; }

constexpr int num_tiles(int height, int width) { return ((height + 1) / 2) * ((width + 1) / 2); }

// Floats of scratch memory that the kernels use.
constexpr Index kDirectScratch = kMostRows * kBlockIn;

constexpr Index winograd_scratch(int in_panels) {
  return Index{kTileProducts} * (in_panels + 1) * product_stride(tiles_at_once(in_panels));
}

constexpr int kStemRing = 3;  // rows of the stem's convolution that one row of pooled pixels reads

constexpr Index stem_scratch(int conv_width, int out_panels) {
  return Index{kStemRing} * out_panels * conv_width * kPanel;
}

// Packed weights that are read one after the other.
struct Weights {
  const float* data = nullptr;  // null: none
  Index floats = 0;
};

// A part of one layer: rows [row_begin, row_end) of its output, of its panels [panel_begin,
// panel_end). A row is a pixel, in Winograd's form a tile, of the stem a row of pooled pixels.
// Every output element is the same sum in the same order however a layer is cut into parts.
struct Part {
  int row_begin, row_end;
  int panel_begin, panel_end;
  float* scratch;     // the calling thread's own, of the size that the kernel uses
  Weights next = {};  // those that the thread will probably read next
};

// output = convolution(input) + bias + residual, and relu of it
struct Conv {
  const float* input;     // [in_panels, images * in_height * in_width, 32]
  const float* weights;   // [out_panels, 32] bias, then blocks, see ops/walk_imagenet.py
  const float* residual;  // like output, may be it; or null
  float* output;          // [out_panels, images * height * width, 32]
  int in_panels, out_panels;
  int images;
  int in_height, in_width;
  int height, width;  // of the output
  int kernel, stride;
  bool relu;
};

struct Stem {
  const float* input;    // [images, in_height + 6, in_width + 6, 3], a border of zeros
  const float* weights;  // [out_panels, 32] bias, then [out_panels, 7, 7, 3, 32]
  float* output;         // [out_panels, images * height * width, 32]
  int out_panels;
  int images;
  int in_height, in_width;
  int conv_height, conv_width;
  int height, width;
};

// output = mean(input over pixels)
struct Mean {
  const float* input;  // [panels, images * pixels, 32]
  float* output;       // [panels, images, 32]
  int panels, images, pixels;
};

struct Kernels {
  const char* name;
  // 1x1, stride 1; rows are pixels.
  void (*pointwise)(const Conv&, const Part&);
  // Any kernel and stride, its padding half of the kernel; rows are pixels.
  void (*direct)(const Conv&, const Part&);
  // 3x3, stride 1, with relu, weights in Winograd's form; rows are tiles of 2x2 pixels.
  void (*winograd)(const Conv&, const Part&);
  void (*stem)(const Stem&, const Part&);
  void (*mean)(const Mean&, const Part&);  // uses the panels of the part
};

// The last two where the build has them, see csrc/README.md.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace blockdrop::walk_imagenet
