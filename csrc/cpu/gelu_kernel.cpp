// GELU with the bias added first, and its derivative: kept as float or as one byte for float32, as one byte for bfloat16.
//
//   erf:  gelu(z) = z Phi(z),  gelu'(z) = Phi(z) + z phi(z)
//   tanh: gelu(z) = z s,  s = 1 / (1 + exp(-2u)),  u = sqrt(2/pi) (z + 0.044715 z^3),
//         gelu'(z) = s + 2 z s (1 - s) u'(z)
//   byte: round(200 gelu') + 26; gelu' = (byte - 26) / 200
//
// Phi(-t) = exp(-t^2 / 2) R(t) for t >= 0, with R a polynomial in 1 / (1 + 0.21 t) (our fit, relative error 1.7e-8 on
// [0, 14]): one exponential serves Phi and phi, and the negative tail keeps its relative accuracy.
#include "cpu/vec.h"

namespace fastnull {
namespace FASTNULL_LEVEL {
namespace {

constexpr int W = Vec::size;
constexpr float CODES_PER_UNIT = 200.0f;
constexpr float CODE_OF_ZERO = 26.0f;

FASTNULL_INLINE Vec erf_gelu(Vec z, Vec* derivative) {
  const Vec t = abs(z);
  const Vec e = exp(t * t * Vec::set(-0.5f));
  const Vec u = Vec::set(1.0f) / fmadd(t, Vec::set(0.21f), Vec::set(1.0f));
  Vec r = Vec::set(-0.0716547891f);
  r = fmadd(r, u, Vec::set(0.283581465f));
  r = fmadd(r, u, Vec::set(-0.330239087f));
  r = fmadd(r, u, Vec::set(0.349384814f));
  r = fmadd(r, u, Vec::set(-0.0939139575f));
  r = fmadd(r, u, Vec::set(0.124867812f));
  r = fmadd(r, u, Vec::set(0.0691934824f));
  r = fmadd(r, u, Vec::set(0.0850686580f));
  r = fmadd(r, u, Vec::set(0.0837115869f));
  const Vec tail = e * (r * u);
  const Vec cdf = where_negative(z, tail, Vec::set(1.0f) - tail);
  *derivative = fmadd(z * e, Vec::set(0.398942280f), cdf);
  return z * cdf;
}

FASTNULL_INLINE Vec tanh_gelu(Vec z, Vec* derivative) {
  const Vec slope = Vec::set(0.797884561f), cubic = Vec::set(0.044715f);
  // At |z| = 10, s is 0 or 1 to within 1e-37; beyond, the cube would overflow and infinity meet zero.
  const Vec above = max(z, Vec::set(-10.0f)), held = min(above, Vec::set(10.0f));
  const Vec square = held * held;
  const Vec u = slope * held * fmadd(cubic, square, Vec::set(1.0f));
  const Vec e = exp(u * Vec::set(-2.0f));
  const Vec s = Vec::set(1.0f) / (Vec::set(1.0f) + e);
  const Vec du = slope * fmadd(Vec::set(3.0f) * cubic, square, Vec::set(1.0f));
  // 1 - s = e s: the difference itself would lose its digits where s is near 1.
  *derivative = fmadd(Vec::set(2.0f) * held * s * (e * s), du, s);
  return above * s;
}

FASTNULL_INLINE void put_derivative(Vec x, float* p, int n) {
  n == W ? x.store(p) : x.store(p, n);
}
FASTNULL_INLINE void put_derivative(Vec x, uint8_t* p, int n) {
  const Vec code = fmadd(x, Vec::set(CODES_PER_UNIT), Vec::set(CODE_OF_ZERO));
  if (n == W) return code.store_u8(p);
  uint8_t part[W];
  code.store_u8(part);
  std::memcpy(p, part, size_t(n));
}

FASTNULL_INLINE Vec get_derivative(const float* p, int n) { return n == W ? Vec::load(p) : Vec::load(p, n); }
FASTNULL_INLINE Vec get_derivative(const uint8_t* p, int n) {
  uint8_t part[W] = {};
  if (n < W) {
    std::memcpy(part, p, size_t(n));
    p = part;
  }
  return (Vec::load_u8(p) - Vec::set(CODE_OF_ZERO)) * Vec::set(1.0f / CODES_PER_UNIT);
}

template <typename T, typename Kept, bool TANH>
void gelu_rows(const GeluArgs& a, int64_t begin, int64_t end) {
  const int64_t D = a.width;
  for (int64_t m = begin; m < end; ++m) {
    const T* z = const_row<T>(a.z, m);
    T* h = mutable_row<T>(a.h, m);
    Kept* kept = a.derivative ? static_cast<Kept*>(a.derivative) + m * D : nullptr;
    for (int64_t i = 0; i < D; i += W) {
      const int n = D - i < W ? int(D - i) : W;
      Vec x = n == W ? Vec::load(z + i) : Vec::load(z + i, n);
      if (a.bias) x = x + (n == W ? Vec::load(a.bias + i) : Vec::load(a.bias + i, n));
      Vec derivative;
      const Vec value = TANH ? tanh_gelu(x, &derivative) : erf_gelu(x, &derivative);
      n == W ? value.store(h + i) : value.store(h + i, n);
      if (kept) put_derivative(derivative, kept + i, n);
    }
  }
}

template <typename T, typename Kept>
void dgelu_rows(const DgeluArgs& a, int64_t begin, int64_t end) {
  const int64_t D = a.width;
  for (int64_t m = begin; m < end; ++m) {
    T* g = mutable_row<T>(a.g, m);
    const Kept* kept = static_cast<const Kept*>(a.derivative) + m * D;
    for (int64_t i = 0; i < D; i += W) {
      const int n = D - i < W ? int(D - i) : W;
      const Vec x = (n == W ? Vec::load(g + i) : Vec::load(g + i, n)) * get_derivative(kept + i, n);
      n == W ? x.store(g + i) : x.store(g + i, n);
    }
  }
}

}  // namespace

void gelu(const GeluArgs& a, int64_t begin, int64_t end) {
  if (a.dtype == Dtype::bf16) {
    a.tanh ? gelu_rows<bf16, uint8_t, true>(a, begin, end) : gelu_rows<bf16, uint8_t, false>(a, begin, end);
  } else if (a.coded) {
    a.tanh ? gelu_rows<float, uint8_t, true>(a, begin, end) : gelu_rows<float, uint8_t, false>(a, begin, end);
  } else {
    a.tanh ? gelu_rows<float, float, true>(a, begin, end) : gelu_rows<float, float, false>(a, begin, end);
  }
}

void dgelu(const DgeluArgs& a, int64_t begin, int64_t end) {
  if (a.dtype == Dtype::bf16) return dgelu_rows<bf16, uint8_t>(a, begin, end);
  a.coded ? dgelu_rows<float, uint8_t>(a, begin, end) : dgelu_rows<float, float>(a, begin, end);
}

}  // namespace FASTNULL_LEVEL
}  // namespace fastnull
