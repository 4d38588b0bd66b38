// What the programs of the CPU walk are made of: one call's memory, and what one thread does on
// its way through one image. Which blocks it runs is the operators' (walk.cpp).

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "cpu/walk.h"
#include "cpu/walk_arguments.h"
#include "cpu/walk_queue.h"

namespace blockdrop::walk {

// What holds one image on its way.
struct Buffers {
  float* padded_image;        // [H + 2, W + 2, 3]
  float* x[kSegments];        // the activations of each segment
  float* hidden[kSegments];   // between the two convolutions of a block
  float* logits;              // [padded_classes]
  float* kernel_scratch;      // of the slot's thread, whatever image it walks
  std::vector<float*> spare;  // each as large as the largest activations
};

class Walker;

// One call of an operator.
class Walk {
 public:
  // `num_spare`: buffers that the program needs beside those of every walk.
  Walk(const Kernels& kernels, const Network& network, const Images& images, int num_spare);

  // Calls program(Walker&) for every image, `order`ed; one that several threads walk together gets
  // as many calls at once. Input, stem and each block and classifier take 1, 1, 2 and 1 of an
  // image's `max_steps`.
  template <class Program>
  void run(const std::vector<int>& order, int64_t max_steps, const Program& program);

  const Kernels& kernels;
  const Network& network;
  const Images& images;
  const int num_threads;

  int height(int segment) const { return images.height >> segment; }
  int width(int segment) const { return images.width >> segment; }
  int64_t activation_size(int segment) const {
    return int64_t{height(segment) + 2} * (width(segment) + 2) * kWidths[segment];
  }
  // The segment whose buffer holds the input of `block` (for num_blocks: of the classifier).
  int segment_before(int block) const;

 private:
  void clear_borders(const Buffers& buffers) const;

  at::Tensor scratch_;
  std::vector<Buffers> buffers_;  // [num_threads]
};

// One thread on the path of one image. Threads that walk together run the same program.
class Walker {
 public:
  Walker(const Walk& walk, const Buffers& buffers, int image, float* kernel_scratch, Steps steps)
      : walk(walk),
        buffers(buffers),
        image(image),
        kernel_scratch_(kernel_scratch),
        steps_(steps) {}

  const Walk& walk;
  const Buffers& buffers;
  const int image;

  // Input and stem.
  void begin();
  // A block of `segment`: its shortcut, and all of it where it is kept.
  void run_block(int block, int segment, bool changes_shape, bool keep);
  // Copies activations that are the input of `block`.
  void copy(const float* from, float* to, int block);
  void classify(float* logits);  // [num_classes]

 private:
  // Runs a layer of `segment` in parts of pairs of rows and panels.
  template <class Run>
  void step_in_parts(int segment, const Run& run);
  void convolve(void (*kernel)(const Conv&, const Part&), const float* weights, const float* input,
                const float* residual, float* output, int segment);
  void pad_image();

  float* const kernel_scratch_;  // of this thread
  Steps steps_;
};

template <class Program>
void Walk::run(const std::vector<int>& order, int64_t max_steps, const Program& program) {
  Queue queue(images.batch, num_threads, max_steps);
  queue.run([&](int thread) { clear_borders(buffers_[thread]); },
            [&](const Turn& turn) {
              Walker walker(*this, buffers_[turn.slot], order[turn.position],
                            buffers_[turn.thread].kernel_scratch, turn.steps);
              program(walker);
            });
}

}  // namespace blockdrop::walk
