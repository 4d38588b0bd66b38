// The CPU walk with what every processor of the architecture has (SSE2 on x86-64, NEON on
// aarch64).

#include "cpu/walk_kernels.h"

namespace blockdrop::walk {

const Kernels* portable_kernels() {
  static constexpr Kernels kKernels = make_kernels("portable");
  return &kKernels;
}

}  // namespace blockdrop::walk
