// CPU kernels of the walks that decide on the way; schemas and references:
// blockdrop_fast/ops/walk_gates.py. Here are the operators, in walk_gate_kinds.h what decides, in
// walk_gated.h the program that asks it.

#include <ATen/core/Tensor.h>
#include <ATen/ops/all.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/walk_arguments.h"
#include "cpu/walk_gate_kinds.h"
#include "cpu/walk_gated.h"
#include "cpu/walk_paths.h"
#include "cpu/walk_program.h"
#include "walk_network.h"

namespace blockdrop::walk {
namespace {

// ---------------------------------------------------------------- arguments

at::Tensor read_matrix(const char* name, const at::Tensor& matrix, int64_t rows, int64_t columns) {
  TORCH_CHECK_TYPE(matrix.scalar_type() == at::kFloat, name, ": expected dtype torch.float32, got ",
                   matrix.scalar_type());
  TORCH_CHECK_VALUE(matrix.dim() == 2 && matrix.size(0) == rows && matrix.size(1) == columns, name,
                    ": expected shape (", rows, ", ", columns, "), got ", matrix.sizes());
  return matrix.contiguous();
}

at::Tensor read_decisions(const at::Tensor& decisions, const Images& images,
                          const Network& network) {
  check_decisions(decisions, images.batch, network.num_blocks);
  TORCH_CHECK_VALUE(decisions.dim() == 2, "decisions: expected shape (B, K), got ",
                    decisions.sizes());
  return decisions.clone(at::MemoryFormat::Contiguous);
}

Exits::Places read_exits(const Network& network, at::IntArrayRef after, const at::Tensor& heads,
                         const at::Tensor& rules, bool decided) {
  const bool ascend =
      std::adjacent_find(after.begin(), after.end(), std::greater_equal<>()) == after.end();
  TORCH_CHECK_VALUE(
      ascend && (after.empty() || (after.front() >= 1 && after.back() < network.num_blocks)),
      "after: expected ascending blocks out of 1 to ", network.num_blocks - 1, ", got ", after);
  return {after.vec(), heads.const_data_ptr<float>(), heads.size(1),
          decided ? nullptr : rules.const_data_ptr<float>()};
}

// An image's kept blocks are the first, up to an exit or the end.
void check_prefixes(const at::Tensor& decisions, const std::vector<int64_t>& after) {
  const int64_t num_blocks = decisions.size(1);
  const bool* row = decisions.const_data_ptr<bool>();
  for (int64_t image = 0; image < decisions.size(0); ++image, row += num_blocks) {
    const int64_t kept = std::find(row, row + num_blocks, false) - row;
    TORCH_CHECK_VALUE(
        std::find(row + kept, row + num_blocks, true) == row + num_blocks &&
            (kept == num_blocks || std::binary_search(after.begin(), after.end(), kept)),
        "decisions: expected the first blocks of each image, up to one of after ",
        at::IntArrayRef(after), " or all ", num_blocks);
  }
}

Look::Head read_head(const Network& network, const Images& images, int64_t after,
                     const at::Tensor& head, int64_t outputs) {
  TORCH_CHECK_VALUE(after >= 1 && after <= network.layers[0],
                    "after: expected a block of the first segment, 1 to ", network.layers[0],
                    ", got ", after);
  const auto fits = [](int size) { return size <= Look::kSize || size == 2 * Look::kSize; };
  TORCH_CHECK_VALUE(fits(images.height) && fits(images.width),
                    "images: expected height and width up to 16, or 32, for the head, got ",
                    images.height, "x", images.width);
  TORCH_CHECK_TYPE(head.scalar_type() == at::kFloat, "head: expected dtype torch.float32, got ",
                   head.scalar_type());
  const int64_t first = kWidths[1] * (1 + 9 * kWidths[0]);
  const int64_t second = kWidths[2] * (1 + 9 * kWidths[1]);
  const int64_t padded = round_up(outputs, kClassMultiple);
  check_length("head", head, first + second + kGateValues * padded, "packed values");
  const float* values = head.const_data_ptr<float>();
  return {static_cast<int>(after),
          static_cast<int>(outputs),
          static_cast<int>(padded),
          {values, values + first},
          values + first + second,
          nullptr,
          nullptr};
}

void check_sets(const at::Tensor& sets, const std::optional<at::Tensor>& costs, int64_t outputs,
                int64_t num_blocks, int64_t after) {
  TORCH_CHECK_TYPE(sets.scalar_type() == at::kBool, "sets: expected dtype torch.bool, got ",
                   sets.scalar_type());
  TORCH_CHECK_VALUE(sets.dim() == 2 && sets.size(0) == outputs && sets.size(1) == num_blocks,
                    "sets: expected shape (", outputs, ", ", num_blocks, "), got ", sets.sizes());
  TORCH_CHECK_VALUE(costs && costs->dim() == 1 && costs->size(0) == outputs,
                    "costs: expected one of each of ", outputs, " sets");
  TORCH_CHECK_TYPE(costs->scalar_type() == at::kFloat, "costs: expected dtype torch.float32, got ",
                   costs->scalar_type());
  TORCH_CHECK_VALUE(sets.narrow(1, 0, after).all().item<bool>(), "sets: expected blocks 1 to ",
                    after, " in each, which run before");
}

// ---------------------------------------------------------------- running

std::vector<int> in_order(int count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  return order;
}

std::vector<int> by_usage(const at::Tensor& decisions) {  // [batch, num_blocks]
  const int batch = static_cast<int>(decisions.size(0));
  const int num_blocks = static_cast<int>(decisions.size(1));
  const bool* data = decisions.const_data_ptr<bool>();
  return order_images(order_paths(data, 1, batch, num_blocks), 1, batch, num_blocks);
}

// What an operator gives.
struct Outputs {
  Outputs(const Network& network, const Images& images)
      : Outputs(network, images, at::zeros({images.batch, network.num_blocks}, at::kBool)) {}

