// Stands for csrc/cuda/launch.cuh in tests: a launch runs on the emulator, in place.
#pragma once

#include <cuda_runtime.h>

namespace fastnull::cuda {

inline void* dynamic_shared() { return emulator::device.shared; }

template <typename Args>
cudaError_t launch(void (*kernel)(Args), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, const Args& args) {
  return emulator::launch(grid, block, shared_bytes, [&] { kernel(args); });
}

}  // namespace fastnull::cuda
