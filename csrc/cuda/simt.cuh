// What the kernels use of a GPU beyond plain C++: who a thread is, shared memory, warp-wide
// instructions. Kernels include it as "cuda/simt.cuh"; the tests put tests/simt/cuda/simt.cuh in
// its place, which does the same on a CPU, so that the kernels' own code runs there.
//
// Shared memory is addressed by byte offsets from its start, only through the functions here.

#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#define BLOCKDROP_DEVICE __device__ __forceinline__

namespace blockdrop::simt {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasStmatrix = false;
#else
constexpr bool kHasStmatrix = true;
#endif
// For later GPUs nvcc 13.0 spills 3.6 KB of the cluster's kernel, and not all of them have room.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr bool kHasClusters = false;
#define BLOCKDROP_CLUSTER(blocks)
#else
constexpr bool kHasClusters = true;
#define BLOCKDROP_CLUSTER(blocks) __cluster_dims__(blocks, 1, 1)
#endif

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The same value, of which the compiler knows nothing: what is computed from it stays where it is
// written. Otherwise all addresses of a persistent kernel are computed once, before its loops, and
// wait in registers that there are not.
BLOCKDROP_DEVICE int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
BLOCKDROP_DEVICE int thread_index() {
  const int index = opaque(threadIdx.x);
  __builtin_assume(index >= 0 && index < 1024);  // divisions and moduli become shifts and masks
  return index;
}
BLOCKDROP_DEVICE int warp_index() { return thread_index() / kLanes; }
BLOCKDROP_DEVICE int lane_index() { return thread_index() % kLanes; }
BLOCKDROP_DEVICE int block_index() { return blockIdx.x; }
BLOCKDROP_DEVICE int num_thread_blocks() { return gridDim.x; }
BLOCKDROP_DEVICE void sync_threads() { __syncthreads(); }
BLOCKDROP_DEVICE void sync_warp() { __syncwarp(); }

BLOCKDROP_DEVICE unsigned ballot(bool predicate) { return __ballot_sync(kAllLanes, predicate); }
template <typename T>
BLOCKDROP_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
BLOCKDROP_DEVICE int first_bit(uint32_t word) { return __ffs(static_cast<int>(word)) - 1; }
BLOCKDROP_DEVICE int popcount(uint32_t word) { return __popc(word); }
BLOCKDROP_DEVICE int take_ticket(int* counter) { return atomicAdd(counter, 1); }

template <typename T>
BLOCKDROP_DEVICE T load_global(const T* pointer) {
  return __ldg(pointer);
}

// ------------------------------------------------------------------ shared memory

BLOCKDROP_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}
BLOCKDROP_DEVICE uint32_t shared_address(uint32_t offset) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory())) + offset;
}
template <typename T>
BLOCKDROP_DEVICE T load_shared(uint32_t offset) {
  return *reinterpret_cast<const T*>(shared_memory() + offset);
}
template <typename T>
BLOCKDROP_DEVICE void store_shared(uint32_t offset, T value) {
  *reinterpret_cast<T*>(shared_memory() + offset) = value;
}

// Starts to copy 16 bytes from global to shared memory, past the L1 cache.
BLOCKDROP_DEVICE void copy_async(uint32_t offset, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(offset)),
               "l"(source)
               : "memory");
}
// Waits for all copies that this thread started. Others see them after the next barrier.
BLOCKDROP_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Makes a group of the copies started since the last one; it may have none.
BLOCKDROP_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of copies but the last `kPending`.
template <int kPending>
BLOCKDROP_DEVICE void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ------------------------------------------------------------------ clusters of thread blocks
//
// Thread blocks of a cluster run at the same time and write to each other's shared memory. All of
// this needs kHasClusters, and a launch with a cluster's size.

BLOCKDROP_DEVICE int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  __builtin_assume(rank >= 0 && rank < 16);
  return rank;
}

// The barrier of a cluster in two halves: what any of its threads wrote to any shared memory of the
// cluster before it arrived, all see when they have waited. All lanes of a warp together.
BLOCKDROP_DEVICE void cluster_arrive() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
BLOCKDROP_DEVICE void cluster_wait() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Stores 16 bytes to the shared memory of thread block `rank` of the cluster.
BLOCKDROP_DEVICE void store_cluster(int rank, uint32_t offset, const uint4& value) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(shared_address(offset)), "r"(rank));
  asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
#endif
}

// ------------------------------------------------------------------ 8x8 matrices of 16-bit values
//
// Row i of matrix j is the 16 bytes at the offset that lane 8 * j + i gives. In registers a lane
// holds of each matrix two neighbouring values of row lane / 4, columns 2 * (lane % 4) and the
// next; transposed, of that column.

// Four matrices, or the first two.
BLOCKDROP_DEVICE void load_matrices(uint32_t (&r)[4], uint32_t offset, bool four = true) {
  if (four) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(offset))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(offset))
                 : "memory");
  }
}
BLOCKDROP_DEVICE void load_matrices_transposed(uint32_t (&r)[4], uint32_t offset) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(offset))
               : "memory");
}
// Needs kHasStmatrix.
BLOCKDROP_DEVICE void stmatrix_transposed(uint32_t offset, const uint32_t (&r)[4]) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(offset)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#endif
}
// Transposes a matrix that is spread over the registers of a warp.
BLOCKDROP_DEVICE uint32_t transpose_matrix(uint32_t r) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(r));
  return transposed;
}

// ------------------------------------------------------------------ 16-bit formats
//
// pack and pack_relu round two floats to nearest, `low` into the lower half; NaN stays NaN.
// multiply adds to c the product of a 16x16 matrix a (row-major fragments) and a 16x8 matrix b.

struct Bfloat16 {
  static BLOCKDROP_DEVICE float2 unpack(uint32_t pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  }
  static BLOCKDROP_DEVICE uint32_t pack(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
  static BLOCKDROP_DEVICE uint32_t pack_relu(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
  static BLOCKDROP_DEVICE void multiply(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  }
};

struct Float16 {
  static BLOCKDROP_DEVICE float2 unpack(uint32_t pair) {
    return {__half2float(__ushort_as_half(static_cast<unsigned short>(pair))),
            __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)))};
  }
  static BLOCKDROP_DEVICE uint32_t pack(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
  static BLOCKDROP_DEVICE uint32_t pack_relu(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
  static BLOCKDROP_DEVICE void multiply(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  }
};

}  // namespace blockdrop::simt
