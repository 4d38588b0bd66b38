// Switch nodes for CUDA graphs under capture; see conditional.h. CUDA has them since 12.8.
//
//   set_switches_kernel -> ... -> [switch block 0] -> ... -> [switch block 1] -> ... -> classifier
//                                   0: gathered                0: gathered
//                                   1: all images              1: all images
//
// tests/graphs compiles this file for a CPU, with a CUDA runtime that only knows about graphs. It
// therefore launches its kernel by cudaLaunchKernelEx, and the kernel has one thread.

#include "cuda/conditional.h"

#include <c10/cuda/CUDAException.h>
#include <cuda_runtime.h>

#include <algorithm>

#if CUDART_VERSION >= 12080
#define BLOCKDROP_HAVE_SWITCH 1
#else
#define BLOCKDROP_HAVE_SWITCH 0
#endif

namespace blockdrop::conditional {
namespace {

constexpr int kOldestDriver = 12080;

std::string version_name(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

#if BLOCKDROP_HAVE_SWITCH

namespace {

constexpr unsigned kSome = 0;
constexpr unsigned kAll = 1;
constexpr unsigned kBodies = 2;  // as a value: none of them

// Handles that one launch sets: more residual blocks than most networks have, and 512 of the 4 KB
// that a kernel's parameters may take.
constexpr int kHandles = 64;
struct Handles {
  cudaGraphConditionalHandle of_block[kHandles];
};

// CUDA leaves concurrent calls of cudaGraphSetConditional undefined and does not say whether it
// means those for one handle, so there is one thread. It loads all counts before it sets anything:
// 64 loads under way at once take about as long as one.
// limits: set_switches_kernel 64 registers, 0 bytes spilled, 0 bytes static shared memory
__global__ void __launch_bounds__(1)
    set_switches_kernel(Handles handles,
                        const int32_t* __restrict__ counts,    // [num_blocks]
                        const int32_t* __restrict__ all_from,  // [1]
                        int num_blocks) {
  const int32_t first_of_all = *all_from;
  int32_t count[kHandles];
#pragma unroll
  for (int k = 0; k < kHandles; ++k) {
    count[k] = k < num_blocks ? counts[k] : 0;
  }
#pragma unroll
  for (int k = 0; k < kHandles; ++k) {
    if (k < num_blocks) {
      const unsigned body = count[k] >= first_of_all ? kAll : kSome;
      cudaGraphSetConditional(handles.of_block[k], count[k] == 0 ? kBodies : body);
    }
  }
}

cudaStream_t to_stream(uint64_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

// What a stream is capturing, and what the next node will come after.
struct Capture {
  cudaGraph_t graph = nullptr;
  const cudaGraphNode_t* tail = nullptr;  // [tail_size]
  const cudaGraphEdgeData* edges = nullptr;
  size_t tail_size = 0;
};

Capture capture_of(cudaStream_t stream) {
  Capture capture;
  cudaStreamCaptureStatus status;
#if CUDART_VERSION >= 13000
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, nullptr, &capture.graph, &capture.tail,
                                          &capture.edges, &capture.tail_size));
#else
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo_v3(stream, &status, nullptr, &capture.graph,
                                             &capture.tail, &capture.edges, &capture.tail_size));
#endif
  TORCH_CHECK(status == cudaStreamCaptureStatusActive,
              "switch node: expected a stream that is capturing a CUDA graph, got one that is not");
  return capture;
}

}  // namespace

std::string why_not() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    cudaGetLastError();  // forgets the error
    return "no driver of CUDA is installed";
  }
  if (driver >= kOldestDriver) return "";
  return "switch nodes in CUDA graphs need a driver for CUDA " + version_name(kOldestDriver) +
         ", this one is for " + version_name(driver);
}

