// Stands for csrc/cuda/device.h in tests: the ops take CPU tensors, there is neither device nor stream.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>

#define FASTNULL_CUDA_LIBRARY fastnull_emulated
#define FASTNULL_CUDA_KEY CPU

namespace fastnull::cuda {

struct OnDevice {
  explicit OnDevice(const torch::stable::Tensor&) {}
  cudaStream_t stream = nullptr;
};

}  // namespace fastnull::cuda
