// Bindings of layer_norm and layer_norm_dx (fastnull/ops/layer_norm.py).
#include "cpu/binding.h"

namespace fastnull {
namespace {

const float* optional_row(const std::optional<Tensor>& t, int64_t width, const char* name) {
  if (!t.has_value()) return nullptr;
  check_dtype(*t, ScalarType::Float, name);
  check_dense(*t, width, name);
  return static_cast<const float*>(t->const_data_ptr());
}

// A statistic of the rows; null where there is none.
float* per_row(const std::optional<Tensor>& t, int64_t rows, const char* name) {
  if (!t.has_value()) return nullptr;
  check_dtype(*t, ScalarType::Float, name);
  check_dense(*t, rows, name);
  return static_cast<float*>(t->data_ptr());
}

void layer_norm(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& shift, double eps, const Tensor& y, const std::optional<Tensor>& mean,
                const Tensor& rstd) {
  const Dtype dtype = dtype_of(x, "x");
  const int64_t width = x.size(2);
  const int64_t rows = x.size(0) * x.size(1);
  check_same_shape(x, y, "y");
  const LayerNormArgs args{dtype,
                           rows_of(x, x.scalar_type(), "x"),
                           rows_of(y, x.scalar_type(), "y"),
                           optional_row(weight, width, "weight"),
                           optional_row(bias, width, "bias"),
                           optional_row(shift, width, "shift"),
                           per_row(mean, rows, "mean"),
                           per_row(rstd, rows, "rstd"),
                           width,
                           float(eps)};
  const auto kernel = kernels().layer_norm;
  torch::stable::parallel_for(0, rows, grain(width), [&](int64_t b, int64_t e) { kernel(args, b, e); });
}

void layer_norm_dx(const Tensor& dxhat, const Tensor& x, const std::optional<Tensor>& mean, const Tensor& rstd,
                   const std::optional<Tensor>& dres, const Tensor& dx) {
  const Dtype dtype = dtype_of(x, "x");
  const ScalarType type = x.scalar_type();
  const int64_t rows = x.size(0) * x.size(1);
  check_same_shape(x, dxhat, "dxhat");
  check_same_shape(x, dx, "dx");
  Rows residual{nullptr, 1, 0, 0};
  if (dres.has_value()) {
    check_same_shape(x, *dres, "dres");
    residual = rows_of(*dres, type, "dres");
  }
  const LayerNormDxArgs args{dtype,
                             rows_of(dxhat, type, "dxhat"),
                             rows_of(x, type, "x"),
                             residual,
                             rows_of(dx, type, "dx"),
                             per_row(mean, rows, "mean"),
                             per_row(rstd, rows, "rstd"),
                             x.size(2)};
  const auto kernel = kernels().layer_norm_dx;
  torch::stable::parallel_for(0, rows, grain(x.size(2)), [&](int64_t b, int64_t e) { kernel(args, b, e); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastnull, CPU, m) {
  m.impl("layer_norm_out", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_dx_out", TORCH_BOX(&layer_norm_dx));
}

}  // namespace fastnull
