// A thread a task, where torch has a pool that the sanitizer does not know.

#pragma once

#include <cstdint>
#include <thread>
#include <vector>

namespace at {

inline int num_threads = 1;
inline int get_num_threads() { return num_threads; }
inline bool in_parallel_region() { return false; }

template <class Run>
void parallel_for(int64_t begin, int64_t end, int64_t, const Run& run) {
  std::vector<std::thread> threads;
  for (int64_t i = begin + 1; i < end; ++i) threads.emplace_back([&run, i] { run(i, i + 1); });
  run(begin, begin + 1);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace at
