// The gates of the CPU walk, a class a kind. What each computes is in
// blockdrop_fast/ops/walk_gates.py.

#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/walk_gated.h"

namespace blockdrop::walk {

constexpr int kGateValues = 1 + kWidths[kSegments - 1];  // bias, then weights

inline float sigmoid(float x) { return 1.f / (1.f + std::exp(-x)); }

// A gate before every block, on the block's input.
class Sequential : public Gate {
 public:
  Sequential(Walker& walker, const Rows& rows,
             const float* gates)  // [num_blocks, kGateValues]
      : walker_(walker), network_(walker.walk.network), rows_(rows), gates_(gates) {}

  bool looks_at(int block) const override { return block < network_.num_blocks; }

  bool decide(int block) override {
    if (!looks_at(block)) return true;
    walker_.look(block, [&](const float* mean) {
      const int channels = kWidths[network_.segment_before(block)];
      // As long as nobody writes, all gates look at the same.
      for (int k = block; k < network_.num_blocks; ++k) {
        const float logit = walker_.walk.kernels.score(gates_ + k * kGateValues, mean, channels);
        rows_.decisions[k] = logit >= 0;
        if (rows_.decisions[k] || network_.changes_shape(k)) break;
      }
    });
    return true;
  }

 private:
  Walker& walker_;
  const Network& network_;
  const Rows& rows_;
  const float* const gates_;
};

// A score after each block that ran but the last of a segment, until their sum is enough.
class Halting : public Gate {
 public:
  // Decisions are those of the segments' first blocks; `shares` hold scores while these are added
  // up, and are written even where `rows` has none.
  Halting(Walker& walker, const Rows& rows,
          const float* gates,  // [num_blocks, kGateValues]
          float enough, bool hard,
          float* shares)  // [num_blocks]
      : walker_(walker),
        network_(walker.walk.network),
        rows_(rows),
        gates_(gates),
        enough_(enough),
        hard_(hard),
        shares_(shares) {}

  bool looks_at(int block) const override {
    return block > 0 && block < network_.num_blocks && !network_.changes_shape(block);
  }

  bool decide(int block) override {
    if (!looks_at(block)) return true;
    walker_.look(block, [&](const float* mean) { score(block, mean); });
    return true;
  }

 private:
  // Of the block before `block`.
  void score(int block, const float* mean) {
    const int ran = block - 1, segment = network_.segment_of(ran);
    int begin = ran;  // of the segment
    while (begin > 0 && !network_.changes_shape(begin)) --begin;
    float sum = 0;
    for (int k = begin; k < ran; ++k) sum += shares_[k];
    const float score =
        sigmoid(walker_.walk.kernels.score(gates_ + ran * kGateValues, mean, kWidths[segment]));
    const bool last_follows = block + 1 == network_.num_blocks || network_.changes_shape(block + 1);
    if (sum + score >= enough_) {
      halt(begin, ran, 1 - sum);
      return;
    }
    rows_.decisions[block] = true;
    shares_[ran] = score;
    if (last_follows) halt(begin, block, 1 - (sum + score));
  }

  void halt(int begin, int block, float remainder) {
    shares_[block] = remainder;
    if (!hard_) return;
    std::fill(shares_ + begin, shares_ + block, 0.f);
    shares_[block] = 1;
  }

  Walker& walker_;
  const Network& network_;
  const Rows& rows_;
  const float* const gates_;
  const float enough_;
  const bool hard_;
  float* const shares_;
};

}  // namespace blockdrop::walk
