// Vec: as many floats as the processor level holds in one register, and the few functions the kernels need.
//
// Everything lives in namespace fastnull::FASTNULL_LEVEL, so that no two levels share a symbol. bfloat16 is storage
// only: it is widened on load and rounded to nearest even on store. Comparisons are arranged so that NaN propagates.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef FASTNULL_LEVEL
#error "kernels are compiled with -DFASTNULL_LEVEL=<name> (setup.py)"
#endif

#define FASTNULL_INLINE inline __attribute__((always_inline))

namespace fastnull {
namespace FASTNULL_LEVEL {

struct bf16 {
  uint16_t bits;
};

FASTNULL_INLINE float to_float(float x) { return x; }
FASTNULL_INLINE float to_float(bf16 x) {
  const uint32_t word = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &word, sizeof out);
  return out;
}
FASTNULL_INLINE void put(float* p, float x) { *p = x; }
FASTNULL_INLINE void put(bf16* p, float x) {
  uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  const bool nan = (word & 0x7fffffffu) > 0x7f800000u;
  p->bits = nan ? uint16_t(0x7fc0) : uint16_t((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}

#if defined(__AVX512F__)

constexpr float EXP_LOWEST = -104.0f;  // vscalefps underflows to denormals and to 0 by itself

struct Vec {
  static constexpr int size = 16;
  __m512 v;
  static FASTNULL_INLINE Vec set(float x) { return {_mm512_set1_ps(x)}; }
  static FASTNULL_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static FASTNULL_INLINE Vec load(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
  // The first n < size elements, zero behind them; nothing beyond them is read or written.
  static FASTNULL_INLINE Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(lanes(n), p)}; }
  static FASTNULL_INLINE Vec load(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(lanes(n), p)); }
  static FASTNULL_INLINE Vec load_u8(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)))};
  }
  FASTNULL_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  FASTNULL_INLINE void store(bf16* p) const { _mm256_storeu_si256((__m256i*)p, narrow()); }
  FASTNULL_INLINE void store(float* p, int n) const { _mm512_mask_storeu_ps(p, lanes(n), v); }
  FASTNULL_INLINE void store(bf16* p, int n) const { _mm256_mask_storeu_epi16(p, lanes(n), narrow()); }
  // Rounded to the nearest of 0..255, saturating.
  FASTNULL_INLINE void store_u8(uint8_t* p) const {
    const __m512i word = _mm512_max_epi32(_mm512_cvtps_epi32(v), _mm512_setzero_si512());
    _mm_storeu_si128((__m128i*)p, _mm512_cvtusepi32_epi8(word));
  }
  FASTNULL_INLINE float sum() const { return _mm512_reduce_add_ps(v); }
  FASTNULL_INLINE float max() const { return _mm512_reduce_max_ps(v); }

  static FASTNULL_INLINE __mmask16 lanes(int n) { return __mmask16((1u << n) - 1u); }
  static FASTNULL_INLINE Vec widen(__m256i h) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
  }
  FASTNULL_INLINE __m256i narrow() const {
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(v);
#else
    const __m512i word = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(word, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
#endif
  }
};
FASTNULL_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
FASTNULL_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
FASTNULL_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
FASTNULL_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
FASTNULL_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // a * b + c
FASTNULL_INLINE Vec fnmadd(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b
FASTNULL_INLINE Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
FASTNULL_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
// NaN in `a` comes out as NaN, NaN in `b` as `a`: pass the bound as b.
FASTNULL_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(b.v, a.v)}; }
FASTNULL_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(b.v, a.v)}; }
FASTNULL_INLINE Vec where_negative(Vec x, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_LT_OQ), no.v, yes.v)};
}
FASTNULL_INLINE Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
FASTNULL_INLINE Vec scale_exponent(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }  // a * 2^n, n integral

#elif defined(__AVX2__)

constexpr float EXP_LOWEST = -87.0f;  // the exponent field has no room below