  Outputs(const Network& network, const Images& images, const at::Tensor& decisions)
      : logits(at::empty({images.batch, network.num_classes}, at::kFloat)),
        decisions(decisions),
        logits_(logits.mutable_data_ptr<float>()),
        decisions_(decisions.mutable_data_ptr<bool>()) {}

  // `shares`: [batch, num_blocks], or null.
  Rows rows(int image, const float* shares = nullptr) const {
    const int64_t at = image * decisions.size(1);
    return {decisions_ + at, shares ? shares + at : nullptr, logits_ + image * logits.size(1)};
  }

  // Each image keeps its first `count` blocks.
  void keep_first(int64_t count) const {
    for (int64_t image = 0; image < decisions.size(0); ++image) {
      std::fill_n(decisions_ + image * decisions.size(1), count, true);
    }
  }

  at::Tensor logits;     // [batch, num_classes]
  at::Tensor decisions;  // [batch, num_blocks]

 private:
  float* logits_;
  bool* decisions_;
};

// ---------------------------------------------------------------- operators

std::tuple<at::Tensor, at::Tensor> walk_sequential(const at::Tensor& images,
                                                   const at::Tensor& weights,
                                                   at::IntArrayRef layers, int64_t num_classes,
                                                   bool subsample, const at::Tensor& gates) {
  const Network network = read_network("weights", weights, layers, num_classes, subsample);
  const Images batch = read_images(images, kSizeMultiple);
  const at::Tensor matrix = read_matrix("gates", gates, network.num_blocks, kGateValues);
  const float* values = matrix.const_data_ptr<float>();
  Outputs outputs(network, batch);
  if (batch.batch == 0) return {outputs.logits, outputs.decisions};
  Walk walk(choose_kernels(), network, batch, 0, network.padded_classes);
  walk.run(in_order(batch.batch), gated_steps(network.num_blocks), [&](Walker& walker) {
    const Rows rows = outputs.rows(walker.image);
    Sequential gate(walker, rows, values);
    walk_gated(walker, rows, &gate);
  });
  return {outputs.logits, outputs.decisions};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> walk_halting(
    const at::Tensor& images, const at::Tensor& weights, at::IntArrayRef layers,
    int64_t num_classes, bool subsample, const at::Tensor& gates, double epsilon, bool hard) {
  const Network network = read_network("weights", weights, layers, num_classes, subsample);
  const Images batch = read_images(images, kSizeMultiple);
  const at::Tensor matrix = read_matrix("gates", gates, network.num_blocks, kGateValues);
  TORCH_CHECK_VALUE(epsilon > 0 && epsilon < 1, "epsilon: expected between 0 and 1, got ", epsilon);
  const float* values = matrix.const_data_ptr<float>();
  const float enough = static_cast<float>(1 - epsilon);
  Outputs outputs(network, batch);
  const at::Tensor shares = at::zeros({batch.batch, network.num_blocks}, at::kFloat);
  if (batch.batch == 0) return {outputs.logits, outputs.decisions, shares};
  float* all_shares = shares.mutable_data_ptr<float>();
  for (int image = 0; image < batch.batch; ++image) {
    // A segment's first block is kept; where it is the only one, no score says its share.
    const Rows rows = outputs.rows(image);
    for (int block = 0, segment = 0; segment < kSegments; block += network.layers[segment++]) {
      rows.decisions[block] = true;
      all_shares[int64_t{image} * network.num_blocks + block] = network.layers[segment] == 1;
    }
  }
  Walk walk(choose_kernels(), network, batch, hard ? 0 : kBlended + 1, network.padded_classes);
  walk.run(in_order(batch.batch), gated_steps(network.num_blocks), [&](Walker& walker) {
    const Rows rows = outputs.rows(walker.image, hard ? nullptr : all_shares);
    Halting gate(walker, rows, values, enough, hard,
                 all_shares + int64_t{walker.image} * network.num_blocks);
    walk_gated(walker, rows, &gate);
  });
  return {outputs.logits, outputs.decisions, shares};
}

at::Tensor walk_weighted(const at::Tensor& images, const at::Tensor& decisions,
                         const at::Tensor& shares, const at::Tensor& weights,
                         at::IntArrayRef layers, int64_t num_classes, bool subsample) {
  const Network network = read_network("weights", weights, layers, num_classes, subsample);
  const Images batch = read_images(images, kSizeMultiple);
  const Outputs outputs(network, batch, read_decisions(decisions, batch, network));
  const at::Tensor own = read_matrix("shares", shares, batch.batch, network.num_blocks);
  const float* all_shares = own.const_data_ptr<float>();
  if (batch.batch == 0) return outputs.logits;
  Walk walk(choose_kernels(), network, batch, kBlended + 1, network.padded_classes);
  walk.run(by_usage(outputs.decisions), gated_steps(network.num_blocks), [&](Walker& walker) {
    walk_gated(walker, outputs.rows(walker.image, all_shares), nullptr);
  });
  return outputs.logits;
}

std::tuple<at::Tensor, at::Tensor> walk_exits(const at::Tensor& images, const at::Tensor& weights,
                                              at::IntArrayRef layers, int64_t num_classes,
                                              bool subsample, at::IntArrayRef after,
                                              const at::Tensor& heads, const at::Tensor& rules,
                                              const std::optional<at::Tensor>& decisions) {
  const Network network = read_network("weights", weights, layers, num_classes, subsample);
  const Images batch = read_images(images, kSizeMultiple);
  const int64_t count = static_cast<int64_t>(after.size());
  const at::Tensor all_heads =
      read_matrix("heads", heads, count, int64_t{kGateValues} * network.padded_classes);
  const at::Tensor all_rules = read_matrix("rules", rules, count, Exits::kRuleValues);
  const Exits::Places places =
      read_exits(network, after, all_heads, all_rules, decisions.has_value());
  std::optional<at::Tensor> given;
  if (decisions) {
    given = read_decisions(*decisions, batch, network);
    check_prefixes(*given, places.after);
  }
  const Outputs outputs = given ? Outputs(network, batch, *given) : Outputs(network, batch);
  if (batch.batch == 0) return {outputs.logits, outputs.decisions};
  if (!given) outputs.keep_first(after.empty() ? network.num_blocks : after.front());
  Walk walk(choose_kernels(), network, batch, 0, 2 * network.padded_classes);
  walk.run(given ? by_usage(*given) : in_order(batch.batch), gated_steps(network.num_blocks),
           [&](Walker& walker) {
             const Rows rows = outputs.rows(walker.image);
             Exits gate(walker, rows, places);
             walk_gated(walker, rows, &gate);
           });
  return {outputs.logits, outputs.decisions};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> walk_look(
    const at::Tensor& images, const at::Tensor& weights, at::IntArrayRef layers,
    int64_t num_classes, bool subsample, int64_t after, const at::Tensor& head, int64_t outputs,
    const std::optional<at::Tensor>& sets, const std::optional<at::Tensor>& costs) {
  const Network network = read_network("weights", weights, layers, num_classes, subsample);
  const Images batch = read_images(images, kSizeMultiple);
  TORCH_CHECK_VALUE(!sets || sets->dim() == 2, "sets: expected shape (M, ", network.num_blocks,
                    "), got ", sets->sizes());
  TORCH_CHECK_VALUE(sets ? outputs == sets->size(0) && outputs >= 1 : outputs == network.num_blocks,
                    "outputs: expected one of each set, or of each of ", network.num_blocks,
                    " blocks, got ", outputs);
  Look::Head own = read_head(network, batch, after, head, outputs);
  at::Tensor all_sets, all_costs;
  if (sets) {
    check_sets(*sets, costs, outputs, network.num_blocks, after);
    all_sets = sets->contiguous();
    all_costs = costs->contiguous();
    own.sets = all_sets.const_data_ptr<bool>();
    own.costs = all_costs.const_data_ptr<float>();
  }
  const Outputs result(network, batch);
  const at::Tensor look_logits = at::empty({batch.batch, outputs}, at::kFloat);
  if (batch.batch == 0) return {result.logits, result.decisions, look_logits};
  result.keep_first(after);
  float* all_look_logits = look_logits.mutable_data_ptr<float>();
  Walk walk(choose_kernels(), network, batch, Look::kNumSpare,
            std::max(network.padded_classes, own.padded_outputs));
  walk.run(in_order(batch.batch), gated_steps(network.num_blocks), [&](Walker& walker) {
    const Rows rows = result.rows(walker.image);
    Look gate(walker, rows, own, all_look_logits + walker.image * outputs);
    walk_gated(walker, rows, &gate);
  });
  return {result.logits, result.decisions, look_logits};
}

}  // namespace
}  // namespace blockdrop::walk

TORCH_LIBRARY_IMPL(blockdrop_fast, CPU, m) {
  m.impl("walk_sequential", &blockdrop::walk::walk_sequential);
  m.impl("walk_halting", &blockdrop::walk::walk_halting);
  m.impl("walk_weighted", &blockdrop::walk::walk_weighted);
  m.impl("walk_exits", &blockdrop::walk::walk_exits);
  m.impl("walk_look", &blockdrop::walk::walk_look);
}
