// at::parallel_for of plain threads, one an index, for programs without torch.

#pragma once

#include <cstdint>
#include <thread>
#include <vector>

namespace at {

template <class Run>
void parallel_for(int64_t begin, int64_t end, int64_t /* grain_size */, const Run& run) {
  std::vector<std::thread> threads;
  for (int64_t i = begin + 1; i < end; ++i) threads.emplace_back([&run, i] { run(i, i + 1); });
  run(begin, begin + 1);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace at
