// One gated step of many noises at once, in place (fastnull/ops/noise_step.py). The gate of a noise is read on the
// device: 0 leaves the noise and its state as they are, +1 descends, -1 ascends.
//
// A block has CHUNK elements of one noise (blockIdx.y). AdamW moves 28 bytes per element, a normalised step 16, a sign
// step 12. Every block computes the values of its noise (step size, corrections, norm) itself, which saves a launch.
#include <cmath>
#include <initializer_list>

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace fastnull::cuda {

// All blocks of a noise read its count, so it is incremented in a launch before theirs.
__global__ void __launch_bounds__(THREADS) count_steps_kernel(const AdamWArgs args) {
  const int noise = blockIdx.x * THREADS + threadIdx.x;
  if (noise < args.noises && args.gate[noise] != 0) ++args.steps[noise];
}

template <typename T, int COUNT>
__global__ void __launch_bounds__(THREADS) adamw_kernel(const AdamWArgs args) {
  const int which = blockIdx.y;
  const float gate = args.gate[which];
  if (gate == 0) return;
  __shared__ float decay, step_size, correction;
  if (threadIdx.x == 0) {
    // double: 1 - beta^t loses precision in float while t is small
    const double lr = args.lr[which], count = double(args.steps[which]);
    decay = float(1 - lr * args.weight_decay);
    step_size = float(lr / (1 - pow(args.beta1, count)));
    correction = float(sqrt(1 - pow(args.beta2, count)));
  }
  __syncthreads();
  const float rate1 = float(1 - args.beta1), beta2 = float(args.beta2), rate2 = float(1 - args.beta2);
  const float eps = float(args.eps);
  const int64_t begin = which * args.width, first = blockIdx.x * int64_t(CHUNK);
  const int64_t end = first + CHUNK < args.width ? first + CHUNK : args.width;
  for (int64_t i = first + threadIdx.x * COUNT; i < end; i += THREADS * COUNT) {
    const int64_t at = begin + i;
    const auto g = load<COUNT>(static_cast<const T*>(args.grad) + at);
    auto v = load<COUNT>(args.noise + at), m = load<COUNT>(args.exp_avg + at), s = load<COUNT>(args.exp_avg_sq + at);
#pragma unroll
    for (int e = 0; e < COUNT; ++e) {
      const float moved = g.v[e] * gate;
      m.v[e] += rate1 * (moved - m.v[e]);
      s.v[e] = s.v[e] * beta2 + rate2 * moved * moved;
      v.v[e] = v.v[e] * decay - step_size * m.v[e] / (sqrtf(s.v[e]) / correction + eps);
    }
    store(args.noise + at, v);
    store(args.exp_avg + at, m);
    store(args.exp_avg_sq + at, s);
  }
}

template <typename T>
__global__ void __launch_bounds__(THREADS) square_sums_kernel(const DirectStepArgs args) {
  const T* grad = static_cast<const T*>(args.grad) + blockIdx.y * args.width;
  const int64_t first = blockIdx.x * int64_t(CHUNK);
  const int64_t end = first + CHUNK < args.width ? first + CHUNK : args.width;
  double sum = 0;  // in which the square of a float neither underflows nor overflows
  for (int64_t i = first + threadIdx.x; i < end; i += THREADS) {
    const double g = to_float(grad[i]);
    sum += g * g;
  }
  sum = sum_of_block(sum);
  if (threadIdx.x == 0) args.square_sums[blockIdx.y * int64_t(gridDim.x) + blockIdx.x] = sum;
}

template <typename T, int COUNT>
__global__ void __launch_bounds__(THREADS) direct_step_kernel(const DirectStepArgs args) {
  const int which = blockIdx.y;
  const float gate = args.gate[which];
  if (gate == 0) return;
  const float step = gate * float(args.lr[which]);
  double per_norm = 1;
  if (args.square_sums != nullptr) {
    double square = 0;
    for (int i = threadIdx.x; i < int(gridDim.x); i += THREADS)
      square += args.square_sums[which * int64_t(gridDim.x) + i];
    square = sum_of_block(square);
    per_norm = square == 0 ? 0 : 1 / sqrt(square);
  }
  const int64_t begin = which * args.width, first = blockIdx.x * int64_t(CHUNK);
  const int64_t end = first + CHUNK < args.width ? first + CHUNK : args.width;
  for (int64_t i = first + threadIdx.x * COUNT; i < end; i += THREADS * COUNT) {
    const auto g = load<COUNT>(static_cast<const T*>(args.grad) + begin + i);
    auto v = load<COUNT>(args.noise + begin + i);
#pragma unroll
    for (int e = 0; e < COUNT; ++e) {
      const float sign = g.v[e] > 0 ? 1 : g.v[e] < 0 ? -1 : g.v[e];  // the last is 0 or NaN
      v.v[e] -= step * (args.square_sums == nullptr ? sign : float(g.v[e] * per_norm));
    }
    store(args.noise + begin + i, v);
  }
}

template <typename Args>
dim3 chunks_of(const Args& args) {
  return dim3(unsigned((args.width + CHUNK - 1) / CHUNK), args.noises);
}

// Calls run(T{}) for the dtype of the gradient.
template <typename Args, typename Run>
cudaError_t for_dtype(const Args& args, Run run) {
  if (args.grad_dtype == Dtype::f32) return run(float{});
  return args.grad_dtype == Dtype::bf16 ? run(Bf16{}) : run(Fp16{});
}

// Four values at a time: rows of a multiple of 4 at aligned addresses.
template <typename Args>
bool in_fours(const Args& args, std::initializer_list<const void*> floats) {
  bool yes = args.width % 4 == 0 && uintptr_t(args.grad) % (args.grad_dtype == Dtype::f32 ? 16 : 8) == 0;
  for (const void* p : floats) yes = yes && uintptr_t(p) % 16 == 0;
  return yes;
}

cudaError_t adamw_step(const AdamWArgs& args, cudaStream_t stream) {
  const cudaError_t error =
      launch(count_steps_kernel, (args.noises + THREADS - 1) / THREADS, THREADS, 0, stream, args);
  if (error != cudaSuccess) return error;
  const bool fours = in_fours(args, {args.noise, args.exp_avg, args.exp_avg_sq});
  return for_dtype(args, [&](auto element) {
    using T = decltype(element);
    return launch(fours ? adamw_kernel<T, 4> : adamw_kernel<T, 1>, chunks_of(args), THREADS, 0, stream, args);
  });
}

cudaError_t direct_step(const DirectStepArgs& args, cudaStream_t stream) {
  const bool fours = in_fours(args, {args.noise});
  return for_dtype(args, [&](auto element) {
    using T = decltype(element);
    if (args.square_sums != nullptr) {
      const cudaError_t error = launch(square_sums_kernel<T>, chunks_of(args), THREADS, 0, stream, args);
      if (error != cudaSuccess) return error;
    }
    return launch(fours ? direct_step_kernel<T, 4> : direct_step_kernel<T, 1>, chunks_of(args), THREADS, 0, stream,
                  args);
  });
}

}  // namespace fastnull::cuda
