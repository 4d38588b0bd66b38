// csrc/cuda/simt.cuh for a CPU: runs kernels' own device code in the tests. One fiber a CUDA
// thread, all on one CPU thread: a fiber runs until a barrier or a warp-wide instruction needs
// the others. See that file for what each function means.
//
// It proves arithmetic, addresses and barriers, not speed. It finds what a GPU may hide:
// * memory is poisoned: shared memory, registers of matrices and copies under way are NaN;
// * reads and writes outside of shared memory, and misaligned ones, are errors;
// * so is a thread that reads shared memory which another one writes between the same two
//   barriers, or writes what another one reads or writes (lanes of a warp-wide instruction act
//   in order, and so do instructions of one warp);
// * in a cluster only the cluster's barrier orders what different thread blocks do: an access is
//   held against those of other blocks up to the barrier that its thread next arrives at;
// * loads and stores of matrices count bank conflicts;
// * writing to a block that may not have begun yet or may be gone already is an error, whether or
//   not it is so in this run.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define BLOCKDROP_DEVICE inline

struct float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace blockdrop::simt {

#ifndef SIMT_HAS_STMATRIX
#define SIMT_HAS_STMATRIX 1
#endif
constexpr bool kHasStmatrix = SIMT_HAS_STMATRIX;
constexpr bool kHasClusters = true;
constexpr int kLanes = 32;

namespace machine {

constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned char kPoison = 0xff;  // as floats of any width: NaN

[[noreturn]] inline void fail(const char* what, uint32_t offset);

// Who wrote to two bytes of shared memory last, and who of the block itself read them.
struct Access {
  uint32_t write_interval = 0, read_interval = 0;  // between barriers of the writer's, own block
  uint32_t write_phase = 0, read_phase = 0;        // see phase()
  int32_t writer = -1, reader = -1;                // warps, of all blocks; kManyWarps: several read
};
constexpr int32_t kManyWarps = -2;

struct Copy {
  uint32_t offset;
  unsigned char bytes[16];
};

struct Fiber {
  ucontext_t start;
  jmp_buf state;
  std::unique_ptr<char[]> stack;
  std::vector<std::vector<Copy>> copies{1};  // groups under way, the last one still open
  uint32_t arrivals = 0, waits = 0;          // at the cluster's barrier
  bool started = false, done = false;
};

// Lanes deposit their operands; the last one to come executes the instruction for all. There are
// two of these a warp, used in turn, as lanes pick up results while others are already further.
struct Rendezvous {
  uint32_t operands[kLanes][8];
  uint32_t results[kLanes][4];
  int arrived = 0;
  unsigned generation = 0;
};

struct Warp {
  Rendezvous rendezvous[2];
};

struct Block {
  std::vector<unsigned char> memory;
  std::vector<Access> accesses;  // of two bytes each
  std::vector<Warp> warps;
  int arrived = 0;
  unsigned generation = 0;
  uint32_t interval = 1;
  // Other blocks may write here until they arrive at barrier `remote_phase` of the cluster (none:
  // 0), and threads end after they have waited `gone` times.
  uint32_t remote_phase = 0, gone = UINT32_MAX;
};

struct Cluster {
  int arrived = 0;
  uint32_t barriers = 0;  // complete ones
};

struct State {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<unsigned> collectives;  // warp-wide instructions a fiber has executed
  std::vector<Block> blocks;
  std::vector<Cluster> clusters;
  int cluster_size = 1;
  std::function<void()> kernel;
  jmp_buf scheduler;
  int threads = 0, current = 0;
  int64_t matrices = 0, conflicts = 0;  // loaded and stored; what these took beyond a clock each
};
inline State state;

inline int thread() { return state.current % state.threads; }
inline int block_number() { return state.current / state.threads; }
inline Block& block() { return state.blocks[block_number()]; }
inline Fiber& fiber() { return *state.fibers[state.current]; }
inline int warp_number() { return state.current / kLanes; }

inline void fail(const char* what, uint32_t offset) {
  std::fprintf(stderr, "simt: thread block %d, thread %d: %s, shared memory offset %u\n",
               state.current / state.threads, thread(), what, offset);
  std::fflush(stderr);
  std::abort();
}

inline void yield() {
  if (_setjmp(state.fibers[state.current]->state) == 0) _longjmp(state.scheduler, 1);
}

// Only in later phases does another block know that what this thread does now is done: those
// that have waited for the barrier at which the thread arrives next.
inline uint32_t phase() { return fiber().arrivals; }

inline void trampoline() {
  state.kernel();
  fiber().done = true;
  block().gone = std::min(block().gone, fiber().waits);
  if (block().remote_phase > block().gone) fail("exit while others may still write here", 0);
  _longjmp(state.scheduler, 1);
}

inline void resume(Fiber& fiber) {
  if (_setjmp(state.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.start, trampoline, 0);
  setcontext(&fiber.start);
}

// Runs a kernel: `blocks` thread blocks side by side, in clusters of `cluster_size`.
inline void launch(int blocks, int threads, size_t shared_bytes, std::function<void()> kernel,
                   int cluster_size = 1) {
  state = State{};
  state.cluster_size = cluster_size;
  state.clusters.resize(blocks / cluster_size);
  state.kernel = std::move(kernel);
  state.threads = threads;
  state.blocks.resize(blocks);
  for (Block& one : state.blocks) {
    one.memory.assign(shared_bytes, kPoison);
    one.accesses.resize((shared_bytes + 1) / 2);
    one.warps.resize(threads / kLanes);
  }
  state.collectives.resize(blocks * threads);
  for (int i = 0; i < blocks * threads; ++i) {
    state.fibers.push_back(std::make_unique<Fiber>());
    state.fibers.back()->stack.reset(new char[kStackBytes]);
  }
  for (bool running = true; running;) {
    running = false;
    for (int i = 0; i < blocks * threads; ++i) {
      if (state.fibers[i]->done) continue;
      running = true;
      state.current = i;
      resume(*state.fibers[i]);
    }
  }
}

inline void check(uint32_t offset, uint32_t bytes) {
  if (offset % bytes != 0) fail("misaligned access", offset);
  if (offset + bytes > block().memory.size()) fail("access out of bounds", offset);
}

// Whether an access of `warp`, in that interval of its block and that phase of its cluster, may be
// at the same time as what this thread does now. Between arriving and waiting a thread does not
// know yet that the others' last phase is over.
inline bool may_meet(int32_t warp, uint32_t interval, uint32_t phase) {
  if (warp == -1 || warp == warp_number() || phase < fiber().waits) return false;
  const bool same_block = warp == kManyWarps || warp / (state.threads / kLanes) == block_number();
  return !same_block || interval == block().interval;
}

inline void note_read(uint32_t offset, uint32_t bytes) {
  check(offset, bytes);
  Block& own = block();
  const int32_t warp = warp_number();
  for (uint32_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) {
    Access& access = own.accesses[i];
    if (may_meet(access.writer, access.write_interval, access.write_phase)) {
      fail("read of what another warp writes between the same barriers", 2 * i);
    }
    const bool others = access.read_interval == own.interval && access.reader != warp;
    access.reader = others ? kManyWarps : warp;
    access.read_interval = own.interval;
    access.read_phase = std::max(access.read_phase, phase());
  }
}

// Writes to shared memory of `target`, a block of this cluster.
inline void note_write(Block& target, uint32_t offset, uint32_t bytes) {
  check(offset, bytes);
  const bool remote = &target != &block();
  if (remote) {
    if (fiber().waits == 0) fail("write to a thread block that may not have begun", offset);
    if (phase() >= target.gone) fail("write to a thread block that may be gone", offset);
    target.remote_phase = std::max(target.remote_phase, phase() + 1);
  }
  for (uint32_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) {
    Access& access = target.accesses[i];
    if (may_meet(access.writer, access.write_interval, access.write_phase)) {
      fail("write to what another warp writes between the same barriers", 2 * i);
    }
    const bool read = remote ? access.reader != -1 && access.read_phase >= fiber().waits
                             : may_meet(access.reader, access.read_interval, access.read_phase);
    if (read) fail("write to what another warp reads between the same barriers", 2 * i);
    access.writer = warp_number();
    access.write_interval = block().interval;
    access.write_phase = phase();
  }
}
inline void note_write(uint32_t offset, uint32_t bytes) { note_write(block(), offset, bytes); }

// Executes a warp-wide instruction: `execute(rendezvous)` runs once, when all lanes have come.
template <typename Execute>
inline const uint32_t* together(const uint32_t* operands, int count, Execute execute) {
  const unsigned turn = state.collectives[state.current]++;
  Rendezvous& meeting = block().warps[thread() / kLanes].rendezvous[turn % 2];
  const int lane = thread() % kLanes;
  std::copy(operands, operands + count, meeting.operands[lane]);
  if (++meeting.arrived == kLanes) {
    meeting.arrived = 0;
    execute(meeting);
    ++meeting.generation;
  } else {
    for (const unsigned generation = meeting.generation; generation == meeting.generation;) {
      yield();
    }
  }
  return meeting.results[lane];
}

inline float half_to_float(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  float value;
  if (exponent == 31) {
    value = fraction ? NAN : INFINITY;
  } else if (exponent == 0) {
    value = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    value = std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  }
  return half >> 15 ? -value : value;
}

// To nearest, ties to even.
inline uint16_t float_to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7fff;
  value = std::fabs(value);
  if (value >= 65520.f) return sign | 0x7c00;
  if (value == 0) return sign;
  int exponent = 0;
  std::frexp(value, &exponent);
  const int shift = exponent - 11 < -24 ? -24 : exponent - 11;  // weight of the last bit
  const int fraction = static_cast<int>(std::nearbyint(std::ldexp(value, -shift)));
  // A carry out of the fraction moves into the exponent, as it should.
  return sign | static_cast<uint16_t>(shift == -24 ? fraction : ((shift + 24) << 10) + fraction);
}

inline float bfloat16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t float_to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace machine

BLOCKDROP_DEVICE int thread_index() { return machine::thread(); }
BLOCKDROP_DEVICE int warp_index() { return machine::thread() / kLanes; }
BLOCKDROP_DEVICE int lane_index() { return machine::thread() % kLanes; }
BLOCKDROP_DEVICE int block_index() { return machine::block_number(); }
BLOCKDROP_DEVICE int num_thread_blocks() { return machine::state.blocks.size(); }

BLOCKDROP_DEVICE void sync_threads() {
  machine::Block& own = machine::block();
  if (++own.arrived == machine::state.threads) {
    own.arrived = 0;
    ++own.interval;
    ++own.generation;
  } else {
    for (const unsigned generation = own.generation; generation == own.generation;) {
      machine::yield();
    }
  }
}

BLOCKDROP_DEVICE void sync_warp() {
  machine::together(nullptr, 0, [](machine::Rendezvous&) {});
}

BLOCKDROP_DEVICE unsigned ballot(bool predicate) {
  const uint32_t operand = predicate;
  return machine::together(&operand, 1, [](machine::Rendezvous& meeting) {
    uint32_t word = 0;
    for (int lane = 0; lane < kLanes; ++lane) word |= meeting.operands[lane][0] << lane;
    for (int lane = 0; lane < kLanes; ++lane) meeting.results[lane][0] = word;
  })[0];
}
template <typename T>
BLOCKDROP_DEVICE T shuffle(T value, int lane) {
  static_assert(sizeof(T) == 4);
  uint32_t operands[2] = {0, static_cast<uint32_t>(lane)};
  std::memcpy(operands, &value, 4);
  const uint32_t* result = machine::together(operands, 2, [](machine::Rendezvous& meeting) {
    for (auto i = 0; i < kLanes; ++i) {
      meeting.results[i][0] = meeting.operands[meeting.operands[i][1] % kLanes][0];
    }
  });
  std::memcpy(&value, result, 4);
  return value;
}
BLOCKDROP_DEVICE int first_bit(uint32_t word) { return __builtin_ffs(static_cast<int>(word)) - 1; }
BLOCKDROP_DEVICE int popcount(uint32_t word) { return __builtin_popcount(word); }
BLOCKDROP_DEVICE int take_ticket(int* counter) {
  machine::yield();  // so that thread blocks take turns
  return (*counter)++;
}

template <typename T>
BLOCKDROP_DEVICE T load_global(const T* pointer) {
  return *pointer;
}

// ------------------------------------------------------------------ shared memory

template <typename T>
BLOCKDROP_DEVICE T load_shared(uint32_t offset) {
  machine::note_read(offset, sizeof(T));
  T value;
  std::memcpy(&value, machine::block().memory.data() + offset, sizeof(T));
  return value;
}
template <typename T>
BLOCKDROP_DEVICE void store_shared(uint32_t offset, T value) {
  machine::note_write(offset, sizeof(T));
  std::memcpy(machine::block().memory.data() + offset, &value, sizeof(T));
}

// Until the thread has waited, the target is poisoned.
BLOCKDROP_DEVICE void copy_async(uint32_t offset, const void* source) {
  if (reinterpret_cast<uintptr_t>(source) % 16 != 0) machine::fail("misaligned source", offset);
  machine::note_write(offset, 16);
  std::memset(machine::block().memory.data() + offset, machine::kPoison, 16);
  machine::Copy copy{offset, {}};
  std::memcpy(copy.bytes, source, 16);
  machine::fiber().copies.back().push_back(copy);
}
BLOCKDROP_DEVICE void commit_copies() { machine::fiber().copies.emplace_back(); }
template <int kPending>
BLOCKDROP_DEVICE void wait_for_groups() {
  auto& groups = machine::fiber().copies;
  while (groups.size() > kPending + 1) {
    for (const machine::Copy& copy : groups.front()) {
      machine::note_write(copy.offset, 16);
      std::memcpy(machine::block().memory.data() + copy.offset, copy.bytes, 16);
    }
    groups.erase(groups.begin());
  }
}
BLOCKDROP_DEVICE void wait_for_copies() {
  commit_copies();
  wait_for_groups<0>();
}

// ------------------------------------------------------------------ clusters of thread blocks

namespace machine {

inline Cluster& cluster() { return state.clusters[block_number() / state.cluster_size]; }

}  // namespace machine

BLOCKDROP_DEVICE int cluster_rank() {
  return machine::block_number() % machine::state.cluster_size;
}

BLOCKDROP_DEVICE void cluster_arrive() {
  if (machine::fiber().arrivals++ != machine::fiber().waits) {
    machine::fail("arrives twice at the cluster's barrier without waiting", 0);
  }
  machine::Cluster& own = machine::cluster();
  if (++own.arrived == machine::state.cluster_size * machine::state.threads) {
    own.arrived = 0;
    ++own.barriers;
  }
}
BLOCKDROP_DEVICE void cluster_wait() {
  if (machine::fiber().waits++ == machine::fiber().arrivals) {
    machine::fail("waits at the cluster's barrier without arriving", 0);
  }
  while (machine::cluster().barriers < machine::fiber().waits) machine::yield();
}

BLOCKDROP_DEVICE void store_cluster(int rank, uint32_t offset, const uint4& value) {
  const int size = machine::state.cluster_size;
  if (rank < 0 || rank >= size) machine::fail("no such thread block in the cluster", offset);
  machine::Block& target = machine::state.blocks[machine::block_number() / size * size + rank];
  machine::note_write(target, offset, 16);
  std::memcpy(target.memory.data() + offset, &value, 16);
}

// ------------------------------------------------------------------ 8x8 matrices of 16-bit values

namespace machine {

// Where lane `lane` finds value `half` of its register: (row, column) of the matrix.
inline int place_row(int lane, int half, bool transposed) {
  return transposed ? lane % 4 * 2 + half : lane / 4;
}
inline int place_column(int lane, int half, bool transposed) {
  return transposed ? lane / 4 : lane % 4 * 2 + half;
}

// Eight rows of 16 bytes take a clock if they lie in different banks.
inline void note_banks(const Rendezvous& meeting, int count) {
  for (int matrix = 0; matrix < count; ++matrix) {
    int uses[8] = {};
    for (int row = 0; row < 8; ++row) ++uses[meeting.operands[matrix * 8 + row][0] / 16 % 8];
    ++state.matrices;
    state.conflicts += *std::max_element(uses, uses + 8) - 1;
  }
}

inline void load_together(uint32_t (&r)[4], uint32_t offset, int count, bool transposed) {
  const uint32_t* results = together(&offset, 1, [&](Rendezvous& meeting) {
    for (int row = 0; row < 8 * count; ++row) note_read(meeting.operands[row][0], 16);
    note_banks(meeting, count);
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int matrix = 0; matrix < count; ++matrix) {
        uint16_t halves[2];
        for (int half = 0; half < 2; ++half) {
          const int row = matrix * 8 + place_row(lane, half, transposed);
          std::memcpy(&halves[half],
                      block().memory.data() + meeting.operands[row][0] +
                          2 * place_column(lane, half, transposed),
                      2);
        }
        meeting.results[lane][matrix] = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
      }
    }
  });
  std::copy(results, results + count, r);
}

// c += a * b; operands of a lane: four registers of a, two of b.
template <typename ToFloat>
inline void multiply_together(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1,
                              ToFloat to_float) {
  const uint32_t operands[6] = {a.x, a.y, a.z, a.w, b0, b1};
  const uint32_t* results = together(operands, 6, [&](Rendezvous& meeting) {
    float left[16][16], right[16][8], product[16][8] = {};
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int half = 0; half < 2; ++half) {
        for (int r = 0; r < 6; ++r) {
          const uint16_t bits = meeting.operands[lane][r] >> (16 * half);
          const int across = lane % 4 * 2 + half, along = lane / 4;
          if (r < 4) {
            left[along + r % 2 * 8][across + r / 2 * 8] = to_float(bits);
          } else {
            right[across + (r - 4) * 8][along] = to_float(bits);
          }
        }
      }
    }
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 8; ++n) product[m][n] += left[m][k] * right[k][n];
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        std::memcpy(&meeting.results[lane][i], &product[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2],
                    4);
      }
    }
  });
  for (int i = 0; i < 4; ++i) {
    float product;
    std::memcpy(&product, &results[i], 4);
    c[i] += product;
  }
}

}  // namespace machine

