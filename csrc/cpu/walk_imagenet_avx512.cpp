// The CPU walk of ImageNet networks with AVX-512.

#include "cpu/walk_imagenet_kernels.h"

namespace blockdrop::walk_imagenet {

const Kernels* avx512_kernels() {
  static constexpr Kernels kKernels = make_kernels("avx512");
  return &kKernels;
}

}  // namespace blockdrop::walk_imagenet
