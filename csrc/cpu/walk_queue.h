// Who walks which image, and who helps whom; of what is computed on the way nothing is known here.
//
// A thread takes an image from a queue and walks it alone, stem to classifier, in buffers that
// stay in its L2 cache. When the queue is empty it helps with an image that another thread is
// walking: each layer is then cut into parts, a thread claims a part at a time, and goes on to the
// next layer when all parts are done. Nobody waits for a thread that has not claimed anything, so
// the walk completes with any number of threads.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace blockdrop::walk {

constexpr int kSpinsBeforeYield = 1024;  // some 10 microseconds, about what a layer takes

inline void relax(int spins) {
  if (spins >= kSpinsBeforeYield) {  // the thread waited for may not be running
    std::this_thread::yield();
    return;
  }
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Threads that find something to do, of those that the caller may use: at most `most` for an image.
inline int useful_threads(int64_t images, int most) {
  if (at::in_parallel_region()) return 1;
  return static_cast<int>(std::min<int64_t>(at::get_num_threads(), images * most));
}

// A layer of an image that several threads walk: which parts are claimed, and how many are done.
struct alignas(64) Step {
  std::atomic<int64_t> claimed{0};  // so many first ones, + so many last ones << 32
  std::atomic<int> done{0};
};

// One thread's way through the steps of an image. Threads that walk it together run the same
// steps in the same order; one that comes late passes over those that are done.
class Steps {
 public:
  // `steps`: what the threads share of each step; null for a thread that walks alone.
  // `helpers`: how many threads walk with the image's own, or are expected to. `last_first`: begins
  // with the last parts, so that a thread meets the same part of the image in each step.
  Steps(Step* steps, const std::atomic<int>* helpers, bool last_first)
      : next_(steps), helpers_(helpers), last_first_(last_first) {}

  // Runs parts 0 ... num_parts - 1, by whoever claims them, or run_whole() instead while there is
  // nobody to share with; returns when all is done.
  template <class Run, class RunWhole>
  void run(int num_parts, const Run& run, const RunWhole& run_whole) {
    if (!next_) return run_whole();
    Step& step = *next_++;
    if (int64_t none = 0; helpers_->load(std::memory_order_relaxed) == 0 &&
                          step.claimed.compare_exchange_strong(none, num_parts)) {
      run_whole();
      step.done.store(num_parts, std::memory_order_release);
      return;
    }
    while (true) {
      const int64_t claimed = step.claimed.fetch_add(last_first_ ? kOneOfTheLast : 1);
      const auto first = static_cast<int>(claimed % kOneOfTheLast);
      const auto last = static_cast<int>(claimed / kOneOfTheLast);
      if (first + last >= num_parts) break;
      run(last_first_ ? num_parts - 1 - last : first);
      step.done.fetch_add(1, std::memory_order_release);
    }
    for (int spins = 0; step.done.load(std::memory_order_acquire) < num_parts; ++spins) {
      relax(spins);
    }
  }

 private:
  static constexpr int64_t kOneOfTheLast = int64_t{1} << 32;

  Step* next_;
  const std::atomic<int>* const helpers_;
  const bool last_first_;
};

// One thread on one image.
struct Turn {
  int position;  // of the image in the queue
  int slot;      // of the thread that took the image: whose buffers hold it
  int thread;    // that walks now
  Steps steps;
};

class Queue {
 public:
  // `max_steps` of one image. `num_shared`: so many last images may be walked by several threads.
  Queue(int num_images, int num_threads, int64_t max_steps, int num_shared)
      : num_images_(num_images),
        num_threads_(num_threads),
        max_steps_(max_steps),
        num_shared_(num_shared),
        slots_(num_threads) {
    if (num_threads_ == 1) return;
    for (Slot& slot : slots_) {
      slot.steps = std::make_unique<Step[]>(max_steps_);
      // Threads that will get no image are about to come.
      slot.helpers = num_threads_ > num_images_ ? 1 : 0;
    }
  }

  // On each thread calls prepare(thread), then walk(Turn) until all images are walked.
  template <class Prepare, class Walk>
  void run(const Prepare& prepare, const Walk& walk) {
    at::parallel_for(0, num_threads_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        prepare(static_cast<int>(thread));
        work(static_cast<int>(thread), walk);
      }
    });
  }

 private:
  enum class State { kIdle, kPreparing, kWalking, kWalkingTogether };

  // What other threads need to know of one, to help with its image.
  struct Slot {
    std::atomic<State> state{State::kIdle};
    int position = 0;
    std::unique_ptr<Step[]> steps;
    std::atomic<int> helpers{0};  // that walk, or are expected to
  };

  // Walks images while there are any, then helps with the last ones.
  template <class Walk>
  void work(int thread, const Walk& walk) {
    Slot& own = slots_[thread];
    while (true) {
      // Before the queue is asked: a thread that finds it empty sees that this one may have got
      // the last image.
      own.state.store(State::kPreparing);
      const int position = next_.fetch_add(1);
      if (position >= num_images_) break;
      own.position = position;
      const bool together = num_threads_ > 1 && position >= num_images_ - num_shared_;
      if (together) {
        for (int64_t i = 0; i < max_steps_; ++i) {
          own.steps[i].claimed.store(0, std::memory_order_relaxed);
          own.steps[i].done.store(0, std::memory_order_relaxed);
        }
      }
      own.state.store(together ? State::kWalkingTogether : State::kWalking);
      walk(Turn{position, thread, thread,
                Steps(together ? own.steps.get() : nullptr, &own.helpers, false)});
    }
    own.state.store(State::kIdle);
    // No slot takes another image now.
    for (int i = 1; i < num_threads_; ++i) {
      const int slot = (thread + i) % num_threads_;
      Slot& other = slots_[slot];
      State state = other.state.load();
      for (int spins = 0; state == State::kPreparing; ++spins) {
        relax(spins);
        state = other.state.load();
      }
      if (state == State::kWalkingTogether) {
        other.helpers.fetch_add(1);
        walk(Turn{other.position, slot, thread,
                  Steps(other.steps.get(), &other.helpers, (thread - slot) % 2 != 0)});
      }
    }
  }

  const int num_images_;
  const int num_threads_;
  const int64_t max_steps_;
  const int num_shared_;
  std::vector<Slot> slots_;
  std::atomic<int> next_{0};
};

}  // namespace blockdrop::walk
