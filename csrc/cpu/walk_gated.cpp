#include "cpu/walk_gated.h"

namespace blockdrop::walk {
namespace {

// Adds up a segment's kept outputs, each times its share. A block writes its output over its input,
// so an output is added while the next kept block reads it.
class Blending {
 public:
  Blending(Walker& walker, const Rows& rows) : walker_(walker), rows_(rows) {}

  // What to run with kept block `block`: its input's share, unless that is no output of the
  // segment.
  const Blend* before(int block) {
    if (last_ < 0) {
      last_ = block;
      return nullptr;
    }
    blend_ = next(walker_.buffers.spare[kBlended]);
    started_ = true;
    last_ = block;
    return &blend_;
  }

  // The segment gives what was added up, and the output of its last kept block.
  void end(int segment) {
    if (last_ >= 0 && (started_ || rows_.shares[last_] != 1)) {
      blend_ = next(walker_.buffers.x[segment]);
      walker_.step_in_parts(walker_.walk.height(segment), kWidths[segment],
                            [&](const Part& part) { walker_.walk.kernels.blend(blend_, part); });
    }
    started_ = false;
    last_ = -1;
  }

 private:
  Blend next(float* output) const {
    const int segment = walker_.walk.network.segment_of(last_);
    return {walker_.buffers.x[segment],  started_ ? walker_.buffers.spare[kBlended] : nullptr,
            rows_.shares[last_],         output,
            walker_.walk.width(segment), kWidths[segment]};
  }

  Walker& walker_;
  const Rows& rows_;
  int last_ = -1;         // kept block of the segment
  bool started_ = false;  // something is added up
  Blend blend_{};
};

}  // namespace

void walk_gated(Walker& walker, const Rows& rows, Gate* gate) {
  const Network& network = walker.walk.network;
  Blending blending(walker, rows);
  const auto looks_at = [&](int block) { return gate && gate->looks_at(block); };
  walker.begin(looks_at(0));
  if (gate && !gate->decide(0)) return;
  for (int block = 0; block < network.num_blocks; ++block) {
    const bool keep = rows.decisions[block];
    if (keep || network.changes_shape(block)) {
      const Blend* blend = keep && rows.shares ? blending.before(block) : nullptr;
      walker.run_block(block, keep, looks_at(block + 1), blend);
      if (gate && !gate->decide(block + 1)) return;
    }
    const bool ends_segment = block + 1 == network.num_blocks || network.changes_shape(block + 1);
    if (rows.shares && ends_segment) blending.end(network.segment_of(block));
  }
  walker.classify(rows.logits);
}

}  // namespace blockdrop::walk
