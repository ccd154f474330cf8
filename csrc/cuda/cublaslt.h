// What is used of cublasLt.h. nvcc comes without that header where the library is not installed beside it, so its types
// and numbers stand here: they are the library's ABI, the same in CUDA 12 and 13.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/headeronly/util/Exception.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

namespace fastnull::cuda::lt {

using Handle = struct HandleOf*;
using Descriptor = struct DescriptorOf*;  // of a product
using Layout = struct LayoutOf*;
using Preference = struct PreferenceOf*;
using Status = int;  // 0 is success

enum Compute : int { COMPUTE_32F = 68 };
enum Type : int { R_32F = 0, R_16F = 2, R_16BF = 14 };
enum Operation : int32_t { OP_N = 0, OP_T = 1 };
enum Attribute : int { TRANSA = 3, TRANSB = 4, EPILOGUE = 7, BIAS_POINTER = 8, AUX_POINTER = 11, AUX_LD = 12 };
enum Epilogue : uint32_t {
  GELU_AUX_BIAS = 164,  // aux = AB + bias (a column), D = gelu(aux), the tanh form
  DGELU = 192,          // D = AB * gelu'(aux)
};
enum PreferenceAttribute : int { MAX_WORKSPACE_BYTES = 1 };

struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace_bytes;
  Status state;
  float waves;
  int reserved[4];
};

struct Library {
  Status (*create)(Handle*);
  Status (*descriptor_create)(Descriptor*, Compute, Type scale);
  Status (*descriptor_destroy)(Descriptor);
  Status (*descriptor_set)(Descriptor, Attribute, const void* value, size_t bytes);
  Status (*layout_create)(Layout*, Type, uint64_t rows, uint64_t columns, int64_t ld);  // columns one after the other
  Status (*layout_destroy)(Layout);
  Status (*preference_create)(Preference*);
  Status (*preference_destroy)(Preference);
  Status (*preference_set)(Preference, PreferenceAttribute, const void* value, size_t bytes);
  Status (*heuristic)(Handle, Descriptor, Layout a, Layout b, Layout c, Layout d, Preference, int asked, Heuristic*,
                      int* found);
  Status (*matmul)(Handle, Descriptor, const void* alpha, const void* a, Layout, const void* b, Layout,
                   const void* beta, const void* c, Layout, void* d, Layout, const Algorithm*, void* workspace,
                   size_t workspace_bytes, cudaStream_t);
};

// The library that torch has loaded: looked up, as torch's stream is (device.h), so that this one loads without it.
inline const Library& library() {
  static const Library found = [] {
    void* loaded = nullptr;
    for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"})
      if (loaded == nullptr) loaded = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
    STD_TORCH_CHECK(loaded != nullptr, "fastnull: no libcublasLt.so.13 or .12 is loaded");
    Library functions{};
    const auto find = [loaded](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(loaded, name));
      STD_TORCH_CHECK(function != nullptr, "fastnull: libcublasLt has no ", name);
    };
    find(functions.create, "cublasLtCreate");
    find(functions.descriptor_create, "cublasLtMatmulDescCreate");
    find(functions.descriptor_destroy, "cublasLtMatmulDescDestroy");
    find(functions.descriptor_set, "cublasLtMatmulDescSetAttribute");
    find(functions.layout_create, "cublasLtMatrixLayoutCreate");
    find(functions.layout_destroy, "cublasLtMatrixLayoutDestroy");
    find(functions.preference_create, "cublasLtMatmulPreferenceCreate");
    find(functions.preference_destroy, "cublasLtMatmulPreferenceDestroy");
    find(functions.preference_set, "cublasLtMatmulPreferenceSetAttribute");
    find(functions.heuristic, "cublasLtMatmulAlgoGetHeuristic");
    find(functions.matmul, "cublasLtMatmul");
    return functions;
  }();
  return found;
}

}  // namespace fastnull::cuda::lt
