// A CUDA runtime that knows of streams, capture and graphs only, and runs graphs on the CPU: enough
// for csrc/cuda/conditional.cu, and strict. It returns an error wherever CUDA documents one, and
// for what can only be a mistake here:
// * a dependency, or a handle, of another graph; a handle of two nodes or of none;
// * a capture begun on a capturing stream, ended on another one or by another thread;
// * two captures into one graph;
// * a node that chooses by a value which no node before it has set in the same launch.
// -DCUDART_VERSION=12080 gives the names that CUDA 12 has for the same functions.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#ifndef CUDART_VERSION
#define CUDART_VERSION 13000
#endif
#define __global__
#define __launch_bounds__(threads)

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInsufficientDriver,
  cudaErrorIllegalState,
  cudaErrorStreamCaptureUnmatched,
  cudaErrorStreamCaptureWrongThread,
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal };
enum cudaGraphNodeType { cudaGraphNodeTypeKernel, cudaGraphNodeTypeConditional = 0x0d };
enum cudaGraphConditionalNodeType { cudaGraphCondTypeIf, cudaGraphCondTypeSwitch = 2 };
constexpr unsigned cudaStreamSetCaptureDependencies = 1;
constexpr unsigned cudaStreamNonBlocking = 1;

struct cudaGraphEdgeData {
  unsigned char from_port, to_port, type, reserved[5];
};
using cudaGraphConditionalHandle = unsigned long long;
struct CUgraph_st;
using cudaGraph_t = CUgraph_st*;

struct CUgraphNode_st {
  std::string name;
  std::vector<CUgraphNode_st*> after;
  std::function<void()> kernel;           // of a kernel node
  cudaGraphConditionalHandle handle = 0;  // of a switch node
  std::vector<std::unique_ptr<CUgraph_st>> bodies;
  std::vector<cudaGraph_t> body_pointers;
};
using cudaGraphNode_t = CUgraphNode_st*;

struct CUgraph_st {
  std::vector<std::unique_ptr<CUgraphNode_st>> nodes;
  std::set<cudaGraphConditionalHandle> handles;
  bool was_captured = false;

  bool has(const CUgraphNode_st* node) const {
    return std::any_of(nodes.begin(), nodes.end(), [&](auto& own) { return own.get() == node; });
  }
};

struct CUstream_st {
  cudaGraph_t graph = nullptr;  // under capture
  std::vector<cudaGraphNode_t> tail;
  std::vector<cudaGraphEdgeData> edges;
  std::thread::id thread;
};
using cudaStream_t = CUstream_st*;

struct cudaConditionalNodeParams {
  cudaGraphConditionalHandle handle;
  cudaGraphConditionalNodeType type;
  unsigned size;
  cudaGraph_t* phGraph_out;
};
struct cudaGraphNodeParams {
  cudaGraphNodeType type;
  cudaConditionalNodeParams conditional;
};

struct dim3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace blockdrop::graphs {

struct Setting {
  unsigned value;
  const CUgraphNode_st* by;
};

inline std::string name_of_launches = "kernel";  // nodes to come are called so
inline int driver_version = 13000;
inline cudaGraphConditionalHandle last_handle = 0;
inline std::map<cudaGraphConditionalHandle, Setting> settings;  // of the launch under way
inline const CUgraphNode_st* running = nullptr;

inline bool comes_before(const CUgraphNode_st* first, const CUgraphNode_st* node) {
  return first == node || std::any_of(node->after.begin(), node->after.end(),
                                      [&](auto* next) { return comes_before(first, next); });
}

// Appends a node to what a stream is capturing.
inline cudaGraphNode_t append(cudaStream_t stream) {
  stream->graph->nodes.push_back(std::make_unique<CUgraphNode_st>());
  const cudaGraphNode_t node = stream->graph->nodes.back().get();
  node->name = name_of_launches;
  node->after = stream->tail;
  stream->tail = {node};
  stream->edges = {cudaGraphEdgeData{}};
  return node;
}

}  // namespace blockdrop::graphs

inline const char* cudaGetErrorName(cudaError_t error) {
  const char* const names[] = {"cudaSuccess",
                               "cudaErrorInvalidValue",
                               "cudaErrorInsufficientDriver",
                               "cudaErrorIllegalState",
                               "cudaErrorStreamCaptureUnmatched",
                               "cudaErrorStreamCaptureWrongThread"};
  return names[error];
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = blockdrop::graphs::driver_version;
  return *version == 0 ? cudaErrorInsufficientDriver : cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

struct cudaFuncAttributes {};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new CUstream_st;
  return cudaSuccess;
}

inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (stream->graph != nullptr) return cudaErrorIllegalState;
  delete stream;
  return cudaSuccess;
}

inline cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph,
                                                 const cudaGraphNode_t* tail,
                                                 const cudaGraphEdgeData*, size_t tail_size,
                                                 cudaStreamCaptureMode) {
  if (stream == nullptr || graph == nullptr || stream->graph != nullptr) {
    return cudaErrorIllegalState;
  }
  if (graph->was_captured) return cudaErrorInvalidValue;
  graph->was_captured = true;
  stream->graph = graph;
  stream->tail.assign(tail, tail + tail_size);
  stream->edges.assign(tail_size, cudaGraphEdgeData{});
  stream->thread = std::this_thread::get_id();
  return cudaSuccess;
}

inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  return cudaStreamBeginCaptureToGraph(stream, new CUgraph_st, nullptr, nullptr, 0, mode);
}

inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (stream->graph == nullptr) return cudaErrorStreamCaptureUnmatched;
  if (stream->thread != std::this_thread::get_id()) return cudaErrorStreamCaptureWrongThread;
  *graph = stream->graph;
  stream->graph = nullptr;
  return cudaSuccess;
}

