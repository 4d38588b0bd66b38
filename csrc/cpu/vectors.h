// Vectors of floats as the compiler knows them, as wide as the instruction set that a file is
// compiled for. For files of kernels only: everything here has internal linkage, see
// csrc/README.md.

#pragma once

namespace blockdrop {
namespace {

// Floats in a vector register.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
// The same in memory, at any address of a float.
typedef float VecInMemory __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const VecInMemory*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<VecInMemory*>(p) = v; }

inline Vec relu(Vec v) {
  const Vec zero = {};
  return zero > v ? zero : v;  // in this order NaN stays NaN
}

}  // namespace
}  // namespace blockdrop
