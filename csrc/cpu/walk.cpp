// CPU kernels of `blockdrop_fast::walk` and `walk_policy`; schemas and references:
// blockdrop_fast/ops/walk.py. The arithmetic is in walk_kernels.h; here is the program that
// carries an image along its path, and who runs which part of it.
//
// A thread takes an image from a queue and walks it alone, stem to classifier, in buffers that
// stay in its L2 cache. The last images of a batch (with a batch smaller than the number of
// threads: all) are walked by several threads together: each layer is cut into parts, a thread
// claims a part at a time, and goes on to the next layer when all parts are done. Nobody waits
// for a thread that has not claimed anything, so the walk completes with any number of threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ge.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/walk.h"
#include "walk_network.h"

namespace blockdrop::walk {
namespace {

constexpr int kSegments = 3;
constexpr int kImageChannels = 3;
constexpr int kWidths[kSegments] = {16, 32, 64};
constexpr int kClassMultiple = 16;
// Segment 1 of a 32x32 image has 16 pairs of rows: more threads for an image find nothing to do.
constexpr int kMaxThreadsPerImage = 16;
constexpr int kSpinsBeforeYield = 1024;  // some 10 microseconds, about what a layer takes

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// ---------------------------------------------------------------- instruction sets

const Kernels* avx512_if_supported() {
#ifdef BLOCKDROP_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    return avx512_kernels();
  }
#endif
  return nullptr;
}

const Kernels* avx2_if_supported() {
#ifdef BLOCKDROP_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2")) {
    return avx2_kernels();
  }
#endif
  return nullptr;
}

// The best instruction set of this processor, or the one that BLOCKDROP_CPU_ISA names.
const Kernels& choose_kernels() {
  const char* variable = std::getenv("BLOCKDROP_CPU_ISA");
  const std::string name = variable ? variable : "";
  const Kernels* kernels = nullptr;
  if (name.empty()) {
    kernels = avx512_if_supported();
    if (!kernels) kernels = avx2_if_supported();
    if (!kernels) kernels = portable_kernels();
  } else if (name == "avx512") {
    kernels = avx512_if_supported();
  } else if (name == "avx2") {
    kernels = avx2_if_supported();
  } else if (name == "portable") {
    kernels = portable_kernels();
  } else {
    TORCH_CHECK_VALUE(false, "BLOCKDROP_CPU_ISA: expected avx512, avx2 or portable, got '", name,
                      "'");
  }
  TORCH_CHECK(kernels, "BLOCKDROP_CPU_ISA: this processor or this build does not support ", name);
  return *kernels;
}

// ---------------------------------------------------------------- network and input

// Where the packed weights of each layer begin; the layout is in blockdrop_fast/ops/walk.py.
struct Network {
  int layers[kSegments];
  int num_blocks;
  int num_classes;
  int padded_classes;
  bool subsample;
  const float* stem;
  std::vector<const float*> convs;  // [2 * num_blocks]
  const float* classifier;
};

Network read_network(const char* name, const at::Tensor& weights, at::IntArrayRef layers,
                     int64_t num_classes, bool subsample) {
  TORCH_CHECK_TYPE(weights.scalar_type() == at::kFloat, name,
                   ": expected dtype torch.float32, got ", weights.scalar_type());
  check_network(weights, layers, num_classes);
  Network network;
  network.subsample = subsample;
  network.num_blocks = 0;
  network.num_classes = static_cast<int>(num_classes);
  network.padded_classes = static_cast<int>(round_up(num_classes, kClassMultiple));

  const float* data = weights.const_data_ptr<float>();
  int64_t offset = 0;
  auto take_conv = [&](int64_t in_channels, int64_t out_channels) {
    const int64_t begin = offset;
    const int64_t values = 9 + (in_channels == out_channels ? kTileProducts : 0);
    offset += out_channels * (1 + values * in_channels);
    return offset <= weights.numel() ? data + begin : nullptr;
  };
  network.stem = take_conv(kImageChannels, kWidths[0]);
  int channels = kWidths[0];
  for (int segment = 0; segment < kSegments; ++segment) {
    network.layers[segment] = static_cast<int>(layers[segment]);
    network.num_blocks += network.layers[segment];
    for (int block = 0; block < network.layers[segment]; ++block) {
      network.convs.push_back(take_conv(channels, kWidths[segment]));
      channels = kWidths[segment];
      network.convs.push_back(take_conv(channels, channels));
    }
  }
  network.classifier = data + std::min(offset, weights.numel());
  offset += (1 + channels) * static_cast<int64_t>(network.padded_classes);
  check_length(name, weights, offset, "packed values");
  return network;
}

