// The walks' queue on images whose steps are small sums in plain memory: for a sanitizer of races,
// and whatever batch, threads and steps are drawn, every part is run once, after all of the step
// before.

#include "cpu/walk_queue.h"

#include <array>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

using namespace blockdrop::walk;

namespace {

constexpr int kMostParts = 9;
using Values = std::array<std::array<long, kMostParts>, 2>;  // of this step and the one before

int parts_of(int step) { return 1 + step * 7 % kMostParts; }

// Reads what all parts of the step before have written; takes long enough for threads to meet.
void run_part(Values& values, int step, int part) {
  long sum = 1;
  for (std::atomic<int> i{0}; i < 1000; ++i) {
  }
  for (int i = 0; step > 0 && i < parts_of(step - 1); ++i) sum += values[(step + 1) % 2][i];
  values[step % 2][part] = sum % 1000003;
}

bool check(int images, int threads, int steps, int shared) {
  std::vector<Values> values(images);
  std::vector<int> walked(images);
  std::atomic<int> num_parts{0};
  Queue queue(images, threads, steps, shared);
  queue.run([](int) {},
            [&](const Turn& turn) {
              Steps way = turn.steps;
              Values& own = values[turn.position];
              for (int step = 0; step < steps; ++step) {
                // Who comes later goes first: what has been claimed by others orders memory, too.
                if (turn.thread == turn.slot) std::this_thread::yield();
                const auto run = [&](int part) {
                  num_parts.fetch_add(1, std::memory_order_relaxed);  // orders nothing
                  run_part(own, step, part);
                };
                way.run(parts_of(step), run, [&] {
                  for (int part = 0; part < parts_of(step); ++part) run(part);
                });
              }
              if (turn.thread == turn.slot) ++walked[turn.position];
            });

  Values expected{};
  int expected_parts = 0;
  for (int step = 0; step < steps; ++step) {
    for (int part = 0; part < parts_of(step); ++part) run_part(expected, step, part);
    expected_parts += parts_of(step);
  }
  for (int image = 0; image < images; ++image) {
    if (values[image] != expected || walked[image] != 1) return false;
  }
  return num_parts == expected_parts * images;
}

}  // namespace

int main() {
  std::mt19937 generator(0);
  const auto draw = [&](int from, int to) {
    return std::uniform_int_distribution<int>(from, to)(generator);
  };
  for (int round = 0; round < 1000; ++round) {
    const int images = draw(1, 6), threads = draw(1, 4), steps = draw(1, 12), shared = draw(0, 6);
    if (check(images, threads, steps, shared)) continue;
    std::printf("wrong: %d images, %d threads, %d steps, %d shared\n", images, threads, steps,
                shared);
    return 1;
  }
}
