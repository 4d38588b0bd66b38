// The paths of a batch's images whose decisions are known: what several decision sets of an image
// share, and in which order images are walked.

#pragma once

#include <vector>

namespace blockdrop::walk {

// One of an image's decision sets. Sets are run in lexicographic order, so that each shares the
// longest possible prefix with one that ran before it, and continues from there.
struct Path {
  const bool* keep;  // [num_blocks]
  int set;           // where its logits go
  int fork;          // the first block that it does not share with the path before it
  int source;        // the path (in order of running) that saves the activations before `fork`
};

// Paths [batch, num_sets] in order of running.
std::vector<Path> order_paths(const bool* decisions,  // [num_sets, batch, num_blocks]
                              int num_sets, int batch, int num_blocks);

// Images by descending number of blocks to run, equal ones in ascending order.
std::vector<int> order_images(const std::vector<Path>& paths, int num_sets, int batch,
                              int num_blocks);

}  // namespace blockdrop::walk
