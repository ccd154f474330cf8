// Distance of noisy logits to clean ones, its gradient and the influence (fastnull/ops/noise_objective.py).
//
// One block per row; a row of logits is a few kilobytes and is read again from the cache. If means are requested, the
// block of a group that ends last adds up its rows in their order: whichever block that is, the sum is the same, bit
// for bit.
#include <cmath>

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace fastnull::cuda {

template <typename C, typename N>
__global__ void __launch_bounds__(THREADS) objective_kernel(const ObjectiveArgs args) {
  const int64_t row = blockIdx.x;
  const C* clean = static_cast<const C*>(args.clean) + row % args.clean_rows * args.clean_stride;
  const N* noisy = static_cast<const N*>(args.noisy) + row * args.noisy_stride;
  float* cotangent = args.cotangent + row * args.classes;

  float square = 0, clean_top = -INFINITY, noisy_top = -INFINITY;
  for (int i = threadIdx.x; i < args.classes; i += THREADS) {
    const float a = to_float(clean[i]), b = to_float(noisy[i]);
    square += (b - a) * (b - a);
    clean_top = fmaxf(clean_top, a);
    noisy_top = fmaxf(noisy_top, b);
  }
  square = sum_of_block(square);
  clean_top = largest_of_block(clean_top);
  noisy_top = largest_of_block(noisy_top);
  const float length = args.squared ? square : sqrtf(square);
  const float factor = args.squared ? 2 * args.scale : length == 0 ? 0 : args.scale / length;

  float clean_sum = 0, noisy_sum = 0;
  for (int i = threadIdx.x; i < args.classes; i += THREADS) {
    const float a = to_float(clean[i]), b = to_float(noisy[i]);
    cotangent[i] = (b - a) * factor;
    clean_sum += expf(a - clean_top);
    noisy_sum += expf(b - noisy_top);
  }
  clean_sum = sum_of_block(clean_sum);
  noisy_sum = sum_of_block(noisy_sum);

  float moved = 0;
  for (int i = threadIdx.x; i < args.classes; i += THREADS) {
    const float p = expf(to_float(clean[i]) - clean_top) / clean_sum;
    const float q = expf(to_float(noisy[i]) - noisy_top) / noisy_sum;
    moved += (p - q) * (p - q);
  }
  moved = sum_of_block(moved);
  if (threadIdx.x == 0) args.loss[row] = length, args.influence[row] = moved;
  if (args.mean_loss == nullptr) return;

  const int rows = args.rows / args.groups, group = int(row) / rows;
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();  // the row's results are visible before the ticket is
    last = atomicInc(args.tickets + group, rows - 1) == unsigned(rows - 1);
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  float loss = 0, influence = 0;
  for (int i = threadIdx.x; i < rows; i += THREADS) {
    loss += __ldcg(args.loss + group * int64_t(rows) + i);
    influence += __ldcg(args.influence + group * int64_t(rows) + i);
  }
  loss = sum_of_block(loss);
  influence = sum_of_block(influence);
  if (threadIdx.x == 0) args.mean_loss[group] = loss / rows, args.mean_influence[group] = influence / rows;
}

template <typename C>
cudaError_t launch_objective(const ObjectiveArgs& args, cudaStream_t stream) {
  if (args.noisy_dtype == Dtype::f32) return launch(objective_kernel<C, float>, args.rows, THREADS, 0, stream, args);
  if (args.noisy_dtype == Dtype::bf16) return launch(objective_kernel<C, Bf16>, args.rows, THREADS, 0, stream, args);
  return launch(objective_kernel<C, Fp16>, args.rows, THREADS, 0, stream, args);
}

cudaError_t noise_objective(const ObjectiveArgs& args, cudaStream_t stream) {
  if (args.mean_loss != nullptr) {
    const cudaError_t refused = cudaMemsetAsync(args.tickets, 0, args.groups * sizeof(unsigned), stream);
    if (refused != cudaSuccess) return refused;
  }
  if (args.clean_dtype == Dtype::f32) return launch_objective<float>(args, stream);
  if (args.clean_dtype == Dtype::bf16) return launch_objective<Bf16>(args, stream);
  return launch_objective<Fp16>(args, stream);
}

}  // namespace fastnull::cuda