std::vector<uint64_t> set_handles(uint64_t stream, uint64_t counts, uint64_t all_from,
                                  int64_t num_blocks) {
  const cudaGraph_t graph = capture_of(to_stream(stream)).graph;
  std::vector<uint64_t> handles;
  for (int64_t first = 0; first < num_blocks; first += kHandles) {
    Handles some{};
    const int number = static_cast<int>(std::min<int64_t>(num_blocks - first, kHandles));
    for (int k = 0; k < number; ++k) {
      C10_CUDA_CHECK(cudaGraphConditionalHandleCreate(&some.of_block[k], graph, 0, 0));
      handles.push_back(some.of_block[k]);
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(1);
    config.blockDim = dim3(1);
    config.stream = to_stream(stream);
    C10_CUDA_CHECK(cudaLaunchKernelEx(&config, set_switches_kernel, some,
                                      reinterpret_cast<const int32_t*>(counts) + first,
                                      reinterpret_cast<const int32_t*>(all_from), number));
  }
  return handles;
}

std::vector<uint64_t> add_switch(uint64_t stream, uint64_t handle) {
  const Capture capture = capture_of(to_stream(stream));
  cudaGraphNodeParams params{};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = handle;
  params.conditional.type = cudaGraphCondTypeSwitch;
  params.conditional.size = kBodies;
  cudaGraphNode_t node;
#if CUDART_VERSION >= 13000
  C10_CUDA_CHECK(cudaGraphAddNode(&node, capture.graph, capture.tail, capture.edges,
                                  capture.tail_size, &params));
  C10_CUDA_CHECK(cudaStreamUpdateCaptureDependencies(to_stream(stream), &node, nullptr, 1,
                                                     cudaStreamSetCaptureDependencies));
#else
  C10_CUDA_CHECK(cudaGraphAddNode_v2(&node, capture.graph, capture.tail, capture.edges,
                                     capture.tail_size, &params));
  C10_CUDA_CHECK(cudaStreamUpdateCaptureDependencies_v2(to_stream(stream), &node, nullptr, 1,
                                                        cudaStreamSetCaptureDependencies));
#endif
  std::vector<uint64_t> bodies;
  for (unsigned body = 0; body < kBodies; ++body) {
    bodies.push_back(reinterpret_cast<uint64_t>(params.conditional.phGraph_out[body]));
  }
  return bodies;
}

void begin_body(uint64_t stream, uint64_t body) {
  // Other threads may go on to allocate memory meanwhile.
  C10_CUDA_CHECK(cudaStreamBeginCaptureToGraph(to_stream(stream),
                                               reinterpret_cast<cudaGraph_t>(body), nullptr,
                                               nullptr, 0, cudaStreamCaptureModeThreadLocal));
}

void end_body(uint64_t stream) {
  cudaGraph_t body;
  C10_CUDA_CHECK(cudaStreamEndCapture(to_stream(stream), &body));
}

uint64_t make_stream() {
  // Loads the kernel, which otherwise would be loaded at its first launch: during a capture.
  cudaFuncAttributes attributes;
  C10_CUDA_CHECK(cudaFuncGetAttributes(&attributes, set_switches_kernel));
  cudaStream_t stream;
  C10_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return reinterpret_cast<uint64_t>(stream);
}

void destroy_stream(uint64_t stream) { C10_CUDA_CHECK(cudaStreamDestroy(to_stream(stream))); }

#else

std::string why_not() {
  return "switch nodes in CUDA graphs need CUDA " + version_name(kOldestDriver) +
         ", the extension was built with " + version_name(CUDART_VERSION);
}

std::vector<uint64_t> set_handles(uint64_t, uint64_t, uint64_t, int64_t) {
  TORCH_CHECK(false, why_not());
}
std::vector<uint64_t> add_switch(uint64_t, uint64_t) { TORCH_CHECK(false, why_not()); }
void begin_body(uint64_t, uint64_t) { TORCH_CHECK(false, why_not()); }
void end_body(uint64_t) { TORCH_CHECK(false, why_not()); }
uint64_t make_stream() { TORCH_CHECK(false, why_not()); }
void destroy_stream(uint64_t) { TORCH_CHECK(false, why_not()); }

#endif

}  // namespace blockdrop::conditional
