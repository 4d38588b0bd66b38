// The program of an image that is decided on while it walks.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "cpu/walk_program.h"

namespace blockdrop::walk {

// What one image's program reads and writes, its rows of the operator's tensors.
struct Rows {
  bool* decisions;      // [num_blocks]
  const float* shares;  // [num_blocks], of the outputs of a segment's kept blocks in what it gives;
                        // null: it gives the last of them
  float* logits;        // [num_classes]
};

// What decides on one image's way. Each thread that walks the image has a gate of its own; what
// they share is `Rows`, which a gate writes in steps only: whoever runs such a step, all that come
// after it read the same.
class Gate {
 public:
  virtual ~Gate() = default;
  // Whether `decide` looks at the mean of the input of `block` (of num_blocks: the classifier's).
  virtual bool looks_at(int block) const = 0;
  // Called whenever the input of `block` is new. From then on its decision has to be known, and
  // those of blocks after it as long as none is kept or changes the shape. False: the image goes no
  // further and has its logits.
  virtual bool decide(int block) = 0;
};

// Walks one image to its logits. Without a gate `rows` says all.
void walk_gated(Walker& walker, const Rows& rows, Gate* gate);

// The most steps of `walk_gated`: of a block two and a decision, of the network's begin and end, of
// segments' ends, and a gate's own.
constexpr int64_t gated_steps(int num_blocks) { return 3 * int64_t{num_blocks} + 16; }

// Of the spare buffers the one where a segment's shares are added up, if they are.
constexpr int kBlended = 0;

}  // namespace blockdrop::walk
