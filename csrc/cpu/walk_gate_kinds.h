// The gates of the CPU walk, a class a kind. What each computes is in
// blockdrop_fast/ops/walk_gates.py.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

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

// Classifiers after some blocks, and rules by which an image leaves at one of them.
class Exits : public Gate {
 public:
  static constexpr int kFeatures = 5;
  static constexpr int kRuleValues = kFeatures + 1;  // weights, then bias

  struct Places {
    std::vector<int64_t> after;  // ascending numbers of blocks
    const float* heads;          // [after.size(), head_size]
    int64_t head_size;           // (1 + 64) * padded_classes
    const float* rules;  // [after.size(), kRuleValues]; null: `rows` says where images leave
  };

  // Without rules decisions are an image's own, with rules those before the first exit.
  // The walk's logits have room for probabilities.
  Exits(Walker& walker, const Rows& rows, const Places& places)
      : walker_(walker), network_(walker.walk.network), rows_(rows), places_(places) {}

  bool looks_at(int block) const override {
    return exit_at(block) >= 0 && (places_.rules || !rows_.decisions[block]);
  }

  bool decide(int block) override {
    if (exit_at(block) < 0) return true;
    if (places_.rules || !rows_.decisions[block]) {
      walker_.look(block, [&](const float* mean) { classify(block, mean); });
    }
    return rows_.decisions[block];
  }

 private:
  // -1: there is none before `block`.
  int64_t exit_at(int block) const {
    const auto found = std::lower_bound(places_.after.begin(), places_.after.end(), block);
    const bool is_there = found != places_.after.end() && *found == block;
    return is_there ? found - places_.after.begin() : -1;
  }

  void classify(int block, const float* mean) {
    const size_t exit = static_cast<size_t>(exit_at(block));
    float* logits = walker_.buffers.logits;
    walker_.walk.kernels.linear(places_.heads + exit * places_.head_size, mean,
                                kWidths[network_.segment_before(block)], network_.padded_classes,
                                logits);
    if (places_.rules && !leaves(logits, places_.rules + exit * kRuleValues)) {
      const bool last = exit + 1 == places_.after.size();
      const int64_t next = last ? network_.num_blocks : places_.after[exit + 1];
      std::fill(rows_.decisions + block, rows_.decisions + next, true);
    } else {
      std::copy_n(logits, network_.num_classes, rows_.logits);
    }
  }

  bool leaves(const float* logits, const float* rule) const {
    const int classes = network_.num_classes;
    float* probabilities = walker_.buffers.logits + network_.padded_classes;
    const float largest = *std::max_element(logits, logits + classes);
    float sum = 0;
    for (int i = 0; i < classes; ++i) sum += probabilities[i] = std::exp(logits[i] - largest);
    float top[3] = {}, entropy = 0;
    for (int i = 0; i < classes; ++i) {
      float p = probabilities[i] / sum;
      if (p != 0) entropy -= p * std::log(p);
      for (float& place : top) {
        if (p > place) std::swap(p, place);
      }
    }
    const float features[kFeatures] = {top[0], top[1], top[2], top[0] - top[1], entropy};
    float score = 0;
    for (int i = 0; i < kFeatures; ++i) score += rule[i] * features[i];
    // Where a probability is not a number, neither is the entropy, and the image stays.
    return score + rule[kFeatures] >= 0;
  }

  Walker& walker_;
  const Network& network_;
  const Rows& rows_;
  const Places& places_;
};

// A head after one block, which decides on all that follow.
class Look : public Gate {
 public:
  static constexpr int kSize = 16;     // what the head sees is no larger
  static constexpr int kNumSpare = 3;  // pooled, and behind each convolution

  struct Head {
    int after;  // a block of the first segment, counted from 1
    int outputs, padded_outputs;
    const float* convs[2];  // 16 -> 32 -> 64 channels
    const float* classifier;
    const bool* sets;    // [outputs, num_blocks], to choose one from; null: an output is a block's
    const float* costs;  // [outputs], of the sets
  };

  // Decisions are those of the blocks up to the head.
  Look(Walker& walker, const Rows& rows, const Head& head,
       float* outputs)  // [head.outputs]
      : walker_(walker), rows_(rows), head_(head), outputs_(outputs) {}

  bool looks_at(int) const override { return false; }  // at more than its mean

  bool decide(int block) override {
    if (block != head_.after) return true;
    const Kernels& kernels = walker_.walk.kernels;
    const int height = std::min(walker_.walk.height(0), kSize);
    const int width = std::min(walker_.walk.width(0), kSize);
    const auto& spare = walker_.buffers.spare;
    const int rows = walker_.walk.height(0) / height, columns = walker_.walk.width(0) / width;
    const AveragePool pool{walker_.buffers.x[0], spare[0], width, rows, columns};
    walker_.step_in_parts(height, kWidths[0], [&](const Part& part) {
      if (part.row_begin == 0) {
        for (int i = 0; i < kNumSpare; ++i) {
          clear_border(spare[i], height >> i, width >> i, kWidths[i]);
        }
      }
      kernels.average_pool(pool, part);
    });
    for (int i = 0; i < 2; ++i) {
      const Conv conv{spare[i],     head_.convs[i],    nullptr,
                      spare[i + 1], height >> (i + 1), width >> (i + 1)};
      walker_.step_in_parts(conv.height, kWidths[i + 1],
                            [&](const Part& part) { kernels.strided_convs[i + 1](conv, part); });
    }
    walker_.step([&] {
      float* outputs = walker_.buffers.logits;
      kernels.classifier(
          {spare[2], head_.classifier, outputs, height >> 2, width >> 2, head_.padded_outputs});
      std::copy_n(outputs, head_.outputs, outputs_);
      choose();
    });
    return true;
  }

 private:
  void choose() const {
    const int num_blocks = walker_.walk.network.num_blocks;
    const bool* set = head_.sets ? head_.sets + int64_t{best_set()} * num_blocks : nullptr;
    for (int block = head_.after; block < num_blocks; ++block) {
      rows_.decisions[block] = set ? set[block] : outputs_[block] >= 0;
    }
  }

  // The first of equal ones, or the first whose worth is not a number.
  int best_set() const {
    int best = 0;
    float most = 0;
    for (int i = 0; i < head_.outputs; ++i) {
      const float worth = sigmoid(outputs_[i]) - head_.costs[i];
      if (std::isnan(worth)) return i;
      if (i == 0 || worth > most) {
        best = i;
        most = worth;
      }
    }
    return best;
  }

  Walker& walker_;
  const Rows& rows_;
  const Head& head_;
  float* const outputs_;
};

}  // namespace blockdrop::walk
