// Binding of noise_objective_out (fastnull/ops/noise_objective.py).
#include "cpu/binding.h"

namespace fastnull {
namespace {

float* output(const Tensor& t, int64_t numel, const char* name) {
  check_dtype(t, ScalarType::Float, name);
  check_dense(t, numel, name);
  return static_cast<float*>(t.mutable_data_ptr());
}

void objective(const Tensor& clean, const Tensor& noisy, bool squared, double scale, const Tensor& loss,
               const Tensor& cotangent, const Tensor& influence) {
  check_last_dim_dense(clean, 2, "clean");
  check_last_dim_dense(noisy, 2, "noisy");
  const int64_t rows = noisy.size(0), classes = noisy.size(1), clean_rows = clean.size(0);
  STD_TORCH_CHECK(clean.size(1) == classes, "fastnull: clean and noisy have different numbers of classes");
  ObjectiveArgs args{};
  args.clean_dtype = dtype_of(clean, "clean");
  args.noisy_dtype = dtype_of(noisy, "noisy");
  args.clean = clean.const_data_ptr();
  args.noisy = noisy.const_data_ptr();
  args.clean_rows = clean_rows;
  args.clean_stride = clean.stride(0);
  args.noisy_stride = noisy.stride(0);
  args.classes = classes;
  args.kind = squared ? Objective::l2_squared : Objective::l2;
  args.scale = float(scale);
  args.loss = output(loss, rows, "loss");
  args.influence = output(influence, rows, "influence");
  args.cotangent = output(cotangent, rows * classes, "cotangent");
  if (rows == 0) return;
  STD_TORCH_CHECK(classes > 0 && clean_rows > 0 && rows % clean_rows == 0,
                  "fastnull: the rows of noisy must be a multiple of those of clean, and there must be classes");
  const auto kernel = kernels().objective;
  torch::stable::parallel_for(0, rows, grain(classes * 16), [&](int64_t b, int64_t e) { kernel(args, b, e); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastnull, CPU, m) { m.impl("noise_objective_out", TORCH_BOX(&objective)); }

}  // namespace fastnull
