// The CPU walk with AVX2 and FMA.

#include "cpu/walk_kernels.h"

namespace blockdrop::walk {

const Kernels* avx2_kernels() {
  static constexpr Kernels kKernels = make_kernels("avx2");
  return &kKernels;
}

}  // namespace blockdrop::walk