// A batch of images of any strides.
struct Images {
  const float* data;
  int batch, height, width;
  int64_t image_stride, channel_stride, row_stride, column_stride;
};

Images read_images(const at::Tensor& images) {
  TORCH_CHECK_TYPE(images.scalar_type() == at::kFloat, "images: expected dtype torch.float32, got ",
                   images.scalar_type());
  check_images(images);
  const int64_t height = images.size(2), width = images.size(3);
  TORCH_CHECK_VALUE(height > 0 && width > 0 && height % 4 == 0 && width % 4 == 0,
                    "images: height and width must be positive multiples of 4, got ", height, "x",
                    width);
  TORCH_CHECK_VALUE(
      (height + 2) * (width + 2) * kWidths[kSegments - 1] <= std::numeric_limits<int>::max(),
      "images: too large for this kernel, got ", height, "x", width);
  TORCH_CHECK_VALUE(images.size(0) <= std::numeric_limits<int>::max(),
                    "images: too many for this kernel, got ", images.size(0));
  return {images.const_data_ptr<float>(),
          static_cast<int>(images.size(0)),
          static_cast<int>(height),
          static_cast<int>(width),
          images.stride(0),
          images.stride(1),
          images.stride(2),
          images.stride(3)};
}

// ---------------------------------------------------------------- paths

// One of an image's decision sets. Sets are run in lexicographic order, so that each shares the
// longest possible prefix with one that ran before it, and continues from there.
struct Path {
  const bool* keep;  // [num_blocks]
  int set;           // where its logits go
  int fork;          // the first block that it does not share with the path before it
  int source;        // the path (in order of running) that saves the activations before `fork`
};

// Paths [batch, num_sets] in order of running.
std::vector<Path> order_paths(const bool* decisions,  // [num_sets, batch, num_blocks]
                              int num_sets, int batch, int num_blocks) {
  std::vector<Path> paths(static_cast<size_t>(num_sets) * batch);
  for (int image = 0; image < batch; ++image) {
    Path* own = paths.data() + static_cast<size_t>(image) * num_sets;
    for (int set = 0; set < num_sets; ++set) {
      const size_t row = static_cast<size_t>(set) * batch + image;
      own[set] = {decisions + row * num_blocks, set, 0, 0};
    }
    std::sort(own, own + num_sets, [&](const Path& a, const Path& b) {
      const int order = std::memcmp(a.keep, b.keep, num_blocks);
      return order != 0 ? order > 0 : a.set < b.set;
    });
    for (int i = 1; i < num_sets; ++i) {
      const bool* keep = own[i].keep;
      own[i].fork =
          static_cast<int>(std::mismatch(keep, keep + num_blocks, own[i - 1].keep).first - keep);
      own[i].source = i - 1;
      while (own[own[i].source].fork > own[i].fork) --own[i].source;
    }
  }
  return paths;
}

// Images by descending number of blocks to run, equal ones in ascending order.
std::vector<int> order_images(const std::vector<Path>& paths, int num_sets, int batch,
                              int num_blocks) {
  std::vector<int64_t> cost(batch, 0);
  for (int image = 0; image < batch; ++image) {
    for (int i = 0; i < num_sets; ++i) {
      const Path& path = paths[static_cast<size_t>(image) * num_sets + i];
      cost[image] += std::count(path.keep + path.fork, path.keep + num_blocks, true);
    }
  }
  std::vector<int> order(batch);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return cost[a] > cost[b]; });
  return order;
}

