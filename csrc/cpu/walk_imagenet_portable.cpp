// The CPU walk of ImageNet networks with what every processor of the architecture has (SSE2 on
// x86-64, NEON on aarch64).

#include "cpu/walk_imagenet_kernels.h"

namespace blockdrop::walk_imagenet {

const Kernels* portable_kernels() {
  static constexpr Kernels kKernels = make_kernels("portable");
  return &kKernels;
}

}  // namespace blockdrop::walk_imagenet
