// The device and the stream of an op's tensors. Tests replace this header by an emulator.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#define FASTNULL_CUDA_LIBRARY fastnull_cuda
#define FASTNULL_CUDA_KEY CUDA

namespace fastnull::cuda {

// torch's current stream on a device. The function is in libtorch_cuda, which a library built with a CPU torch cannot
// link, and whose symbols Python's torch does not export globally: it is looked up in the loaded library. The function
// of torch::stable for a stream's handle needs torch 2.13.
inline cudaStream_t current_stream(int32_t device) {
  using Shim = int32_t (*)(int32_t device, void** stream);
  static const Shim shim = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Shim>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(shim != nullptr, "fastnull: libtorch_cuda.so has no aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(shim(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Makes the tensor's device the current one while it lives; `stream` is torch's current stream there.
struct OnDevice {
  explicit OnDevice(const torch::stable::Tensor& t)
      : guard(t.get_device_index()), stream(current_stream(t.get_device_index())) {}
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

}  // namespace fastnull::cuda
