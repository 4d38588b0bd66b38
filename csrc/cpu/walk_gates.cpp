// CPU kernels of the walks that decide on the way; schemas and references:
// blockdrop_fast/ops/walk_gates.py. Here are the operators, in walk_gate_kinds.h what decides, in
// walk_gated.h the program that asks it.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstdint>
#include <numeric>
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
  TORCH_CHECK_VALUE(decisions.dim() == 2, "decisions: expected shape (B, K), got ",
                    decisions.sizes());
  check_decisions(decisions, images.batch, network.num_blocks);
  return decisions.clone(at::MemoryFormat::Contiguous);
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

}  // namespace
}  // namespace blockdrop::walk

TORCH_LIBRARY_IMPL(blockdrop_fast, CPU, m) {
  m.impl("walk_sequential", &blockdrop::walk::walk_sequential);
  m.impl("walk_halting", &blockdrop::walk::walk_halting);
  m.impl("walk_weighted", &blockdrop::walk::walk_weighted);
}
