// LayerNorm over the last dimension, and its input gradient with the residual's gradient added.
//
//   x    = x + shift
//   mean = sum(x) / D;  rstd = 1 / sqrt(sum((x - mean)^2) / D + eps);  xhat = (x - mean) * rstd
//   y    = xhat * weight + bias
//   dx   = dres + rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat))
//
// One row at a time: a row (3 KB at D = 768) stays in L1 over the passes. Statistics in float32, two passes, because
// E[x^2] - mean^2 cancels for the outlier channels that ViTs have.
#include "cpu/vec.h"

namespace fastnull {
namespace FASTNULL_LEVEL {
namespace {

constexpr int W = Vec::size;

// Sum of f(i, n) over the row in four independent chains (the latency of one add would bound a single chain).
template <typename F>
FASTNULL_INLINE float row_sum(int64_t width, const F& f) {
  Vec sum[4] = {Vec::set(0.0f), Vec::set(0.0f), Vec::set(0.0f), Vec::set(0.0f)};
  int64_t i = 0;
  for (; i + 4 * W <= width; i += 4 * W) {
    for (int c = 0; c < 4; ++c) sum[c] = sum[c] + f(i + c * W, W);
  }
  for (; i + W <= width; i += W) sum[0] = sum[0] + f(i, W);
  if (i < width) sum[1] = sum[1] + f(i, int(width - i));
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])).sum();
}

template <typename T>
FASTNULL_INLINE Vec load(const T* p, int n) {
  return n == W ? Vec::load(p) : Vec::load(p, n);
}

template <typename T, bool SHIFTED>
void forward_rows(const LayerNormArgs& a, int64_t begin, int64_t end) {
  const int64_t D = a.width;
  for (int64_t m = begin; m < end; ++m) {
    const T* x = const_row<T>(a.x, m);
    T* y = mutable_row<T>(a.y, m);
    const auto value = [&](int64_t i, int n) {
      if constexpr (SHIFTED) return load(x + i, n) + load(a.shift + i, n);
      return load(x + i, n);
    };
    const float mean = row_sum(D, value) / float(D);
    const Vec mu = Vec::set(mean);
    const float squares = row_sum(D, [&](int64_t i, int n) {
      const Vec c = value(i, n) - mu;
      if (n == W) return c * c;
      float kept[W];  // the lanes behind the row's end hold -mean: drop them
      (c * c).store(kept);
      return Vec::load(kept, n);
    });
    const float rstd = 1.0f / std::sqrt(squares / float(D) + a.eps);
    const Vec scale = Vec::set(rstd);
    if (a.mean) a.mean[m] = mean;
    a.rstd[m] = rstd;
    const auto normalise = [&](int64_t i, int n) {
      Vec out = (value(i, n) - mu) * scale;
      if (a.weight) out = out * load(a.weight + i, n);
      if (a.bias) out = out + load(a.bias + i, n);
      return out;
    };
    int64_t i = 0;
    for (; i + W <= D; i += W) normalise(i, W).store(y + i);
    if (i < D) normalise(i, int(D - i)).store(y + i, int(D - i));
  }
}

template <typename T>
void backward_rows(const LayerNormDxArgs& a, int64_t begin, int64_t end) {
  const int64_t D = a.width;
  for (int64_t m = begin; m < end; ++m) {
    const T* g = const_row<T>(a.dxhat, m);
    const T* x = const_row<T>(a.x, m);
    const T* dres = a.dres.data ? const_row<T>(a.dres, m) : nullptr;
    T* dx = mutable_row<T>(a.dx, m);
    const Vec rstd = Vec::set(a.rstd[m]);
    // of a normalised x: 0 and 1
    const Vec mu = Vec::set(a.mean ? a.mean[m] : 0.0f);
    const Vec scale = a.mean ? rstd : Vec::set(1.0f);
    const float c1 = row_sum(D, [&](int64_t i, int n) { return load(g + i, n); }) / float(D);
    // g is zero behind the row's end, so the lanes of x there do not count.
    const float c2 = row_sum(D, [&](int64_t i, int n) { return load(g + i, n) * ((load(x + i, n) - mu) * scale); });
    const Vec mean_g = Vec::set(c1);
    const Vec mean_gx = Vec::set(c2 / float(D));
    const auto gradient = [&](int64_t i, int n) {
      const Vec xhat = (load(x + i, n) - mu) * scale;
      const Vec out = rstd * (load(g + i, n) - mean_g - xhat * mean_gx);
      return dres ? out + load(dres + i, n) : out;
    };
    int64_t i = 0;
    for (; i + W <= D; i += W) gradient(i, W).store(dx + i);
    if (i < D) gradient(i, int(D - i)).store(dx + i, int(D - i));
  }
}

}  // namespace

void layer_norm(const LayerNormArgs& a, int64_t begin, int64_t end) {
  if (a.dtype == Dtype::f32) {
    a.shift ? forward_rows<float, true>(a, begin, end) : forward_rows<float, false>(a, begin, end);
  } else {
    a.shift ? forward_rows<bf16, true>(a, begin, end) : forward_rows<bf16, false>(a, begin, end);
  }
}

void layer_norm_dx(const LayerNormDxArgs& a, int64_t begin, int64_t end) {
  a.dtype == Dtype::f32 ? backward_rows<float>(a, begin, end) : backward_rows<bf16>(a, begin, end);
}

}  // namespace FASTNULL_LEVEL
}  // namespace fastnull
