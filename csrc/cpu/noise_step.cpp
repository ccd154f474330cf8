// Bindings of adamw_step_ and direct_step_ (fastnull/ops/noise_step.py).
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/binding.h"

namespace fastnull {
namespace {

template <typename T>
T* dense(const Tensor& t, ScalarType type, int64_t numel, const char* name) {
  check_dtype(t, type, name);
  check_dense(t, numel, name);
  return static_cast<T*>(t.data_ptr());
}

void adamw(const Tensor& noise, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
           const Tensor& steps, const Tensor& gate, const Tensor& lr, double beta1, double beta2, double eps,
           double weight_decay) {
  const int64_t total = noise.numel(), noises = noise.size(0);
  if (total == 0) return;
  AdamWArgs args{};
  args.grad_dtype = dtype_of(grad, "grad");
  args.noise = dense<float>(noise, ScalarType::Float, total, "noise");
  args.grad = dense<void>(grad, grad.scalar_type(), total, "grad");
  args.exp_avg = dense<float>(exp_avg, ScalarType::Float, total, "exp_avg");
  args.exp_avg_sq = dense<float>(exp_avg_sq, ScalarType::Float, total, "exp_avg_sq");
  args.gate = dense<const float>(gate, ScalarType::Float, noises, "gate");
  args.lr = dense<const double>(lr, ScalarType::Double, noises, "lr");
  args.width = total / noises;
  args.beta1 = beta1;
  args.beta2 = beta2;
  args.eps = eps;
  args.weight_decay = weight_decay;
  int64_t* count = dense<int64_t>(steps, ScalarType::Long, noises, "steps");
  std::vector<double> corrections(size_t(2 * noises));
  for (int64_t m = 0; m < noises; ++m) {
    if (args.gate[m] != 0.0f) ++count[m];
    corrections[size_t(2 * m)] = 1.0 - std::pow(beta1, double(count[m]));
    corrections[size_t(2 * m + 1)] = 1.0 - std::pow(beta2, double(count[m]));
  }
  args.bias_correction = corrections.data();
  const auto kernel = kernels().adamw;
  torch::stable::parallel_for(0, total, grain(1), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const int64_t m = at / args.width, stop = std::min(end, (m + 1) * args.width);
      kernel(args, m, at - m * args.width, stop - m * args.width);
      at = stop;
    }
  });
}

void direct_step(const Tensor& noise, const Tensor& grad, const Tensor& gate, const Tensor& lr, bool sign) {
  const int64_t total = noise.numel(), noises = noise.size(0);
  if (total == 0) return;
  const DirectStepArgs args{dtype_of(grad, "grad"),
                            dense<float>(noise, ScalarType::Float, total, "noise"),
                            dense<void>(grad, grad.scalar_type(), total, "grad"),
                            dense<const float>(gate, ScalarType::Float, noises, "gate"),
                            dense<const double>(lr, ScalarType::Double, noises, "lr"),
                            total / noises,
                            sign};
  const auto kernel = kernels().direct_step;
  torch::stable::parallel_for(0, noises, grain(args.width), [&](int64_t b, int64_t e) { kernel(args, b, e); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastnull, CPU, m) {
  m.impl("adamw_step_", TORCH_BOX(&adamw));
  m.impl("direct_step_", TORCH_BOX(&direct_step));
}

}  // namespace fastnull
