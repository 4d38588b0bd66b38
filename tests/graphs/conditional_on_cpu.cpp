// Builds graphs by csrc/cuda/conditional.cu as blockdrop_fast/executors/recording.py does, in the
// runtime of cuda_runtime.h beside this file. tests/test_conditional.py reads what it prints.
//
//   graph ALL_FROM COUNT... [/ COUNT...]    nodes, then what each launch with its counts runs
//   anything else                           a mistake, which ends in an error

#include "cuda/conditional.cu"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>

namespace conditional = blockdrop::conditional;
namespace graphs = blockdrop::graphs;

namespace {

std::vector<std::string> ran;

void named_kernel(std::string name) { ran.push_back(name); }

uint64_t number(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

void launch(uint64_t stream, const std::string& name) {
  graphs::name_of_launches = name;
  cudaLaunchConfig_t config{};
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, named_kernel, name));
}

// A stream that captures.
uint64_t begin() {
  const uint64_t stream = conditional::make_stream();
  C10_CUDA_CHECK(cudaStreamBeginCapture(reinterpret_cast<cudaStream_t>(stream),
                                        cudaStreamCaptureModeThreadLocal));
  return stream;
}

cudaGraph_t end(uint64_t stream) {
  cudaGraph_t graph;
  C10_CUDA_CHECK(cudaStreamEndCapture(reinterpret_cast<cudaStream_t>(stream), &graph));
  conditional::destroy_stream(stream);
  return graph;
}

struct Inputs {
  int32_t all_from;
  std::vector<int32_t> counts;
};

cudaGraph_t build(const Inputs& inputs) {
  const uint64_t stream = begin();
  const uint64_t bodies_stream = conditional::make_stream();
  launch(stream, "stem");
  graphs::name_of_launches = "set";
  const auto handles = conditional::set_handles(stream, number(inputs.counts.data()),
                                                number(&inputs.all_from), inputs.counts.size());
  for (size_t k = 0; k < handles.size(); ++k) {
    const std::string block = std::to_string(k);
    launch(stream, "shortcut " + block);
    graphs::name_of_launches = "switch " + block;
    const auto bodies = conditional::add_switch(stream, handles[k]);
    const char* const names[] = {"some ", "all "};
    for (size_t body = 0; body < bodies.size(); ++body) {
      conditional::begin_body(bodies_stream, bodies[body]);
      launch(bodies_stream, names[body] + block);
      launch(bodies_stream, names[body] + block + " last");
      conditional::end_body(bodies_stream);
    }
  }
  launch(stream, "classifier");
  conditional::destroy_stream(bodies_stream);
  return end(stream);
}

void print_nodes(const CUgraph_st& graph, const std::string& indent) {
  for (auto& node : graph.nodes) {
    std::cout << indent << node->name << " <-";
    for (const auto* before : node->after) std::cout << " [" << before->name << "]";
    std::cout << "\n";
    for (auto& body : node->bodies) print_nodes(*body, indent + "  ");
  }
}

void print_graph(int num_words, char** words) {
  Inputs inputs{std::atoi(words[0]), {}};
  std::vector<std::vector<int32_t>> launches(1);
  for (int i = 1; i < num_words; ++i) {
    if (std::strcmp(words[i], "/") == 0) {
      launches.emplace_back();
    } else {
      launches.back().push_back(std::atoi(words[i]));
    }
  }
  inputs.counts = launches[0];
  const cudaGraph_t graph = build(inputs);
  print_nodes(*graph, "");
  for (auto& counts : launches) {
    std::copy(counts.begin(), counts.end(), inputs.counts.begin());  // the address is captured
    ran.clear();
    C10_CUDA_CHECK(graphs::launch(graph));
    std::cout << "ran";
    for (auto& name : ran) std::cout << " [" << name << "]";
    std::cout << "\n";
  }
}

void make_mistake(const std::string& mistake) {
  const int32_t count = 1, all_from = 2;
  if (mistake == "not capturing") {
    conditional::set_handles(conditional::make_stream(), number(&count), number(&all_from), 1);
  }
  if (mistake == "switch while not capturing") {
    conditional::add_switch(conditional::make_stream(), 1);
  }
  if (mistake == "old driver" || mistake == "no driver") {
    graphs::driver_version = mistake == "old driver" ? 12040 : 0;
    throw std::runtime_error(conditional::why_not());
  }
  const uint64_t stream = begin();
  const auto handles = conditional::set_handles(stream, number(&count), number(&all_from), 1);
  if (mistake == "no switch") {
    C10_CUDA_CHECK(graphs::launch(end(stream)));
  }
  const uint64_t other = begin();
  if (mistake == "handle of another graph") {
    conditional::add_switch(other, handles[0]);
  }
  const auto bodies = conditional::add_switch(stream, handles[0]);
  if (mistake == "two switches") {
    conditional::add_switch(stream, handles[0]);
  }
  if (mistake == "capturing already") {
    conditional::begin_body(stream, bodies[0]);
  }
  const uint64_t bodies_stream = conditional::make_stream();
  conditional::begin_body(bodies_stream, bodies[0]);
  if (mistake == "ended on another stream") {
    conditional::end_body(conditional::make_stream());
  }
  if (mistake == "ended by another thread") {
    std::exception_ptr error;
    std::thread([&] {
      try {
        conditional::end_body(bodies_stream);
      } catch (...) {
        error = std::current_exception();
      }
    }).join();
    std::rethrow_exception(error);
  }
  if (mistake == "destroyed while capturing") {
    conditional::destroy_stream(bodies_stream);
  }
  launch(bodies_stream, "some");
  conditional::end_body(bodies_stream);
  if (mistake == "body captured twice") {
    conditional::begin_body(bodies_stream, bodies[0]);
  }
  if (mistake == "set too late") {  // by a node that the switch does not depend on
    const cudaGraph_t graph = end(stream);
    graph->nodes[1]->after.clear();
    C10_CUDA_CHECK(graphs::launch(graph));
  }
}

}  // namespace

int main(int num_words, char** words) {
  try {
    if (conditional::why_not() != "") {
      conditional::add_switch(0, 0);
    }
    if (std::strcmp(words[1], "graph") == 0) {
      print_graph(num_words - 2, words + 2);
    } else {
      make_mistake(words[1]);
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}