struct Vec {
  static constexpr int size = 8;
  __m256 v;
  static FASTNULL_INLINE Vec set(float x) { return {_mm256_set1_ps(x)}; }
  static FASTNULL_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static FASTNULL_INLINE Vec load(const bf16* p) { return widen(_mm_loadu_si128((const __m128i*)p)); }
  static FASTNULL_INLINE Vec load(const float* p, int n) { return {_mm256_maskload_ps(p, lanes(n))}; }
  static FASTNULL_INLINE Vec load(const bf16* p, int n) {
    bf16 part[size] = {};
    std::memcpy(part, p, size_t(n) * sizeof(bf16));
    return load(part);
  }
  static FASTNULL_INLINE Vec load_u8(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
  }
  FASTNULL_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  FASTNULL_INLINE void store(bf16* p) const { _mm_storeu_si128((__m128i*)p, narrow()); }
  FASTNULL_INLINE void store(float* p, int n) const { _mm256_maskstore_ps(p, lanes(n), v); }
  FASTNULL_INLINE void store(bf16* p, int n) const {
    bf16 part[size];
    store(part);
    std::memcpy(p, part, size_t(n) * sizeof(bf16));
  }
  FASTNULL_INLINE void store_u8(uint8_t* p) const {
    const __m256i word = _mm256_cvtps_epi32(v);
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(word), _mm256_extracti128_si256(word, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(half, half));
  }
  FASTNULL_INLINE float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  FASTNULL_INLINE float max() const {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }

  static FASTNULL_INLINE __m256i lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static FASTNULL_INLINE Vec widen(__m128i h) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
  }
  FASTNULL_INLINE __m128i narrow() const {
    const __m256i word = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(word, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(word, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
    const __m256i high = _mm256_srli_epi32(kept, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
};
FASTNULL_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
FASTNULL_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
FASTNULL_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
FASTNULL_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
FASTNULL_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FASTNULL_INLINE Vec fnmadd(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
FASTNULL_INLINE Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
FASTNULL_INLINE Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
FASTNULL_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(b.v, a.v)}; }
FASTNULL_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(b.v, a.v)}; }
FASTNULL_INLINE Vec where_negative(Vec x, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_LT_OQ))};
}
FASTNULL_INLINE Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
FASTNULL_INLINE Vec scale_exponent(Vec a, Vec n) {
  const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(bits))};
}

#else

constexpr float EXP_LOWEST = -87.0f;

