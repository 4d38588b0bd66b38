// Switch nodes in the CUDA graph that a stream is capturing: they choose, at each launch of the
// graph and without the host, which of a residual block's bodies runs. Called from Python by
// blockdrop_fast/executors/recording.py; csrc/build_info.cpp makes the module. Streams, graphs,
// handles and addresses are numbers here, so that this needs no header of CUDA.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace blockdrop::conditional {

// Why there are no switch nodes; empty if there are. The other functions raise this.
std::string why_not();

// Creates a handle for each residual block in the graph that `stream` is capturing, and captures
// one kernel that sets them all, at each launch, from
//   counts    device address, [num_blocks] int32: active images,
//   all_from  device address, [1] int32: the count from which on a block's body 1 runs.
// Fewer images, but any: body 0. No image: no body.
// RuntimeError: the stream is not capturing.
std::vector<uint64_t> set_handles(uint64_t stream, uint64_t counts, uint64_t all_from,
                                  int64_t num_blocks);

// Appends a switch node to what `stream` is capturing, to run a body by the value of `handle`, and
// returns the graphs of bodies 0 and 1, still empty. What the stream captures next runs after it.
// RuntimeError: the stream is not capturing.
std::vector<uint64_t> add_switch(uint64_t stream, uint64_t handle);

// From here on what is launched on `stream`, which is not capturing yet, goes into `body`, ...
void begin_body(uint64_t stream, uint64_t body);
// ... and to here.
void end_body(uint64_t stream);

// A stream for bodies on the current device, made before any capture. Torch's own come from a pool
// that goes round, so one of those may be capturing already.
uint64_t make_stream();
void destroy_stream(uint64_t stream);

}  // namespace blockdrop::conditional
