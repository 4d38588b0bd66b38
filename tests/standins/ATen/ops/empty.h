#pragma once

#include "ATen/core/Tensor.h"

namespace at {

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType) {
  int64_t size = 1;
  for (const int64_t one : sizes) size *= one;
  return Tensor(size);
}

}  // namespace at
