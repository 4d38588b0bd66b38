// Chooses the kernels of the CPU walk at run time; `walk_isa` says which.

#include "cpu/walk_isa.h"

#include <torch/library.h>

#include <cstdlib>
#include <string>

namespace blockdrop::walk {
namespace {

const Kernels* avx512_if_supported() {
#ifdef BLOCKDROP_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    return avx512_kernels();
  }
#endif
  return nullptr;
}

const Kernels* avx2_if_supported() {
#ifdef BLOCKDROP_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2")) {
    return avx2_kernels();
  }
#endif
  return nullptr;
}

}  // namespace

const Kernels& choose_kernels() {
  const char* variable = std::getenv("BLOCKDROP_CPU_ISA");
  const std::string name = variable ? variable : "";
  const Kernels* kernels = nullptr;
  if (name.empty()) {
    kernels = avx512_if_supported();
    if (!kernels) kernels = avx2_if_supported();
    if (!kernels) kernels = portable_kernels();
  } else if (name == "avx512") {
    kernels = avx512_if_supported();
  } else if (name == "avx2") {
    kernels = avx2_if_supported();
  } else if (name == "portable") {
    kernels = portable_kernels();
  } else {
    TORCH_CHECK_VALUE(false, "BLOCKDROP_CPU_ISA: expected avx512, avx2 or portable, got '", name,
                      "'");
  }
  TORCH_CHECK(kernels, "BLOCKDROP_CPU_ISA: this processor or this build does not support ", name);
  return *kernels;
}

}  // namespace blockdrop::walk

// Defined here and not in Python, because there is nothing to tell without these kernels.
TORCH_LIBRARY_FRAGMENT(blockdrop_fast, m) {
  m.def("walk_isa() -> str", [] { return std::string(blockdrop::walk::choose_kernels().name); });
}
