// Launching a kernel, and its dynamic shared memory. Tests replace this header by an emulator.
#pragma once

#include <cuda_runtime.h>

namespace fastnull::cuda {

// The shared memory that the launch requested, 16-byte aligned.
__device__ __forceinline__ void* dynamic_shared() {
  extern __shared__ uint4 memory[];
  return memory;
}

template <typename Args>
cudaError_t launch(void (*kernel)(Args), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   const Args& args) {
  constexpr size_t WITHOUT_ASKING = 48 << 10;
  if (shared_bytes > WITHOUT_ASKING) {
    const cudaError_t refused =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (refused != cudaSuccess) return refused;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace fastnull::cuda
