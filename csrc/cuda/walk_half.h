// What the CUDA walk's operators (walk_half.cu) pass to its kernels (walk_half_launch.cu). Without
// torch or CUDA, as the tests compile it for a CPU, too.

#pragma once

#include <cstdint>

namespace blockdrop::walk_half {

constexpr int kSegments = 3;
constexpr int kImageSize = 32;
constexpr int kImageChannels = 3;
constexpr int64_t kImageValues = kImageChannels * kImageSize * kImageSize;
constexpr int kFeatures = 64;  // channels of the last segment
constexpr int kTile = 16;      // channels of a matrix product, in and out
constexpr int kTaps = 9;
constexpr int kMostBlocks = 8192;  // of a network; a thread block keeps a bit for each

// A slice: 16 input channels' weights for all output channels. It has a part for every 16 of these:
// their bias, then the taps.
constexpr uint32_t kBiasBytes = kTile * 4;
constexpr uint32_t kPartBytes = kBiasBytes + kTaps * kTile * kTile * 2;
constexpr int slice_bytes(int out_channels) { return out_channels / kTile * kPartBytes; }

// A segment's slices before its block `block`; `channels` are the segment's. Segment 1 begins with
// the stem, a single slice. Segments 2 and 3 begin with a convolution that has half of the slices.
template <typename Int>
constexpr Int slices_before(int channels, Int block) {
  const int tiles = channels / kTile;
  if (tiles == 1) return 1 + 2 * block;
  return block == 0 ? 0 : 2 * tiles * block - tiles / 2;
}

struct Network {
  const unsigned char* segments[kSegments];  // the slices of each, in order
  const float* classifier;                   // [num_classes] bias, then [64, num_classes]
  int layers[kSegments];
  int num_classes;
  bool subsample;
};

constexpr int num_blocks_of(const Network& network) {
  return network.layers[0] + network.layers[1] + network.layers[2];
}

// Finds the parts of packed weights; see blockdrop_fast/ops/walk_half.py.
inline Network read_network(const unsigned char* weights,
                            const int64_t* layers,  // [kSegments]
                            int64_t num_classes, bool subsample) {
  Network network{};
  for (int segment = 0; segment < kSegments; ++segment) {
    const int channels = kTile << segment;
    network.segments[segment] = weights;
    network.layers[segment] = static_cast<int>(layers[segment]);
    weights += slices_before(channels, layers[segment]) * slice_bytes(channels);
  }
  network.classifier = reinterpret_cast<const float*>(weights);
  network.num_classes = static_cast<int>(num_classes);
  network.subsample = subsample;
  return network;
}

// What is packed, in bytes.
inline int64_t packed_bytes(const Network& network) {
  const auto* classifier = reinterpret_cast<const unsigned char*>(network.classifier);
  return classifier - network.segments[0] +
         (1 + kFeatures) * int64_t{network.num_classes} * static_cast<int64_t>(sizeof(float));
}

// A path is an image with a set of decisions; path p is of image p % num_images.
struct Paths {
  const uint16_t* images;  // [num_images, 3, 32, 32]
  const bool* given;       // [num_paths, num_blocks] decisions, or null: the policy decides
  const int* order;        // [num_paths] which path is taken when, or null: in order
  int* queue;              // zero, if there are more paths than thread blocks
  int64_t num_images, num_paths;
  int num_blocks;
  int ring;  // slices of weights in shared memory, 2 or 4
  Network backbone, policy;
  float* logits;         // [num_paths, num_classes]
  bool* decisions;       // [num_paths, num_blocks] what the policy decided; null if given
  float* policy_logits;  // [num_paths, num_blocks]; null if given
};

// Runs all paths, of which there is at least one, on the current device and stream. Values of 16
// bits are bfloat16, or else float16.
void launch_walk(Paths paths, bool bfloat16);

}  // namespace blockdrop::walk_half
