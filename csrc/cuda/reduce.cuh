// Sums over a block, in a fixed order, and loads of several neighbouring values at once.
#pragma once

#include "cuda/mma.cuh"

namespace fastnull::cuda {

constexpr int THREADS = 256;  // of every block that uses these

// The sum of x (or the largest x) over the THREADS of a block, in every thread.
template <typename T, typename Combine>
__device__ __forceinline__ T of_block(T x, Combine combine) {
  constexpr int WARPS = THREADS / 32;
  __shared__ T of_warp[WARPS];
  for (int distance = 16; distance > 0; distance /= 2) x = combine(x, __shfl_xor_sync(0xFFFFFFFF, x, distance));
  __syncthreads();  // the values of the previous call have been read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  x = of_warp[0];
  for (int warp = 1; warp < WARPS; ++warp) x = combine(x, of_warp[warp]);
  return x;
}

template <typename T>
__device__ __forceinline__ T sum_of_block(T x) {
  return of_block(x, [](T a, T b) { return a + b; });
}
__device__ __forceinline__ float largest_of_block(float x) {
  return of_block(x, [](float a, float b) { return fmaxf(a, b); });
}

// COUNT neighbouring values: one aligned access where COUNT is 4.
template <typename T, int COUNT>
struct alignas(sizeof(T) * COUNT) Values {
  T v[COUNT];
};

template <int COUNT, typename T>
__device__ __forceinline__ Values<float, COUNT> load(const T* from) {
  const auto raw = *reinterpret_cast<const Values<T, COUNT>*>(from);
  Values<float, COUNT> values;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) values.v[i] = to_float(raw.v[i]);
  return values;
}

template <int COUNT>
__device__ __forceinline__ void store(float* to, const Values<float, COUNT>& values) {
  *reinterpret_cast<Values<float, COUNT>*>(to) = values;
}

}  // namespace fastnull::cuda