inline cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle* handle,
                                                    cudaGraph_t graph, unsigned, unsigned flags) {
  if (flags > 1) return cudaErrorInvalidValue;
  *handle = ++blockdrop::graphs::last_handle;
  graph->handles.insert(*handle);
  return cudaSuccess;
}

namespace blockdrop::graphs {

inline cudaError_t get_capture(cudaStream_t stream, cudaStreamCaptureStatus* status,
                               unsigned long long*, cudaGraph_t* graph,
                               const cudaGraphNode_t** tail, const cudaGraphEdgeData** edges,
                               size_t* tail_size) {
  *status = cudaStreamCaptureStatusNone;
  if (stream->graph == nullptr) return cudaSuccess;
  *status = cudaStreamCaptureStatusActive;
  *graph = stream->graph;
  *tail = stream->tail.data();
  *edges = stream->edges.data();
  *tail_size = stream->tail.size();
  return cudaSuccess;
}

inline cudaError_t set_tail(cudaStream_t stream, cudaGraphNode_t* tail, const cudaGraphEdgeData*,
                            size_t tail_size, unsigned flags) {
  if (stream->graph == nullptr) return cudaErrorIllegalState;
  for (size_t i = 0; i < tail_size; ++i) {
    if (!stream->graph->has(tail[i])) return cudaErrorInvalidValue;
  }
  if (flags == cudaStreamSetCaptureDependencies) stream->tail.clear();
  stream->tail.insert(stream->tail.end(), tail, tail + tail_size);
  stream->edges.assign(stream->tail.size(), cudaGraphEdgeData{});
  return cudaSuccess;
}

inline cudaError_t add_node(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after,
                            const cudaGraphEdgeData*, size_t after_size,
                            cudaGraphNodeParams* params) {
  auto& conditional = params->conditional;
  if (params->type != cudaGraphNodeTypeConditional || conditional.size == 0 ||
      conditional.type != cudaGraphCondTypeSwitch || !graph->handles.count(conditional.handle)) {
    return cudaErrorInvalidValue;
  }
  const std::set<cudaGraphNode_t> unique(after, after + after_size);
  for (cudaGraphNode_t one : unique) {
    if (!graph->has(one)) return cudaErrorInvalidValue;
  }
  for (auto& other : graph->nodes) {
    if (other->handle == conditional.handle) return cudaErrorInvalidValue;
  }
  if (unique.size() != after_size) return cudaErrorInvalidValue;
  graph->nodes.push_back(std::make_unique<CUgraphNode_st>());
  *node = graph->nodes.back().get();
  (*node)->name = name_of_launches;
  (*node)->after.assign(after, after + after_size);
  (*node)->handle = conditional.handle;
  for (unsigned body = 0; body < conditional.size; ++body) {
    (*node)->bodies.push_back(std::make_unique<CUgraph_st>());
    (*node)->body_pointers.push_back((*node)->bodies.back().get());
  }
  conditional.phGraph_out = (*node)->body_pointers.data();
  return cudaSuccess;
}

// What instantiating and launching a graph does: every node after those it depends on.
inline cudaError_t run(cudaGraph_t graph) {
  std::set<cudaGraphConditionalHandle> unused = graph->handles;
  for (auto& node : graph->nodes) unused.erase(node->handle);
  if (!unused.empty()) return cudaErrorInvalidValue;
  std::set<const CUgraphNode_st*> done;
  for (auto& node : graph->nodes) {
    for (const auto* before : node->after) {
      if (!done.count(before)) return cudaErrorInvalidValue;
    }
    if (node->handle == 0) {
      running = node.get();
      node->kernel();
    } else {
      const auto setting = settings.find(node->handle);
      if (setting == settings.end() || !comes_before(setting->second.by, node.get())) {
        return cudaErrorInvalidValue;
      }
      if (setting->second.value < node->bodies.size()) {
        const cudaError_t error = run(node->bodies[setting->second.value].get());
        if (error != cudaSuccess) return error;
      }
    }
    done.insert(node.get());
  }
  return cudaSuccess;
}

inline cudaError_t launch(cudaGraph_t graph) {
  settings.clear();
  return run(graph);
}

}  // namespace blockdrop::graphs

#if CUDART_VERSION >= 13000
constexpr auto cudaStreamGetCaptureInfo = blockdrop::graphs::get_capture;
constexpr auto cudaStreamUpdateCaptureDependencies = blockdrop::graphs::set_tail;
constexpr auto cudaGraphAddNode = blockdrop::graphs::add_node;
#else
constexpr auto cudaStreamGetCaptureInfo_v3 = blockdrop::graphs::get_capture;
constexpr auto cudaStreamUpdateCaptureDependencies_v2 = blockdrop::graphs::set_tail;
constexpr auto cudaGraphAddNode_v2 = blockdrop::graphs::add_node;
#endif

// Device code: the node that runs sets a handle's value.
inline void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned value) {
  blockdrop::graphs::settings[handle] = {value, blockdrop::graphs::running};
}

template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                               Actual&&... arguments) {
  const dim3 sizes[] = {config->gridDim, config->blockDim};
  for (const dim3& size : sizes) {
    if (size.x * size.y * size.z != 1) return cudaErrorInvalidValue;  // one thread is all there is
  }
  if (config->stream->graph == nullptr) return cudaErrorIllegalState;
  // A launch copies its arguments.
  blockdrop::graphs::append(config->stream)->kernel =
      [kernel, copies = std::tuple<Expected...>(std::forward<Actual>(arguments)...)] {
        std::apply(kernel, copies);
      };
  return cudaSuccess;
}