// ---------------------------------------------------------------- threads

// A layer of an image that several threads walk: which parts are claimed, and how many are done.
struct alignas(64) Step {
  std::atomic<int> claimed{0};
  std::atomic<int> done{0};
};

enum class State { kIdle, kPreparing, kWalking, kWalkingTogether };

// What one thread needs for the image that it has taken from the queue.
struct Slot {
  std::atomic<State> state{State::kIdle};
  int image = 0;
  std::unique_ptr<Step[]> steps;
  float* padded_image;        // [H + 2, W + 2, 3]
  float* x[kSegments];        // the activations of each segment
  float* hidden[kSegments];   // between the two convolutions of a block
  float* logits;              // [padded_classes]
  float* kernel_scratch;      // of the slot's thread, whatever image it walks
  std::vector<float*> saved;  // [num_sets - 1] activations, each as large as the largest
};

void relax(int spins) {
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

// One call of the op.
class Walk {
 public:
  Walk(const Kernels& kernels, const Network& network, const Images& images,
       std::vector<Path> paths, int num_sets, float* logits)
      : kernels_(kernels),
        network_(network),
        images_(images),
        paths_(std::move(paths)),
        num_sets_(num_sets),
        logits_(logits),
        order_(order_images(paths_, num_sets, images.batch, network.num_blocks)) {}

  void run() {
    const int64_t useful = static_cast<int64_t>(images_.batch) * kMaxThreadsPerImage;
    num_threads_ = at::in_parallel_region()
                       ? 1
                       : static_cast<int>(std::min<int64_t>(at::get_num_threads(), useful));
    allocate();
    at::parallel_for(0, num_threads_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) work(static_cast<int>(thread));
    });
  }

 private:
  int height(int segment) const { return images_.height >> segment; }
  int width(int segment) const { return images_.width >> segment; }
  int64_t activation_size(int segment) const {
    return int64_t{height(segment) + 2} * (width(segment) + 2) * kWidths[segment];
  }

  // All scratch memory of the call comes from one tensor, so that torch's filling of
  // uninitialised memory (torch.utils.deterministic) reaches it.
  void allocate() {
    const int64_t image_size = int64_t{images_.height + 2} * (images_.width + 2) * kImageChannels;
    int64_t saved_size = 0;
    for (int segment = 0; segment < kSegments; ++segment) {
      saved_size = std::max(saved_size, activation_size(segment));
    }
    std::vector<int64_t> sizes{image_size, network_.padded_classes, kScratchFloats};
    for (int segment = 0; segment < kSegments; ++segment) {
      sizes.insert(sizes.end(), 2, activation_size(segment));
    }
    sizes.insert(sizes.end(), num_sets_ - 1, saved_size);
    int64_t slot_size = 0;
    for (int64_t size : sizes) slot_size += round_up(size, 16);
    scratch_ = at::empty({num_threads_, slot_size}, at::kFloat);

    float* next = scratch_.mutable_data_ptr<float>();
    auto take = [&](int64_t size) { return std::exchange(next, next + round_up(size, 16)); };
    slots_ = std::vector<Slot>(num_threads_);
    for (Slot& slot : slots_) {
      slot.padded_image = take(image_size);
      slot.logits = take(network_.padded_classes);
      slot.kernel_scratch = take(kScratchFloats);
      for (int segment = 0; segment < kSegments; ++segment) {
        slot.x[segment] = take(activation_size(segment));
        slot.hidden[segment] = take(activation_size(segment));
      }
      for (int i = 0; i < num_sets_ - 1; ++i) slot.saved.push_back(take(saved_size));
      if (num_threads_ > 1) slot.steps = std::make_unique<Step[]>(max_steps());
    }
  }

  int64_t max_steps() const {
    // Input and stem; for each path restoring, two a block, classifier, and at most one copy for
    // each other path.
    return 2 + int64_t{num_sets_} * (2 * network_.num_blocks + 2 + num_sets_);
  }

  void clear_borders(const Slot& slot) const {
    clear_border(slot.padded_image, images_.height, images_.width, kImageChannels);
    for (int segment = 0; segment < kSegments; ++segment) {
      for (float* activation : {slot.x[segment], slot.hidden[segment]}) {
        clear_border(activation, height(segment), width(segment), kWidths[segment]);
      }
    }
  }

  static void clear_border(float* activation, int height, int width, int channels) {
    const int row = (width + 2) * channels;
    std::fill_n(activation, row, 0.f);
    std::fill_n(activation + (height + 1) * row, row, 0.f);
    for (int y = 1; y <= height; ++y) {
      std::fill_n(activation + y * row, channels, 0.f);
      std::fill_n(activation + (y + 1) * row - channels, channels, 0.f);
    }
  }

  // What one thread does: walk images while there are any, then help with the last ones.
  void work(int thread) {
    Slot& own = slots_[thread];
    clear_borders(own);
    while (true) {
      // Before the queue is asked: a thread that finds it empty sees that this one may have got
      // the last image.
      own.state.store(State::kPreparing);
      const int position = queue_.fetch_add(1);
      if (position >= images_.batch) break;
      own.image = order_[position];
      const bool together = num_threads_ > 1 && position >= images_.batch - 2 * num_threads_;
      if (together) {
        for (int64_t i = 0; i < max_steps(); ++i) {
          own.steps[i].claimed.store(0, std::memory_order_relaxed);
          own.steps[i].done.store(0, std::memory_order_relaxed);
        }
      }
      own.state.store(together ? State::kWalkingTogether : State::kWalking);
      Walker(*this, own, together, own.kernel_scratch).walk();
    }
    own.state.store(State::kIdle);
    // No slot takes another image now.
    for (int i = 1; i < num_threads_; ++i) {
      Slot& other = slots_[(thread + i) % num_threads_];
      State state = other.state.load();
      for (int spins = 0; state == State::kPreparing; ++spins) {
        relax(spins);
        state = other.state.load();
      }
      if (state == State::kWalkingTogether) Walker(*this, other, true, own.kernel_scratch).walk();
    }
  }

  // One thread on the path of one image. Threads that walk together run the same program.
  class Walker {
   public:
    Walker(const Walk& walk, Slot& slot, bool together, float* kernel_scratch)
        : walk_(walk),
          kernels_(walk.kernels_),
          network_(walk.network_),
          slot_(slot),
          together_(together),
          kernel_scratch_(kernel_scratch) {}

    void walk() {
      const Path* paths = &walk_.paths_[static_cast<size_t>(slot_.image) * walk_.num_sets_];
      step(1, [&](int) { pad_image(); });
      convolve(kernels_.stem, network_.stem, slot_.padded_image, nullptr, slot_.x[0], 0);
      for (int i = 0; i < walk_.num_sets_; ++i) {
        if (i > 0) {
          float* activation = slot_.x[segment_before(paths[i].fork)];
          copy(slot_.saved[i - 1], activation, paths[i].fork);
        }
        walk_blocks(paths, i);
        step(1, [&](int) { classify(paths[i].set); });
      }
    }

   private:
    // Runs parts 0 ... num_parts - 1 of a layer, by whoever claims them, and returns when all
    // are done.
    template <class Run>
    void step(int num_parts, const Run& run) {
      if (!together_) {
        for (int part = 0; part < num_parts; ++part) run(part);
        return;
      }
      Step& step = slot_.steps[next_step_++];
      int part;
      while ((part = step.claimed.fetch_add(1)) < num_parts) {
        run(part);
        step.done.fetch_add(1, std::memory_order_release);
      }
      for (int spins = 0; step.done.load(std::memory_order_acquire) < num_parts; ++spins) {
        relax(spins);
      }
    }

    // Runs a layer of `segment` in parts of pairs of rows and panels.
    template <class Run>
    void step_in_parts(int segment, const Run& run) {
      const int height = walk_.height(segment);
      const int panels = kWidths[segment] / panel_channels(kWidths[segment]);
      if (!together_) {
        run(Part{0, height, 0, panels, kernel_scratch_});
        return;
      }
      // Panels first: parts of different panels read different weights.
      const int pairs = (height + 1) / 2;
      const int row_parts = std::min((walk_.num_threads_ + panels - 1) / panels, pairs);
      step(panels * row_parts, [&](int part) {
        const int panel = part % panels;
        const int rows = part / panels;
        run(Part{2 * (pairs * rows / row_parts),
                 std::min(2 * (pairs * (rows + 1) / row_parts), height), panel, panel + 1,
                 kernel_scratch_});
      });
    }

    void pad_image() {
      const Images& images = walk_.images_;
      const float* image = images.data + slot_.image * images.image_stride;
      float* out = slot_.padded_image + (images.width + 2) * kImageChannels;
      for (int y = 0; y < images.height; ++y) {
        out += kImageChannels;
        for (int x = 0; x < images.width; ++x) {
          const float* pixel = image + y * images.row_stride + x * images.column_stride;
          for (int c = 0; c < kImageChannels; ++c) *out++ = pixel[c * images.channel_stride];
        }
        out += kImageChannels;
      }
    }

    void convolve(void (*kernel)(const Conv&, const Part&), const float* weights,
                  const float* input, const float* residual, float* output, int segment) {
      const Conv conv{
          input, weights, residual, output, walk_.height(segment), walk_.width(segment)};
      step_in_parts(segment, [&](const Part& part) { kernel(conv, part); });
    }

    // The blocks of path `i` from its fork on.
    void walk_blocks(const Path* paths, int i) {
      int block = 0;
      for (int segment = 0; segment < kSegments; ++segment) {
        const int segment_begin = block;
        for (; block < segment_begin + network_.layers[segment]; ++block) {
          if (block < paths[i].fork) continue;
          save_for_forks(paths, i, block);
          const bool changes_shape = segment > 0 && block == segment_begin;
          walk_block(block, segment, changes_shape, paths[i].keep[block]);
        }
      }
      save_for_forks(paths, i, block);
    }

    void walk_block(int block, int segment, bool changes_shape, bool keep) {
      float* x = slot_.x[segment];
      float* hidden = slot_.hidden[segment];
      if (changes_shape) {
        const float* before = slot_.x[segment - 1];
        const Shortcut shortcut{before,
                                x,
                                walk_.height(segment),
                                walk_.width(segment),
                                kWidths[segment - 1],
                                network_.subsample};
        const Conv conv{before, network_.convs[2 * block], nullptr,
                        hidden, walk_.height(segment),     walk_.width(segment)};
        step_in_parts(segment, [&](const Part& part) {
          if (part.panel_begin == 0) kernels_.shortcut(shortcut, part);
          if (keep) kernels_.strided_convs[segment](conv, part);
        });
      } else if (keep) {
        convolve(kernels_.convs[segment], network_.convs[2 * block], x, nullptr, hidden, segment);
      }
      if (keep) {
        convolve(kernels_.convs[segment], network_.convs[2 * block + 1], hidden, x, x, segment);
      }
    }

    // Keeps the activations before `block` for the paths that part from path `i` there.
    void save_for_forks(const Path* paths, int i, int block) {
      for (int j = i + 1; j < walk_.num_sets_; ++j) {
        if (paths[j].source == i && paths[j].fork == block) {
          copy(slot_.x[segment_before(block)], slot_.saved[j - 1], block);
        }
      }
    }

    void copy(const float* from, float* to, int block) {
      const int64_t size = walk_.activation_size(segment_before(block));
      step(1, [&](int) { std::memcpy(to, from, size * sizeof(float)); });
    }

    // The segment whose buffer holds the input of `block` (for num_blocks: of the classifier).
    int segment_before(int block) const {
      int segment = 0;
      for (int end = network_.layers[0]; segment < kSegments - 1 && block > end;) {
        end += network_.layers[++segment];
      }
      return segment;
    }

    void classify(int set) {
      const int last = kSegments - 1;
      kernels_.classifier({slot_.x[last], network_.classifier, slot_.logits, walk_.height(last),
                           walk_.width(last), network_.padded_classes});
      const int64_t row = int64_t{set} * walk_.images_.batch + slot_.image;
      std::copy_n(slot_.logits, network_.num_classes, walk_.logits_ + row * network_.num_classes);
    }

    const Walk& walk_;
    const Kernels& kernels_;
    const Network& network_;
    Slot& slot_;
    const bool together_;
    float* const kernel_scratch_;
    int64_t next_step_ = 0;
  };

  const Kernels& kernels_;
  const Network& network_;
  const Images& images_;
  const std::vector<Path> paths_;  // [batch, num_sets]
  const int num_sets_;
  float* const logits_;  // [num_sets, batch, num_classes]
  const std::vector<int> order_;
  int num_threads_ = 1;
  at::Tensor scratch_;
  std::vector<Slot> slots_;
  std::atomic<int> queue_{0};
};

