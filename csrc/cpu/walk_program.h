// What the programs of the CPU walk are made of: one call's memory, and what one thread does on
// its way through one image. Which blocks it runs is the operators' (walk.cpp).

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/walk.h"
#include "cpu/walk_arguments.h"
#include "cpu/walk_queue.h"

namespace blockdrop::walk {

// Those of the instruction set that the walks run with, see walk_isa.h.
const Kernels& choose_kernels();

// What holds one image on its way.
struct Buffers {
  float* padded_image;        // [H + 2, W + 2, 3]
  float* x[kSegments];        // the activations of each segment
  float* hidden[kSegments];   // between the two convolutions of a block
  float* logits;              // [Walk's num_logits]
  float* row_sums;            // of the activations that a gate is to look at, [H of x, channels]
  float* kernel_scratch;      // of the slot's thread, whatever image it walks
  std::vector<float*> spare;  // each as large as the largest activations
};

// Of activations [height + 2, width + 2, channels].
void clear_border(float* activations, int height, int width, int channels);

class Walker;

// One call of an operator.
class Walk {
 public:
  // `num_spare`: buffers that the program needs beside those of every walk. `num_logits`: of the
  // largest classifier, padded.
  Walk(const Kernels& kernels, const Network& network, const Images& images, int num_spare,
       int num_logits);

  // Calls program(Walker&) for every image, `order`ed; one that several threads walk together gets
  // as many calls at once. Input and stem take 2 of an image's `max_steps`, a block 2, all
  // others 1.
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

  // Input and stem. With `sum_rows` a gate can look at what it gives.
  void begin(bool sum_rows = false);
  // A block: its shortcut, and all of it where it is kept. `blend` is run with the block's first
  // convolution, which does not write what that reads.
  void run_block(int block, bool keep, bool sum_rows = false, const Blend* blend = nullptr);
  // In a step of its own: decide(mean [channels]) of the activations whose rows were summed last,
  // which are the input of `block`.
  template <class Decide>
  void look(int block, const Decide& decide);
  // A step of one part.
  template <class Run>
  void step(const Run& run) {
    steps_.run(1, [&](int) { run(); }, run);
  }
  // A layer of `channels`, in parts of pairs of rows and panels.
  template <class Run>
  void step_in_parts(int height, int channels, const Run& run);
  void classify(float* logits);  // [num_classes]

 private:
  RowSums row_sums(int segment) const;
  void pad_image();

  float* const kernel_scratch_;  // of this thread
  Steps steps_;
};

template <class Run>
void Walker::step_in_parts(int height, int channels, const Run& run) {
  const int panels = channels / panel_channels(channels);
  // Panels first: parts of different panels read different weights.
  const int pairs = (height + 1) / 2;
  const int row_parts = std::min((walk.num_threads + panels - 1) / panels, pairs);
  const auto run_part = [&](int part) {
    const int panel = part % panels;
    const int rows = part / panels;
    run(Part{2 * (pairs * rows / row_parts), std::min(2 * (pairs * (rows + 1) / row_parts), height),
             panel, panel + 1, kernel_scratch_});
  };
  steps_.run(panels * row_parts, run_part,
             [&] { run(Part{0, height, 0, panels, kernel_scratch_}); });
}

template <class Decide>
void Walker::look(int block, const Decide& decide) {
  step([&] {
    const int segment = walk.network.segment_before(block);
    const int height = walk.height(segment), pixels = height * walk.width(segment);
    float mean[kWidths[kSegments - 1]];
    walk.kernels.mean(buffers.row_sums, height, kWidths[segment], pixels, mean);
    decide(mean);
  });
}

template <class Program>
void Walk::run(const std::vector<int>& order, int64_t max_steps, const Program& program) {
  Queue queue(images.batch, num_threads, max_steps, 2 * num_threads);
  queue.run([&](int thread) { clear_borders(buffers_[thread]); },
            [&](const Turn& turn) {
              Walker walker(*this, buffers_[turn.slot], order[turn.position],
                            buffers_[turn.thread].kernel_scratch, turn.steps);
              program(walker);
            });
}

}  // namespace blockdrop::walk
