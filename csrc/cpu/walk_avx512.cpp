// The CPU walk with AVX-512.

#include "cpu/walk_kernels.h"

namespace blockdrop::walk {

const Kernels* avx512_kernels() {
  static constexpr Kernels kKernels = make_kernels("avx512");
  return &kKernels;
}

}  // namespace blockdrop::walk
