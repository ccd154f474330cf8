// Small matrix products held in registers, for operands that stay in L1 and L2: C = A B or C += A B, C in float32.
//
// A tile of MR rows by NR vectors of C is kept in registers over the whole contraction: for each k one broadcast of A
// per row and one load of B per column vector feed MR * NR multiply-adds. 6 x 4 takes 24 + 4 + 1 of the 32 AVX-512
// registers, 6 x 2 takes 12 + 2 + 1 of the 16 of AVX2.
//
// The elements of A and B are 32-bit words: floats (Fma), or pairs of bfloat16 that are neighbours in the contraction
// (Dot, which halves K). Which is faster for bfloat16 data depends on the processor: see dispatch.cpp.
#pragma once

#include "cpu/vec.h"

namespace fastnull {
namespace FASTNULL_LEVEL {

constexpr int MR = 6;
constexpr int NR = Vec::size == 16 ? 4 : 2;

struct Fma {
  static FASTNULL_INLINE Vec apply(Vec a, Vec b, Vec c) { return fmadd(a, b, c); }
};
#if defined(__AVX512BF16__)
struct Dot {
  static FASTNULL_INLINE Vec apply(Vec a, Vec b, Vec c) {
    return {_mm512_dpbf16_ps(c.v, (__m512bh)_mm512_castps_si512(a.v), (__m512bh)_mm512_castps_si512(b.v))};
  }
};
#endif

// A word of A: pairs of bfloat16 are read in place, and may start at any even address.
typedef float Word __attribute__((aligned(2), may_alias));

// A is [rows, K] with A(r, k) at a[r * lda + k] (A_ROWS) or at a[k * lda + r] (the transpose of a dense [K, rows]).
template <typename Op, bool A_ROWS, bool ADD, int M, int N>
void tile(int64_t K, const Word* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc) {
  constexpr int W = Vec::size;
  Vec acc[M][N];
#pragma GCC unroll 6
  for (int r = 0; r < M; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) acc[r][j] = ADD ? Vec::load(c + r * ldc + j * W) : Vec::set(0.0f);
  }
  for (int64_t k = 0; k < K; ++k) {
    Vec right[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) right[j] = Vec::load(b + k * ldb + j * W);
#pragma GCC unroll 6
    for (int r = 0; r < M; ++r) {
      const Vec left = Vec::set(A_ROWS ? a[r * lda + k] : a[k * lda + r]);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) acc[r][j] = Op::apply(left, right[j], acc[r][j]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < M; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) acc[r][j].store(c + r * ldc + j * W);
  }
}

using Tile = void (*)(int64_t, const Word*, int64_t, const float*, int64_t, float*, int64_t);

template <typename Op, bool A_ROWS, bool ADD, int N>
FASTNULL_INLINE Tile tile_of_rows(int rows) {
  static_assert(MR == 6, "one case a row count");
  switch (rows) {
    case 1: return tile<Op, A_ROWS, ADD, 1, N>;
    case 2: return tile<Op, A_ROWS, ADD, 2, N>;
    case 3: return tile<Op, A_ROWS, ADD, 3, N>;
    case 4: return tile<Op, A_ROWS, ADD, 4, N>;
    case 5: return tile<Op, A_ROWS, ADD, 5, N>;
    default: return tile<Op, A_ROWS, ADD, 6, N>;
  }
}

template <typename Op, bool A_ROWS, bool ADD>
FASTNULL_INLINE Tile tile_of(int rows, int vectors) {
  switch (vectors) {
    case 1: return tile_of_rows<Op, A_ROWS, ADD, 1>(rows);
    case 2: return tile_of_rows<Op, A_ROWS, ADD, 2>(rows);
#if defined(__AVX512F__)
    case 3: return tile_of_rows<Op, A_ROWS, ADD, 3>(rows);
    default: return tile_of_rows<Op, A_ROWS, ADD, 4>(rows);
#else
    default: return tile_of_rows<Op, A_ROWS, ADD, NR>(rows);
#endif
  }
}

// C [rows, vectors * W] (+)= A [rows, K] B [K, vectors * W]. Tiles share the rows and vectors evenly: 13 vectors are
// 4 + 3 + 3 + 3 and not 4 + 4 + 4 + 1, whose last tile would wait for its own multiply-adds.
template <bool A_ROWS, bool ADD, typename Op = Fma>
void gemm(int64_t rows, int64_t vectors, int64_t K, const Word* a, int64_t lda, const float* b, int64_t ldb, float* c,
          int64_t ldc) {
  constexpr int W = Vec::size;
  const int64_t row_tiles = (rows + MR - 1) / MR;
  const int64_t vector_tiles = (vectors + NR - 1) / NR;
  for (int64_t vt = 0; vt < vector_tiles; ++vt) {
    const int64_t v0 = vt * vectors / vector_tiles;
    const int n = int((vt + 1) * vectors / vector_tiles - v0);
    for (int64_t rt = 0; rt < row_tiles; ++rt) {
      const int64_t r0 = rt * rows / row_tiles;
      const int m = int((rt + 1) * rows / row_tiles - r0);
      const Word* left = A_ROWS ? a + r0 * lda : a + r0;
      tile_of<Op, A_ROWS, ADD>(m, n)(K, left, lda, b + v0 * W, ldb, c + r0 * ldc + v0 * W, ldc);
    }
  }
}

// dst [columns, ld] = the transpose of W rows of src, of which `rows` exist (zero after them), W columns at a time.
#if defined(__AVX512F__)
FASTNULL_INLINE void transpose(Vec (&x)[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  __m512d u[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2]));
    u[i + 1] = _mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2]));
    u[i + 2] = _mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3]));
    u[i + 3] = _mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3]));
  }
  // u[4 g + c] holds column c of each 128-bit lane for rows 4 g .. 4 g + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 a = _mm512_castpd_ps(u[c]), b = _mm512_castpd_ps(u[4 + c]);
    const __m512 d = _mm512_castpd_ps(u[8 + c]), e = _mm512_castpd_ps(u[12 + c]);
    const __m512 ab_even = _mm512_shuffle_f32x4(a, b, 0x88), ab_odd = _mm512_shuffle_f32x4(a, b, 0xdd);
    const __m512 de_even = _mm512_shuffle_f32x4(d, e, 0x88), de_odd = _mm512_shuffle_f32x4(d, e, 0xdd);
    x[c].v = _mm512_shuffle_f32x4(ab_even, de_even, 0x88);
    x[4 + c].v = _mm512_shuffle_f32x4(ab_odd, de_odd, 0x88);
    x[8 + c].v = _mm512_shuffle_f32x4(ab_even, de_even, 0xdd);
    x[12 + c].v = _mm512_shuffle_f32x4(ab_odd, de_odd, 0xdd);
  }
}
#else
FASTNULL_INLINE void transpose(Vec (&x)[Vec::size]) {
  constexpr int W = Vec::size;
  float from[W][W], to[W];
  for (int i = 0; i < W; ++i) x[i].store(from[i]);
  for (int i = 0; i < W; ++i) {
    for (int j = 0; j < W; ++j) to[j] = from[j][i];
    x[i] = Vec::load(to);
  }
}
#endif

}  // namespace FASTNULL_LEVEL
}  // namespace fastnull
