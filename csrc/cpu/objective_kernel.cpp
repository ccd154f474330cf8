// Distance of noisy to clean logits, its gradient, and the influence, a row at a time.
//
//   delta = noisy - clean;  l2: loss = ||delta||, cotangent = scale delta / ||delta|| (0 at delta = 0)
//   l2_squared: loss = ||delta||^2, cotangent = 2 scale delta;  influence = sum (softmax(clean) - softmax(noisy))^2
#include "cpu/vec.h"

namespace fastnull {
namespace FASTNULL_LEVEL {
namespace {

constexpr int W = Vec::size;

template <typename T>
FASTNULL_INLINE Vec load(const T* p, int n) {
  return n == W ? Vec::load(p) : Vec::load(p, n);
}

template <typename F>
FASTNULL_INLINE void each(int64_t K, const F& f) {
  for (int64_t i = 0; i < K; i += W) f(i, K - i < W ? int(K - i) : W);
}

// A sum in two levels: a single float32 chain over a thousand classes would lose one more digit.
struct Sum {
  Vec total = Vec::set(0.0f), part = Vec::set(0.0f);
  int held = 0;
  FASTNULL_INLINE void add(Vec x) {
    part = part + x;
    if (++held == 8) {
      total = total + part;
      part = Vec::set(0.0f);
      held = 0;
    }
  }
  FASTNULL_INLINE float value() const { return (total + part).sum(); }
};

// Maximum and sum of exponentials of a row: softmax_k = exp(x_k - top) / sum.
struct Softmax {
  float top, sum;
  FASTNULL_INLINE Vec operator()(Vec x) const { return exp(x - Vec::set(top)) / Vec::set(sum); }
};

template <typename T>
Softmax softmax_of(const T* x, int64_t K) {
  float top = to_float(x[0]);
  for (int64_t i = 1; i < K; ++i) top = to_float(x[i]) > top ? to_float(x[i]) : top;
  Sum sum;
  each(K, [&](int64_t i, int n) {
    float e[W];
    exp(load(x + i, n) - Vec::set(top)).store(e);
    sum.add(load(e, n));
  });
  return {top, sum.value()};
}

template <typename C, typename N>
void rows(const ObjectiveArgs& a, int64_t begin, int64_t end) {
  const int64_t K = a.classes;
  for (int64_t m = begin; m < end; ++m) {
    const C* clean = static_cast<const C*>(a.clean) + m % a.clean_rows * a.clean_stride;
    const N* noisy = static_cast<const N*>(a.noisy) + m * a.noisy_stride;
    float* cotangent = a.cotangent + m * K;
    const Softmax p = softmax_of(clean, K), q = softmax_of(noisy, K);
    Sum square, influence;
    each(K, [&](int64_t i, int n) {
      const Vec c = load(clean + i, n), x = load(noisy + i, n), delta = x - c;
      square.add(delta * delta);
      const Vec change = p(c) - q(x);
      float kept[W];  // behind the row's end both softmaxes are those of a zero logit: drop them
      (change * change).store(kept);
      influence.add(load(kept, n));
    });
    const float squared = square.value(), norm = std::sqrt(squared);
    const bool is_l2 = a.kind == Objective::l2;
    const float factor = is_l2 ? (norm == 0.0f ? 0.0f : a.scale / norm) : 2.0f * a.scale;
    a.loss[m] = is_l2 ? norm : squared;
    a.influence[m] = influence.value();
    each(K, [&](int64_t i, int n) {
      const Vec g = (load(noisy + i, n) - load(clean + i, n)) * Vec::set(factor);
      n == W ? g.store(cotangent + i) : g.store(cotangent + i, n);
    });
  }
}

}  // namespace

void objective(const ObjectiveArgs& a, int64_t begin, int64_t end) {
  if (a.clean_dtype == Dtype::f32) {
    a.noisy_dtype == Dtype::f32 ? rows<float, float>(a, begin, end) : rows<float, bf16>(a, begin, end);
  } else {
    a.noisy_dtype == Dtype::f32 ? rows<bf16, float>(a, begin, end) : rows<bf16, bf16>(a, begin, end);
  }
}

}  // namespace FASTNULL_LEVEL
}  // namespace fastnull
