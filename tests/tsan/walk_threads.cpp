// The CPU walk's queue, parts and gates without torch, for ThreadSanitizer (`make tsan`).
//
// Several threads walk small batches at given decisions and at those of gates; what they compute
// has to be what one thread does, bit for bit.

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "ATen/Parallel.h"
#include "cpu/walk_gate_kinds.h"
#include "cpu/walk_gated.h"
#include "cpu/walk_isa.h"
#include "cpu/walk_program.h"

namespace blockdrop::walk {

Isa choose_isa() { return Isa::kPortable; }

// As in walk_arguments.cpp, which reads tensors.
int Network::segment_of(int block) const {
  int segment = 0;
  for (int end = layers[0]; segment < kSegments - 1 && block >= end;) end += layers[++segment];
  return segment;
}

namespace {

constexpr int kSize = 8, kClasses = 10;
std::mt19937 random_bits(0);

std::vector<float> random_floats(int64_t count, float scale) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random_bits);
  return values;
}

struct Weights {
  std::vector<std::vector<float>> all;

  const float* take(int64_t count) {
    all.push_back(random_floats(count, 0.1f));
    return all.back().data();
  }

  const float* conv(int in, int out) {
    return take(out * (1 + int64_t{9 + (in == out ? kTileProducts : 0)} * in));
  }
};

Network make_network(Weights& weights) {
  Network network{{2, 1, 2}, 5,
                  kClasses,  static_cast<int>(round_up(kClasses, kClassMultiple)),
                  false,     weights.conv(kImageChannels, kWidths[0]),
                  {},        nullptr};
  int channels = kWidths[0];
  for (int segment = 0; segment < kSegments; ++segment) {
    for (int block = 0; block < network.layers[segment]; ++block) {
      network.convs.push_back(weights.conv(channels, kWidths[segment]));
      channels = kWidths[segment];
      network.convs.push_back(weights.conv(channels, channels));
    }
  }
  network.classifier = weights.take(int64_t{1 + channels} * network.padded_classes);
  return network;
}

enum class Kind { kGiven, kWeighted, kSequential, kHalting, kExits };
constexpr Kind kKinds[] = {Kind::kGiven, Kind::kWeighted, Kind::kSequential, Kind::kHalting,
                           Kind::kExits};

struct Result {
  std::vector<float> logits, shares;
  std::unique_ptr<bool[]> decisions;
};

struct Case {
  const Network& network;
  const Images& images;
  const float* gates;
  const Exits::Places& exits;
};

Result run(Kind kind, const Case& given, const std::vector<bool>& decisions, int threads) {
  at::num_threads = threads;
  const int batch = given.images.batch, blocks = given.network.num_blocks;
  Result result{std::vector<float>(batch * kClasses),
                std::vector<float>(batch * blocks, kind == Kind::kWeighted ? 0.5f : 0.f),
                std::make_unique<bool[]>(batch * blocks)};
  std::copy(decisions.begin(), decisions.begin() + batch * blocks, result.decisions.get());
  for (int i = 0; i < batch; ++i) {
    bool* own = &result.decisions[i * blocks];
    if (kind == Kind::kSequential) std::fill_n(own, blocks, false);
    if (kind == Kind::kHalting) {
      std::fill_n(own, blocks, false);
      for (int block = 0; block < blocks; ++block) {
        if (block == 0 || given.network.changes_shape(block)) {
          own[block] = true;
          const int segment = given.network.segment_of(block);
          result.shares[i * blocks + block] = given.network.layers[segment] == 1;
        }
      }
    }
    if (kind == Kind::kExits) {
      std::fill_n(own, blocks, false);
      std::fill_n(own, given.exits.after.front(), true);
    }
  }
  std::vector<int> order(batch);
  std::iota(order.begin(), order.end(), 0);
  Walk walk(*portable_kernels(), given.network, given.images, kBlended + 1,
            2 * given.network.padded_classes);
  walk.run(order, gated_steps(blocks), [&](Walker& walker) {
    float* shares = &result.shares[walker.image * blocks];
    const bool shared = kind == Kind::kWeighted || kind == Kind::kHalting;
    const Rows rows{&result.decisions[walker.image * blocks], shared ? shares : nullptr,
                    &result.logits[walker.image * kClasses]};
    if (kind == Kind::kSequential) {
      Sequential gate(walker, rows, given.gates);
      walk_gated(walker, rows, &gate);
    } else if (kind == Kind::kHalting) {
      Halting gate(walker, rows, given.gates, 0.6f, false, shares);
      walk_gated(walker, rows, &gate);
    } else if (kind == Kind::kExits) {
      Exits gate(walker, rows, given.exits);
      walk_gated(walker, rows, &gate);
    } else {
      walk_gated(walker, rows, nullptr);
    }
  });
  return result;
}

int check(int rounds) {
  Weights weights;
  const Network network = make_network(weights);
  const std::vector<float> gates = random_floats(network.num_blocks * kGateValues, 1.f);
  const int64_t head = int64_t{kGateValues} * network.padded_classes;
  const std::vector<float> heads = random_floats(2 * head, 1.f);
  const std::vector<float> rules = random_floats(2 * Exits::kRuleValues, 1.f);
  const Exits::Places exits{{1, 3}, heads.data(), head, rules.data()};
  int calls = 0;
  for (int round = 0; round < rounds; ++round) {
    const int batch = 1 + static_cast<int>(random_bits() % 6);
    const std::vector<float> pixels = random_floats(batch * 3 * kSize * kSize, 1.f);
    const Images images{pixels.data(),     batch,         kSize, kSize,
                        3 * kSize * kSize, kSize * kSize, kSize, 1};
    std::vector<bool> decisions(batch * network.num_blocks);
    for (size_t i = 0; i < decisions.size(); ++i) decisions[i] = random_bits() % 2;
    const Case given{network, images, gates.data(), exits};
    for (const Kind kind : kKinds) {
      const Result alone = run(kind, given, decisions, 1);
      const Result together = run(kind, given, decisions, 2 + round % 4);
      ++calls;
      const size_t blocks = decisions.size();
      if (alone.logits != together.logits ||
          std::memcmp(alone.decisions.get(), together.decisions.get(), blocks) != 0) {
        std::printf("other bits in round %d, kind %d\n", round, static_cast<int>(kind));
        return 1;
      }
    }
  }
  std::printf("%d calls by several threads, the bits of one\n", calls);
  return 0;
}

}  // namespace
}  // namespace blockdrop::walk

int main() { return blockdrop::walk::check(100); }
