// Chooses the instruction set of the CPU walks at run time; `walk_isa` says which.

#include "cpu/walk_isa.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <array>
#include <cstdlib>
#include <string>

namespace blockdrop::walk {
namespace {

bool avx512_is_supported() {
#ifdef BLOCKDROP_HAVE_AVX512
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#else
  return false;
#endif
}

bool avx2_is_supported() {
#ifdef BLOCKDROP_HAVE_AVX2
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2");
#else
  return false;
#endif
}

std::string name_of(Isa isa) {
  constexpr std::array<const char*, 3> kNames = {"portable", "avx2", "avx512"};
  return kNames[static_cast<int>(isa)];
}

bool is_supported(Isa isa) {
  if (isa == Isa::kAvx512) return avx512_is_supported();
  return isa != Isa::kAvx2 || avx2_is_supported();
}

}  // namespace

Isa choose_isa() {
  constexpr std::array<Isa, 3> kBestFirst = {Isa::kAvx512, Isa::kAvx2, Isa::kPortable};
  const char* variable = std::getenv("BLOCKDROP_CPU_ISA");
  const std::string name = variable ? variable : "";
  for (const Isa isa : kBestFirst) {
    if (name.empty() ? !is_supported(isa) : name != name_of(isa)) continue;
    TORCH_CHECK(is_supported(isa),
                "BLOCKDROP_CPU_ISA: this processor or this build does not support ", name);
    return isa;
  }
  TORCH_CHECK_VALUE(false, "BLOCKDROP_CPU_ISA: expected avx512, avx2 or portable, got '", name,
                    "'");
}

}  // namespace blockdrop::walk

// Defined here and not in Python, because there is nothing to tell without these kernels.
TORCH_LIBRARY_FRAGMENT(blockdrop_fast, m) {
  m.def("walk_isa() -> str",
        [] { return blockdrop::walk::name_of(blockdrop::walk::choose_isa()); });
}
