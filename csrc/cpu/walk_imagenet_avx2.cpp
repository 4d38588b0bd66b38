// The CPU walk of ImageNet networks with AVX2 and FMA.

#include "cpu/walk_imagenet_kernels.h"

namespace blockdrop::walk_imagenet {

const Kernels* avx2_kernels() {
  static constexpr Kernels kKernels = make_kernels("avx2");
  return &kKernels;
}

}  // namespace blockdrop::walk_imagenet
