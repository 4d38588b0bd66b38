// Memory for one call of a walk, kept for the next one.
//
// A call's activations are tens of MB: given back to the system after each call, they would be
// faulted in again by the next, page by page, which can take as long as the arithmetic.

#pragma once

#include <cstddef>

namespace blockdrop::walk {

// Floats, uninitialised, from what earlier calls have left if that is large enough. Several calls
// at once get memory of their own, so the process keeps as much as its calls ever needed at once.
class CallMemory {
 public:
  explicit CallMemory(std::ptrdiff_t floats);
  ~CallMemory();
  CallMemory(const CallMemory&) = delete;
  CallMemory& operator=(const CallMemory&) = delete;

  float* data() const { return block_.data; }

  struct Block {
    float* data;
    std::ptrdiff_t floats;
  };

 private:
  Block block_;
};

}  // namespace blockdrop::walk
