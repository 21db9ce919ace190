// Sums over a grid in a fixed order, in fp64, without floating-point atomics.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda_kernels.h"

namespace aligntok {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// 16 bytes of elements: one load or store instruction.
template <typename scalar_t>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(scalar_t);
  scalar_t at[kSize];
};

__device__ __forceinline__ bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Precision of the elements to precision of the arithmetic and back.
template <typename scalar_t>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

__device__ __forceinline__ float widened(float value) { return value; }
__device__ __forceinline__ double widened(double value) { return value; }
__device__ __forceinline__ float widened(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widened(__half value) { return __half2float(value); }

template <typename scalar_t>
__device__ __forceinline__ scalar_t narrowed(typename Arithmetic<scalar_t>::type value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrowed<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half narrowed<__half>(float value) {
  return __float2half_rn(value);
}

// Sums `values` over the block; thread 0 has the result, the others have parts of it. All threads call it.
template <int n>
__device__ __forceinline__ void block_sum(double (&values)[n]) {
  __shared__ double of_warp[n][kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      values[i] += __shfl_down_sync(0xffffffffu, values[i], offset);
    }
    if (lane == 0) {
      of_warp[i][warp] = values[i];
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      values[i] = of_warp[i][0];
#pragma unroll
      for (int other = 1; other < kWarps; ++other) {
        values[i] += of_warp[i][other];
      }
    }
  }
  __syncthreads();  // of_warp may be written again
}

// Whether this block is the last to come here; it then sees what thread 0 of every other block wrote before.
// atomicInc starts again at 0 after the last block, so the counter is ready for the next launch.
__device__ __forceinline__ bool is_last_block(unsigned* counter) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();  // this block's results before its arrival
    last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();  // all arrivals before the results are read
  }
  __syncthreads();
  return last;
}

// Sum over partial[begin : end : stride], in the same order in every run; thread 0 has the result.
template <int n>
__device__ __forceinline__ void sum_partials(
    const double* partial, int64_t begin, int64_t end, double (&values)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    values[i] = 0;
  }
  for (int64_t block = begin + threadIdx.x; block < end; block += kThreads) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      values[i] += __ldcg(partial + block * n + i);  // past the first-level cache, which other blocks do not write
    }
  }
  block_sum(values);
}

}  // namespace aligntok