BLOCKDROP_DEVICE void load_matrices(uint32_t (&r)[4], uint32_t offset, bool four = true) {
  machine::load_together(r, offset, four ? 4 : 2, false);
}
BLOCKDROP_DEVICE void load_matrices_transposed(uint32_t (&r)[4], uint32_t offset) {
  machine::load_together(r, offset, 4, true);
}
BLOCKDROP_DEVICE void stmatrix_transposed(uint32_t offset, const uint32_t (&r)[4]) {
  const uint32_t operands[5] = {offset, r[0], r[1], r[2], r[3]};
  machine::together(operands, 5, [](machine::Rendezvous& meeting) {
    for (int row = 0; row < kLanes; ++row) machine::note_write(meeting.operands[row][0], 16);
    machine::note_banks(meeting, 4);
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        for (int half = 0; half < 2; ++half) {
          const uint16_t value = meeting.operands[lane][1 + matrix] >> (16 * half);
          const int row = matrix * 8 + machine::place_row(lane, half, true);
          std::memcpy(machine::block().memory.data() + meeting.operands[row][0] +
                          2 * machine::place_column(lane, half, true),
                      &value, 2);
        }
      }
    }
  });
}
BLOCKDROP_DEVICE uint32_t transpose_matrix(uint32_t r) {
  return machine::together(&r, 1, [](machine::Rendezvous& meeting) {
    for (int lane = 0; lane < kLanes; ++lane) {
      uint32_t pair = 0;
      for (int half = 0; half < 2; ++half) {
        const int row = machine::place_row(lane, half, true);
        const int column = machine::place_column(lane, half, true);
        const uint16_t value = meeting.operands[row * 4 + column / 2][0] >> (16 * (column % 2));
        pair |= static_cast<uint32_t>(value) << (16 * half);
      }
      meeting.results[lane][0] = pair;
    }
  })[0];
}

// ------------------------------------------------------------------ 16-bit formats

namespace machine {

template <float (*kToFloat)(uint16_t), uint16_t (*kFromFloat)(float)>
struct Format {
  static float2 unpack(uint32_t pair) {
    return {kToFloat(static_cast<uint16_t>(pair)), kToFloat(static_cast<uint16_t>(pair >> 16))};
  }
  static uint32_t pack(float low, float high) {
    return kFromFloat(low) | static_cast<uint32_t>(kFromFloat(high)) << 16;
  }
  static uint32_t pack_relu(float low, float high) {
    return pack(low < 0 ? 0 : low, high < 0 ? 0 : high);
  }
  static void multiply(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1) {
    multiply_together(c, a, b0, b1, kToFloat);
  }
};

}  // namespace machine

using Bfloat16 = machine::Format<machine::bfloat16_to_float, machine::float_to_bfloat16>;
using Float16 = machine::Format<machine::half_to_float, machine::float_to_half>;

}  // namespace blockdrop::simt
