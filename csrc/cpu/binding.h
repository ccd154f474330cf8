// What the bindings share: checks on tensors, and their translation into the plain structs of kernels.h.
//
// The ops' schemas and fakes are defined in fastnull/ops; the bindings add the CPU kernel to each. Ops only write into
// tensors they are given.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "cpu/kernels.h"

namespace fastnull {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "fastnull: ", name,
                  " must be float32 or bfloat16 on the CPU op");
  return type == ScalarType::Float ? Dtype::f32 : Dtype::bf16;
}

inline void check_dtype(const Tensor& t, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == type, "fastnull: ", name, " has the wrong dtype");
}

inline void check_dense(const Tensor& t, int64_t numel, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == numel, "fastnull: ", name, " must be dense with ", numel,
                  " elements, it has ", t.numel());
}

inline void check_last_dim_dense(const Tensor& t, int64_t dims, const char* name) {
  STD_TORCH_CHECK(t.dim() == dims, "fastnull: ", name, " must have ", dims, " dimensions, it has ", t.dim());
  STD_TORCH_CHECK(t.stride(dims - 1) == 1 || t.size(dims - 1) <= 1, "fastnull: the last dimension of ", name,
                  " must be dense");
}

// [outer, inner, width] → Rows.
inline Rows rows_of(const Tensor& t, ScalarType type, const char* name) {
  check_last_dim_dense(t, 3, name);
  check_dtype(t, type, name);
  return {t.data_ptr(), t.size(1), t.stride(0), t.stride(1)};
}

inline void check_same_shape(const Tensor& a, const Tensor& b, const char* name) {
  bool same = a.dim() == b.dim();
  for (int64_t i = 0; same && i < a.dim(); ++i) same = a.size(i) == b.size(i);
  STD_TORCH_CHECK(same, "fastnull: ", name, " has another shape than the input");
}

// Units of work that make about 32k elements: below that, starting a thread costs more than it saves.
inline int64_t grain(int64_t elements_per_unit) {
  return elements_per_unit >= 32768 ? 1 : 32768 / (elements_per_unit > 0 ? elements_per_unit : 1);
}

}  // namespace fastnull
