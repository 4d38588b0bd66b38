// Stands in for torch's header of this name where csrc/cuda/conditional.cu is compiled for a CPU.

#pragma once

#include <cuda_runtime.h>

#include <sstream>
#include <stdexcept>

#define C10_CUDA_CHECK(call)                                                     \
  do {                                                                           \
    const cudaError_t error = (call);                                            \
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorName(error)); \
  } while (false)

#define TORCH_CHECK(condition, ...)                                                   \
  do {                                                                                \
    if (!(condition)) throw std::runtime_error(blockdrop::graphs::text(__VA_ARGS__)); \
  } while (false)

namespace blockdrop::graphs {

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

}  // namespace blockdrop::graphs
