// Kernels with one bug each, and the right one: what the emulator must find (test_emulator.py).
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"

using namespace fastnull::cuda;

struct Args {
  float* x;  // [64]
  int bug;
};

enum Bug { NONE, NO_BARRIER, OUT_OF_BOUNDS, BEYOND_SHARED, HALF_A_WARP, LOST_THREAD, NO_WAIT, MISALIGNED };

// Reverses x, 64 floats by 64 threads, through shared memory.
__global__ void reverse(const Args args) {
  float* shared = static_cast<float*>(dynamic_shared());
  const int i = threadIdx.x;
  if (args.bug == LOST_THREAD && i == 63) return;
  if (i % 4 == 0) copy16_async(shared_address(shared + i + (args.bug == MISALIGNED)), args.x + i, true);
  if (args.bug != NO_WAIT || i != 0) wait_for_copies();
  if (args.bug != NO_BARRIER) __syncthreads();
  const float value = shared[args.bug == BEYOND_SHARED ? i : 63 - i];
  if (args.bug == HALF_A_WARP && i % 32 < 16)
    __syncthreads();
  else
    args.x[i + (args.bug == OUT_OF_BOUNDS)] = __shfl_xor_sync(0xFFFFFFFF, value, 0);
  if (args.bug == BEYOND_SHARED) shared[i + 1] = 0;
}

extern "C" __attribute__((visibility("default"))) const char* run_reverse(float* x, int bug) {
  const cudaError_t error = launch(reverse, 1, 64, 64 * sizeof(float), nullptr, Args{x, bug});
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

extern "C" __attribute__((visibility("default"))) float add_products(float c, const double* products, int count) {
  return sum_of_products(c, products, count);
}
