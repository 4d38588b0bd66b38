// What the programs of the CPU walk of ImageNet networks are made of: one call's memory, and what
// one thread does on its way. Which blocks it runs is the operators' (walk_imagenet.cpp).
//
// What walks together is a group of images, of one image where images keep blocks of their own.
// In a group they share every layer, so that weights are read once for all of them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/walk_arguments.h"
#include "cpu/walk_imagenet.h"
#include "cpu/walk_imagenet_network.h"
#include "cpu/walk_memory.h"
#include "cpu/walk_queue.h"

namespace blockdrop::walk_imagenet {

struct Size {
  int height, width;
  Index pixels() const { return Index{height} * width; }
};

// A convolution and who computes it.
struct Layer {
  void (*kernel)(const Conv&, const Part&);
  Conv conv;
  bool winograd;
  int rows;                            // as of Part
  int row_parts = 1, panel_parts = 1;  // what it is cut into for several threads

  int parts() const { return row_parts * panel_parts; }
  // Scratch memory and what follows are the caller's.
  Part part(int index) const;
  // What is read first for these panels of outputs.
  Weights first_weights(int panel_begin, int panel_end) const;
};

// What holds a group on its way.
struct Buffers {
  float* padded_images;       // [images, H + 6, W + 6, 3]
  float* x[2];                // a block's input; behind a projection the other one
  float* hidden[2];           // between the convolutions of a block
  float* means;               // [panels, images, 32]
  float* logits;              // [panels, images, 32]
  float* kernel_scratch;      // of the slot's thread, whatever it walks
  std::vector<float*> spare;  // each as large as x
};

class Walker;

// One call of an operator.
class Walk {
 public:
  // Images are average-pooled by `pool` first. `alike`: all keep the same blocks, and may walk in
  // groups. `num_spare`: buffers that the program needs beside those of every walk.
  Walk(const Kernels& kernels, const Network& network, const walk::Images& images, int pool,
       bool alike, int num_spare);

  // Calls program(Walker&) for every group, of images in this `order`; one that several threads
  // walk together gets as many calls at once. `max_layers`: that a group takes, input, copies and
  // mean included.
  template <class Program>
  void run(const std::vector<int>& order, int64_t max_layers, const Program& program);

  const Kernels& kernels;
  const Network& network;
  const walk::Images& images;
  const int pool;
  int group = 1;  // images, at most
  int num_threads;

  // Of the images, pooled, and of the input of `block` (for num_blocks: of the classifier).
  Size image_size() const { return image_; }
  Size size_before(int block) const {
    return sizes_[block == 0 ? 0 : network.blocks[block - 1].segment];
  }
  int panels_before(int block) const;
  // Which x holds it.
  int x_before(int block) const { return x_before_[block]; }

 private:
  Index x_size() const;
  void allocate(int num_spare);
  Index scratch_size() const;

  Size image_;
  std::vector<Size> sizes_;    // [num_segments]
  std::vector<int> x_before_;  // [num_blocks + 1]
  std::unique_ptr<walk::CallMemory> memory_;
  std::vector<Buffers> buffers_;  // [num_threads]
};

// One thread on the path of one group. Threads that walk together run the same program.
class Walker {
 public:
  Walker(const Walk& walk, const Buffers& buffers, const int* images, int num_images,
         float* kernel_scratch, walk::Steps steps)
      : walk(walk),
        buffers(buffers),
        images(images),
        num_images(num_images),
        kernel_scratch_(kernel_scratch),
        steps_(steps) {}

  const Walk& walk;
  const Buffers& buffers;
  const int* const images;  // [num_images]
  const int num_images;

  // Input and stem.
  void begin();
  // Appends the layers of a block: its projection, and all of it where it is kept.
  void add_block(int block, bool keep, std::vector<Layer>& layers) const;
  void add_classifier(std::vector<Layer>& layers) const;
  // `next`: the layer that follows, or null.
  void run(const Layer& layer, const Layer* next);
  // Copies activations that are the input of `block`.
  void copy(const float* from, float* to, int block);
  void average();
  // Stores the logits of image i at rows[i].
  void store_logits(const std::vector<float*>& rows);  // [num_images][num_classes]

 private:
  Layer make_layer(const PackedConv& conv, Size size, const float* input, const float* residual,
                   float* output, bool relu) const;
  void pad_rows(int begin, int end);
  // A step of rows 0 ... rows - 1, in parts run(begin, end).
  template <class Run>
  void run_parts(int rows, const Run& run);
  // A step of one part.
  template <class Run>
  void run_once(const Run& run);

  float* const kernel_scratch_;  // of this thread
  walk::Steps steps_;
};

template <class Program>
void Walk::run(const std::vector<int>& order, int64_t max_layers, const Program& program) {
  const int num_groups = (images.batch + group - 1) / group;
  // In parts a layer takes longer than in one piece: no more groups than can be the last of a
  // thread.
  walk::Queue queue(num_groups, num_threads, max_layers, num_threads);
  queue.run([](int) {},
            [&](const walk::Turn& turn) {
              const int first = turn.position * group;
              Walker walker(*this, buffers_[turn.slot], order.data() + first,
                            std::min(group, images.batch - first),
                            buffers_[turn.thread].kernel_scratch, turn.steps);
              program(walker);
            });
}

}  // namespace blockdrop::walk_imagenet
