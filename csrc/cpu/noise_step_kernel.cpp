// One step of a noise in place: AdamW in the order of torch.optim.AdamW, or along the normalised or sign gradient.
//
//   AdamW, g = gate * grad:  v *= 1 - lr wd;  m += (1 - beta1)(g - m);  s = beta2 s + (1 - beta2) g g
//                            v -= lr / c1 * m / (sqrt(s) / sqrt(c2) + eps),  c = 1 - beta^t
//   direct:                  v -= gate lr grad / ||grad||  or  v -= gate lr sign(grad)
//
// A noise whose gate is 0 is not touched.
#include "cpu/vec.h"

namespace fastnull {
namespace FASTNULL_LEVEL {
namespace {

constexpr int W = Vec::size;

template <typename T>
FASTNULL_INLINE Vec load(const T* p, int n) {
  return n == W ? Vec::load(p) : Vec::load(p, n);
}
FASTNULL_INLINE void store(Vec x, float* p, int n) { n == W ? x.store(p) : x.store(p, n); }

template <typename F>
FASTNULL_INLINE void each(int64_t begin, int64_t end, const F& f) {
  for (int64_t i = begin; i < end; i += W) f(i, end - i < W ? int(end - i) : W);
}

template <typename T>
void adamw_range(const AdamWArgs& a, int64_t noise, int64_t begin, int64_t end) {
  const float gate = a.gate[noise];
  if (gate == 0.0f) return;
  const int64_t at = noise * a.width;
  const double correction1 = a.bias_correction[2 * noise], correction2 = a.bias_correction[2 * noise + 1];
  const Vec g_scale = Vec::set(gate), decay = Vec::set(float(1.0 - a.lr[noise] * a.weight_decay));
  const Vec weight1 = Vec::set(float(1.0 - a.beta1)), weight2 = Vec::set(float(1.0 - a.beta2));
  const Vec beta2 = Vec::set(float(a.beta2)), eps = Vec::set(float(a.eps));
  const Vec root = Vec::set(float(std::sqrt(correction2))), step = Vec::set(float(-(a.lr[noise] / correction1)));
  const T* grad = static_cast<const T*>(a.grad) + at;
  float *v = a.noise + at, *m = a.exp_avg + at, *s = a.exp_avg_sq + at;
  each(begin, end, [&](int64_t i, int n) {
    const Vec g = load(grad + i, n) * g_scale;
    const Vec first = load(m + i, n), mean = fmadd(weight1, g - first, first);
    const Vec square = load(s + i, n) * beta2 + weight2 * g * g;
    const Vec denominator = sqrt(square) / root + eps;
    store(load(v + i, n) * decay + step * mean / denominator, v + i, n);
    store(mean, m + i, n);
    store(square, s + i, n);
  });
}

// The range in which squares of float, and sums of them, neither underflow nor overflow.
FASTNULL_INLINE bool ordinary(double norm) { return norm > 1e-12 && norm < 1e12; }

template <typename T>
double norm_of(const T* grad, int64_t width) {
  // Summed in double by stretches: a float32 sum over 150,528 pixels would lose three digits.
  double total = 0.0;
  for (int64_t from = 0; from < width; from += 1024) {
    Vec sum = Vec::set(0.0f);
    each(from, from + 1024 < width ? from + 1024 : width, [&](int64_t i, int n) {
      const Vec g = load(grad + i, n);
      sum = fmadd(g, g, sum);
    });
    total += double(sum.sum());
  }
  if (ordinary(std::sqrt(total))) return std::sqrt(total);
  total = 0.0;
  for (int64_t i = 0; i < width; ++i) total += double(to_float(grad[i])) * double(to_float(grad[i]));
  return std::sqrt(total);
}

template <typename T>
void direct_noises(const DirectStepArgs& a, int64_t begin, int64_t end) {
  for (int64_t noise = begin; noise < end; ++noise) {
    if (a.gate[noise] == 0.0f) continue;
    const T* grad = static_cast<const T*>(a.grad) + noise * a.width;
    float* v = a.noise + noise * a.width;
    const float length = a.gate[noise] * float(a.lr[noise]);
    if (a.sign) {
      const Vec step = Vec::set(length), zero = Vec::set(0.0f);
      each(0, a.width, [&](int64_t i, int n) {
        const Vec g = load(grad + i, n);
        // g * 0 carries NaN through; the two selections give -1, 0 or +1.
        const Vec sign = where_negative(g, Vec::set(-1.0f), where_negative(zero - g, Vec::set(1.0f), g * zero));
        store(load(v + i, n) - sign * step, v + i, n);
      });
    } else {
      const double norm = norm_of(grad, a.width);
      if (!ordinary(norm)) {
        const double inverse = norm == 0.0 ? 0.0 : 1.0 / norm;
        for (int64_t i = 0; i < a.width; ++i) v[i] -= float(double(to_float(grad[i])) * inverse) * length;
        continue;
      }
      const Vec inverse = Vec::set(1.0f / float(norm)), step = Vec::set(length);
      each(0, a.width, [&](int64_t i, int n) {
        store(load(v + i, n) - load(grad + i, n) * inverse * step, v + i, n);
      });
    }
  }
}

}  // namespace

void adamw(const AdamWArgs& a, int64_t noise, int64_t begin, int64_t end) {
  a.grad_dtype == Dtype::f32 ? adamw_range<float>(a, noise, begin, end) : adamw_range<bf16>(a, noise, begin, end);
}

void direct_step(const DirectStepArgs& a, int64_t begin, int64_t end) {
  a.grad_dtype == Dtype::f32 ? direct_noises<float>(a, begin, end) : direct_noises<bf16>(a, begin, end);
}

}  // namespace FASTNULL_LEVEL
}  // namespace fastnull
