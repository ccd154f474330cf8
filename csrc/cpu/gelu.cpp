// Bindings of gelu_out and dgelu_ (fastnull/ops/linear_gelu.py).
#include "cpu/binding.h"

namespace fastnull {
namespace {

// Whether the derivative is kept as 8-bit codes: a choice for float32, the only form for bfloat16.
bool check_derivative(const Tensor& derivative, Dtype dtype, int64_t numel) {
  const bool coded = dtype == Dtype::bf16 || derivative.scalar_type() == ScalarType::Byte;
  check_dtype(derivative, coded ? ScalarType::Byte : ScalarType::Float, "derivative");
  check_dense(derivative, numel, "derivative");
  return coded;
}

void gelu(const Tensor& z, const std::optional<Tensor>& bias, bool tanh, const Tensor& h,
          const std::optional<Tensor>& derivative) {
  GeluArgs args{};
  args.dtype = dtype_of(z, "z");
  args.z = rows_of(z, z.scalar_type(), "z");
  args.h = rows_of(h, z.scalar_type(), "h");
  args.width = z.size(2);
  args.tanh = tanh;
  check_same_shape(z, h, "h");
  if (bias.has_value()) {
    check_dtype(*bias, ScalarType::Float, "bias");
    check_dense(*bias, args.width, "bias");
    args.bias = static_cast<const float*>(bias->const_data_ptr());
  }
  if (derivative.has_value()) {
    args.coded = check_derivative(*derivative, args.dtype, z.numel());
    args.derivative = derivative->mutable_data_ptr();
  }
  const auto kernel = kernels().gelu;
  // One element is some forty instructions, not one.
  torch::stable::parallel_for(0, z.size(0) * z.size(1), grain(args.width * 8),
                              [&](int64_t b, int64_t e) { kernel(args, b, e); });
}

void dgelu(const Tensor& g, const Tensor& derivative) {
  const Dtype dtype = dtype_of(g, "g");
  const bool coded = check_derivative(derivative, dtype, g.numel());
  const DgeluArgs args{dtype, rows_of(g, g.scalar_type(), "g"), derivative.const_data_ptr(), g.size(2), coded};
  const auto kernel = kernels().dgelu;
  torch::stable::parallel_for(0, g.size(0) * g.size(1), grain(args.width),
                              [&](int64_t b, int64_t e) { kernel(args, b, e); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastnull, CPU, m) {
  m.impl("gelu_out", TORCH_BOX(&gelu));
  m.impl("dgelu_", TORCH_BOX(&dgelu));
}

}  // namespace fastnull