// ---------------------------------------------------------------- ops

// decisions: [S, B, K] contiguous -> logits [S, B, num_classes]
at::Tensor run_network(const Network& network, const Images& images, const at::Tensor& decisions) {
  const int64_t num_sets = decisions.size(0);
  at::Tensor logits = at::empty({num_sets, images.batch, network.num_classes}, at::kFloat);
  if (logits.numel() == 0) return logits;
  std::vector<Path> paths =
      order_paths(decisions.const_data_ptr<bool>(), static_cast<int>(num_sets), images.batch,
                  network.num_blocks);
  Walk(choose_kernels(), network, images, std::move(paths), static_cast<int>(num_sets),
       logits.mutable_data_ptr<float>())
      .run();
  return logits;
}

at::Tensor walk(const at::Tensor& images, const at::Tensor& decisions, const at::Tensor& weights,
                at::IntArrayRef layers, int64_t num_classes, bool subsample) {
  const Network network = read_network("weights", weights, layers, num_classes, subsample);
  const Images batch = read_images(images);
  check_decisions(decisions, batch.batch, network.num_blocks);
  const at::Tensor contiguous = decisions.contiguous();
  if (decisions.dim() == 3) return run_network(network, batch, contiguous);
  return run_network(network, batch, contiguous.unsqueeze(0)).squeeze(0);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> walk_policy(const at::Tensor& images,
                                                           const at::Tensor& weights,
                                                           at::IntArrayRef layers,
                                                           int64_t num_classes, bool subsample,
                                                           const at::Tensor& policy_weights,
                                                           at::IntArrayRef policy_layers) {
  const Network network = read_network("weights", weights, layers, num_classes, subsample);
  const Network policy =
      read_network("policy_weights", policy_weights, policy_layers, network.num_blocks, false);
  const Images batch = read_images(images);
  at::Tensor all_blocks = at::empty({1, batch.batch, policy.num_blocks}, at::kBool);
  all_blocks.fill_(true);
  const at::Tensor policy_logits = run_network(policy, batch, all_blocks).squeeze(0);
  const at::Tensor decisions = at::ge(policy_logits, 0);
  return {run_network(network, batch, decisions.unsqueeze(0)).squeeze(0), decisions, policy_logits};
}

}  // namespace
}  // namespace blockdrop::walk

TORCH_LIBRARY_IMPL(blockdrop_fast, CPU, m) {
  m.impl("walk", &blockdrop::walk::walk);
  m.impl("walk_policy", &blockdrop::walk::walk_policy);
}

// Defined here and not in Python, because there is nothing to tell without these kernels.
TORCH_LIBRARY_FRAGMENT(blockdrop_fast, m) {
  m.def("walk_isa() -> str", [] { return std::string(blockdrop::walk::choose_kernels().name); });
}