// Four floats in the compiler's own vector type: SSE2 or NEON where there is one, scalar code elsewhere.
struct Vec {
  static constexpr int size = 4;
  typedef float Raw __attribute__((vector_size(16)));
  typedef int32_t Int __attribute__((vector_size(16)));
  Raw v;
  static FASTNULL_INLINE Vec set(float x) { return {Raw{x, x, x, x}}; }
  template <typename T>
  static FASTNULL_INLINE Vec load(const T* p) {
    return {Raw{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
  }
  template <typename T>
  static FASTNULL_INLINE Vec load(const T* p, int n) {
    Vec out = set(0.0f);
    for (int i = 0; i < n; ++i) out.v[i] = to_float(p[i]);
    return out;
  }
  static FASTNULL_INLINE Vec load_u8(const uint8_t* p) {
    return {Raw{float(p[0]), float(p[1]), float(p[2]), float(p[3])}};
  }
  template <typename T>
  FASTNULL_INLINE void store(T* p) const {
    for (int i = 0; i < size; ++i) put(p + i, v[i]);
  }
  template <typename T>
  FASTNULL_INLINE void store(T* p, int n) const {
    for (int i = 0; i < n; ++i) put(p + i, v[i]);
  }
  FASTNULL_INLINE void store_u8(uint8_t* p) const {
    for (int i = 0; i < size; ++i) p[i] = uint8_t(std::fmin(std::fmax(std::nearbyint(v[i]), 0.0f), 255.0f));
  }
  FASTNULL_INLINE float sum() const { return (v[0] + v[2]) + (v[1] + v[3]); }
  FASTNULL_INLINE float max() const {
    float m = v[0];
    for (int i = 1; i < size; ++i) m = v[i] > m ? v[i] : m;
    return m;
  }
};
FASTNULL_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
FASTNULL_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
FASTNULL_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
FASTNULL_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
FASTNULL_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
FASTNULL_INLINE Vec fnmadd(Vec a, Vec b, Vec c) { return {c.v - a.v * b.v}; }
FASTNULL_INLINE Vec sqrt(Vec a) {
  return {Vec::Raw{std::sqrt(a.v[0]), std::sqrt(a.v[1]), std::sqrt(a.v[2]), std::sqrt(a.v[3])}};
}
FASTNULL_INLINE Vec abs(Vec a) {
  return {Vec::Raw{std::fabs(a.v[0]), std::fabs(a.v[1]), std::fabs(a.v[2]), std::fabs(a.v[3])}};
}
FASTNULL_INLINE Vec max(Vec a, Vec b) { return {a.v < b.v ? b.v : a.v}; }
FASTNULL_INLINE Vec min(Vec a, Vec b) { return {a.v > b.v ? b.v : a.v}; }
FASTNULL_INLINE Vec where_negative(Vec x, Vec yes, Vec no) { return {x.v < 0.0f ? yes.v : no.v}; }
FASTNULL_INLINE Vec round(Vec a) {
  // Adding 1.5 * 2^23 drops the fraction; exact to nearest even for |a| < 2^22, far beyond what exp passes.
  const Vec magic = Vec::set(12582912.0f);
  return (a + magic) - magic;
}
FASTNULL_INLINE Vec scale_exponent(Vec a, Vec n) {
  Vec::Int bits = (__builtin_convertvector(n.v, Vec::Int) + 127) << 23;
  return {a.v * (Vec::Raw)bits};
}

#endif

// e^x within 2 ulp for x in [-87, 88.3]; 0 far below (between -104 and -87 it may be a denormal), infinity or the value
// at 88.37 above. Cody-Waite reduction x = n ln2 + r, then the degree-6 polynomial of e^r on |r| <= ln2 / 2 (our fit).
FASTNULL_INLINE Vec exp(Vec x) {
  const Vec held = min(max(x, Vec::set(EXP_LOWEST)), Vec::set(88.3762589f));
  const Vec n = round(held * Vec::set(1.44269504f));
  Vec r = fnmadd(n, Vec::set(0.693145752f), held);  // ln2 in two parts: the first has 9 trailing zero bits
  r = fnmadd(n, Vec::set(1.42860677e-6f), r);
  Vec p = Vec::set(0.00139503658f);
  p = fmadd(p, r, Vec::set(0.00837174524f));
  p = fmadd(p, r, Vec::set(0.0416662022f));
  p = fmadd(p, r, Vec::set(0.166664898f));
  p = fmadd(p, r, Vec::set(0.5f));
  p = fmadd(p, r, Vec::set(1.0f));
  p = fmadd(p, r, Vec::set(1.0f));
#if defined(__AVX512F__)
  return scale_exponent(p, n);
#else
  return where_negative(x - Vec::set(EXP_LOWEST), Vec::set(0.0f), scale_exponent(p, n));
#endif
}

FASTNULL_INLINE const void* row(const Rows& rows, int64_t m, int64_t element_size) {
  const int64_t at = (m / rows.inner) * rows.outer_stride + (m % rows.inner) * rows.inner_stride;
  return static_cast<const char*>(rows.data) + at * element_size;
}
template <typename T>
FASTNULL_INLINE const T* const_row(const Rows& rows, int64_t m) {
  return static_cast<const T*>(row(rows, m, sizeof(T)));
}
template <typename T>
FASTNULL_INLINE T* mutable_row(const Rows& rows, int64_t m) {
  return static_cast<T*>(const_cast<void*>(row(rows, m, sizeof(T))));
}

}  // namespace FASTNULL_LEVEL
}  // namespace fastnull
