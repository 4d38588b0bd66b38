// A packed ImageNet network, and the sizes of its activations.

#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "cpu/walk_imagenet.h"

namespace blockdrop::walk_imagenet {

// A network as an operator's arguments describe it; ops/walk_imagenet.py says what they are.
struct Description {
  const at::Tensor& weights;
  bool bottleneck;
  at::IntArrayRef layers, channels, widths;
  int64_t num_classes;
  int64_t winograd;
};

struct PackedConv {
  const float* weights = nullptr;  // null: there is no such convolution
  int in_panels = 0, out_panels = 0;
  int kernel = 0, stride = 0;
  bool winograd = false;
};

struct Block {
  int segment;
  std::vector<PackedConv> convs;  // two or three; a ReLU follows each
  PackedConv projection;
};

struct Network {
  int num_segments;
  int num_blocks;
  int num_classes;
  PackedConv stem;
  std::vector<Block> blocks;  // [num_blocks]
  PackedConv classifier;
};

// Raises TypeError or ValueError; `name` is that of the weights' argument.
Network read_network(const char* name, const Description& description);

}  // namespace blockdrop::walk_imagenet
