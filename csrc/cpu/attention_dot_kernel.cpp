// Attention of bfloat16 data on bfloat16 dot products (vdpbf16ps), for processors that issue them faster than float32
// multiply-adds; formulas and blocking as in attention_kernel.cpp. Statistics, sums and accumulators are float32.
//
// A dot product takes two neighbours of the contraction as one 32-bit word. Over the head dimension (S, dP') the rows of
// q and do already are such words in memory, and k and v are transposed word by word. Over the tokens (o, dq) rows
// 2 j and 2 j + 1 of v and k are interleaved, and P and dS are rounded to bfloat16 rows; over the queries (dk, dv) q, do,
// P and dS are interleaved. In the backward P is normalised, since every element passes through registers there anyway.
#if defined(__AVX512BF16__)

#include <algorithm>
#include <chrono>

#include "cpu/attention_rows.h"

namespace fastnull {
namespace FASTNULL_LEVEL {
namespace {

struct Workspace {
  float *kt, *vt;                  // words [d / 2, pitch(N)]
  float *k, *v;                    // words [N / 2, dp]
  float *dk, *dv;                  // [N, dp]
  float *scores, *dscores;         // [block, pitch(N)]
  bf16 *p;                         // [block, pitch(N)]: P in the forward, dS in the backward
  float *p_pairs, *ds_pairs;       // words [block / 2, pitch(N)]
  float *q_pairs, *grad_o_pairs;   // words [block / 2, dp]
  float *result;                   // [block, dp]
  float *inv;                      // [block]
};

// Queries in a block: an even number, so that pairs of rows stay together.
int64_t even_block(int64_t tokens) { return (query_block(tokens) + 1) / 2 * 2; }

// Lays the buffers out from `base` (null: only counts); returns the number of 32-bit words.
int64_t lay_out(int64_t N, int64_t d, bool backward, float* base, Workspace* w) {
  const int64_t dp = vectors(d) * W, np = pitch(N), block = even_block(N), pairs = (N + 1) / 2;
  int64_t used = 0;
  const auto take = [&](float** p, int64_t count) {
    *p = base + used;
    used += (count + 15) / 16 * 16;
  };
  float* p;
  take(&w->kt, d / 2 * np);
  take(&w->scores, block * np);
  take(&w->result, block * dp);
  take(&w->inv, block);
  take(&p, block * np / 2);
  w->p = reinterpret_cast<bf16*>(p);
  if (!backward) {
    take(&w->v, pairs * dp);
    return used;
  }
  take(&w->vt, d / 2 * np);
  take(&w->k, pairs * dp);
  take(&w->dk, N * dp);
  take(&w->dv, N * dp);
  take(&w->dscores, block * np);
  take(&w->p_pairs, block / 2 * np);
  take(&w->ds_pairs, block / 2 * np);
  take(&w->q_pairs, block / 2 * dp);
  take(&w->grad_o_pairs, block / 2 * dp);
  return used;
}

// Rows of bfloat16 pairs as the words that gemm reads.
const Word* words(const bf16* p) { return reinterpret_cast<const Word*>(p); }

// out, words [d / 2, np] = in [N, d] transposed word by word, zero after N up to whole vectors.
void transpose_words(const bf16* in, int64_t stride, int64_t N, int64_t d, int64_t np, float* out) {
  for (int64_t j = 0; j < N; j += W) {
    for (int64_t c = 0; c < d / 2; c += W) {
      Vec x[W];
      for (int64_t r = 0; r < W; ++r) {
        x[r] = j + r < N ? load_part((const float*)(in + (j + r) * stride) + c, d / 2 - c) : Vec::set(0.0f);
      }
      transpose(x);
      const int64_t columns = d / 2 - c < W ? d / 2 - c : W;
      for (int64_t r = 0; r < columns; ++r) x[r].store(out + (c + r) * np + j);
    }
  }
}

// The words (low, high) of 16 pairs.
FASTNULL_INLINE Vec interleave(__m256i low, __m256i high) {
  const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
  return {_mm512_castsi512_ps(_mm512_or_si512(upper, _mm512_cvtepu16_epi32(low)))};
}

FASTNULL_INLINE __m256i load_bits(const bf16* p, int64_t n) {
  return n >= W ? _mm256_loadu_si256((const __m256i*)p) : _mm256_maskz_loadu_epi16(Vec::lanes(int(n)), p);
}

// out, words [rows / 2, dp] = rows 2 r and 2 r + 1 of in [rows, d] side by side; zero after d and after an odd last row.
void interleave_rows(const bf16* in, int64_t stride, int64_t rows, int64_t d, float* out) {
  const int64_t dp = vectors(d) * W;
  for (int64_t r = 0; r < rows; r += 2) {
    const bf16* row = in + r * stride;
    for (int64_t c = 0; c < d; c += W) {
      const __m256i high = r + 1 < rows ? load_bits(row + stride + c, d - c) : _mm256_setzero_si256();
      interleave(load_bits(row + c, d - c), high).store(out + r / 2 * dp + c);
    }
  }
}

void scale_rows(float* scores, int64_t rows, int64_t N, int64_t np, float scale) {
  if (scale == 1.0f) return;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < N; j += W) (Vec::load(scores + r * np + j) * Vec::set(scale)).store(scores + r * np + j);
  }
}

// One row: from e = exp(S - max) and dp = dP, P = e * inv and dS = P * (dP - rowsum(P * dP)), a vector at a time.
struct Row {
  const float *e, *dp;
  Vec inv, delta;
  FASTNULL_INLINE Row(const float* e, const float* dp, float inv, int64_t end) : e(e), dp(dp), inv(Vec::set(inv)) {
    Vec sum = Vec::set(0.0f), sum2 = sum;
    int64_t j = 0;
    for (; j + 2 * W <= end; j += 2 * W) {
      sum = fmadd(Vec::load(e + j), Vec::load(dp + j), sum);
      sum2 = fmadd(Vec::load(e + j + W), Vec::load(dp + j + W), sum2);
    }
    if (j < end) sum = fmadd(Vec::load(e + j), Vec::load(dp + j), sum);
    delta = Vec::set((sum + sum2).sum() * inv);
  }
  FASTNULL_INLINE Vec p(int64_t j) const { return Vec::load(e + j) * inv; }
  FASTNULL_INLINE Vec ds(Vec p, int64_t j) const { return p * (Vec::load(dp + j) - delta); }
};

// Rows of e and dP [rows, N] → dS [rows, N] and the pairs of P and dS.
void softmax_backward_rows(const Workspace& w, int64_t rows, int64_t N, int64_t np) {
  const int64_t end = vectors(N) * W;
  for (int64_t r = 0; r < rows; r += 2) {
    const bool two = r + 1 < rows;
    const int64_t s = two ? r + 1 : r;
    const Row first(w.scores + r * np, w.dscores + r * np, w.inv[r], end);
    // behind an odd last row stands that row times 0
    const Row second(w.scores + s * np, w.dscores + s * np, two ? w.inv[s] : 0.0f, end);
    for (int64_t j = 0; j < end; j += W) {
      const Vec p0 = first.p(j), p1 = second.p(j);
      const __m256i ds0 = first.ds(p0, j).narrow(), ds1 = second.ds(p1, j).narrow();
      interleave(p0.narrow(), p1.narrow()).store(w.p_pairs + r / 2 * np + j);
      interleave(ds0, ds1).store(w.ds_pairs + r / 2 * np + j);
      _mm256_storeu_si256((__m256i*)(w.p + r * np + j), ds0);
      _mm256_storeu_si256((__m256i*)(w.p + s * np + j), two ? ds1 : ds0);
    }
  }
}

void forward(const AttentionArgs& a, int64_t begin, int64_t end) {
  const int64_t N = a.tokens, d = a.head_dim, dp = vectors(d) * W, np = pitch(N), block = even_block(N);
  Workspace w;
  lay_out(N, d, false, static_cast<float*>(a.workspace), &w);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / a.heads, h = unit % a.heads;
    const bf16* q = head_of<bf16>(a.q, b, h);
    bf16* o = head_of<bf16>(a.o, b, h);
    const int64_t next = unit + 1 < end ? unit + 1 : unit, nb = next / a.heads, nh = next % a.heads;
    transpose_words(head_of<bf16>(a.k, b, h), a.k.token_stride, N, d, np, w.kt);
    interleave_rows(head_of<bf16>(a.v, b, h), a.v.token_stride, N, d, w.v);
    for (int64_t i = 0; i < N; i += block) {
      const int64_t rows = N - i < block ? N - i : block;
      prefetch_rows<true>(o + i * a.o.token_stride, a.o.token_stride, rows, d);
      for (const Heads* x : {&a.q, &a.k, &a.v}) {
        prefetch_rows<false>(head_of<bf16>(*x, nb, nh) + i * x->token_stride, x->token_stride, rows, d);
      }
      gemm<true, false, Dot>(rows, vectors(N), d / 2, words(q + i * a.q.token_stride), a.q.token_stride / 2, w.kt, np,
                             w.scores, np);
      scale_rows(w.scores, rows, N, np, a.scale);
      softmax_rows(w.scores, rows, N, np, w.inv, w.p, np);
      gemm<true, false, Dot>(rows, vectors(d), (N + 1) / 2, words(w.p), np / 2, w.v, dp, w.result, dp);
      unpack_rows(w.result, rows, d, 1.0f, w.inv, o + i * a.o.token_stride, a.o.token_stride);
    }
  }
}

void backward(const AttentionArgs& a, int64_t begin, int64_t end) {
  const int64_t N = a.tokens, d = a.head_dim, dp = vectors(d) * W, np = pitch(N), block = even_block(N);
  Workspace w;
  lay_out(N, d, true, static_cast<float*>(a.workspace), &w);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / a.heads, h = unit % a.heads;
    const bf16 *q = head_of<bf16>(a.q, b, h), *k = head_of<bf16>(a.k, b, h), *grad_o = head_of<bf16>(a.grad_o, b, h);
    bf16* dq = head_of<bf16>(a.dq, b, h);
    const int64_t next = unit + 1 < end ? unit + 1 : unit, nb = next / a.heads, nh = next % a.heads;
    transpose_words(k, a.k.token_stride, N, d, np, w.kt);
    transpose_words(head_of<bf16>(a.v, b, h), a.v.token_stride, N, d, np, w.vt);
    interleave_rows(k, a.k.token_stride, N, d, w.k);
    for (int64_t i = 0; i < N; i += block) {
      const int64_t rows = N - i < block ? N - i : block, pairs = (rows + 1) / 2;
      const bf16 *q_block = q + i * a.q.token_stride, *grad_o_block = grad_o + i * a.grad_o.token_stride;
      for (const Heads* x : {&a.dq, &a.dk, &a.dv}) {
        prefetch_rows<true>(head_of<bf16>(*x, b, h) + i * x->token_stride, x->token_stride, rows, d);
      }
      gemm<true, false, Dot>(rows, vectors(N), d / 2, words(q_block), a.q.token_stride / 2, w.kt, np, w.scores, np);
      scale_rows(w.scores, rows, N, np, a.scale);
      softmax_rows(w.scores, rows, N, np, w.inv, w.scores, np);
      for (const Heads* x : {&a.q, &a.k, &a.v, &a.grad_o}) {
        prefetch_rows<false>(head_of<bf16>(*x, nb, nh) + i * x->token_stride, x->token_stride, rows, d);
      }
      gemm<true, false, Dot>(rows, vectors(N), d / 2, words(grad_o_block), a.grad_o.token_stride / 2, w.vt, np,
                             w.dscores, np);
      softmax_backward_rows(w, rows, N, np);
      gemm<true, false, Dot>(rows, vectors(d), (N + 1) / 2, words(w.p), np / 2, w.k, dp, w.result, dp);
      unpack_rows(w.result, rows, d, a.scale, nullptr, dq + i * a.dq.token_stride, a.dq.token_stride);
      interleave_rows(q_block, a.q.token_stride, rows, d, w.q_pairs);
      interleave_rows(grad_o_block, a.grad_o.token_stride, rows, d, w.grad_o_pairs);
      const auto add = i == 0 ? gemm<false, false, Dot> : gemm<false, true, Dot>;
      add(N, vectors(d), pairs, w.p_pairs, np, w.grad_o_pairs, dp, w.dv, dp);
      add(N, vectors(d), pairs, w.ds_pairs, np, w.q_pairs, dp, w.dk, dp);
    }
    unpack_rows(w.dk, N, d, a.scale, nullptr, head_of<bf16>(a.dk, b, h), a.dk.token_stride);
    unpack_rows(w.dv, N, d, 1.0f, nullptr, head_of<bf16>(a.dv, b, h), a.dv.token_stride);
  }
}

// A head dimension and distances between tokens of whole words.
bool serves(const AttentionArgs& a) {
  return a.dtype == Dtype::bf16 && (a.head_dim | a.q.token_stride | a.grad_o.token_stride) % 2 == 0;
}

template <typename Op>
double nanoseconds_of_products() {
  constexpr int CHAINS = 12;  // independent sums, more than the latency of either instruction
  Vec sums[CHAINS];
  for (int i = 0; i < CHAINS; ++i) sums[i] = Vec::set(0.0f);
  volatile float zero = 0.0f;  // the products must not be folded away
  const Vec a = Vec::set(zero);
  const auto start = std::chrono::steady_clock::now();
  for (int k = 0; k < 1000; ++k) {
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; ++i) sums[i] = Op::apply(a, a, sums[i]);
  }
  const auto stop = std::chrono::steady_clock::now();
  for (int i = 1; i < CHAINS; ++i) sums[0] = sums[0] + sums[i];
  zero = sums[0].sum();
  return double(std::chrono::duration_cast<std::chrono::nanoseconds>(stop - start).count());
}

}  // namespace

// A dot product does the work of two multiply-adds; Zen 4 issues it as often as one, Emerald Rapids a quarter as often.
bool dots_are_fast() {
  double dot = 1e9, fma = 1e9;
  for (int i = 0; i < 5; ++i) {
    dot = std::min(dot, nanoseconds_of_products<Dot>());
    fma = std::min(fma, nanoseconds_of_products<Fma>());
  }
  return dot < 1.5 * fma;
}

int64_t attention_dot_workspace(int64_t tokens, int64_t head_dim, bool backward) {
  Workspace unused;
  const int64_t mine = lay_out(tokens, head_dim, backward, nullptr, &unused) * int64_t(sizeof(float));
  const int64_t other = attention_workspace(tokens, head_dim, backward);  // of what `serves` turns away
  return mine > other ? mine : other;
}

void attention_dot(const AttentionArgs& a, int64_t begin, int64_t end) {
  serves(a) ? forward(a, begin, end) : attention(a, begin, end);
}

void attention_dot_dqkv(const AttentionArgs& a, int64_t begin, int64_t end) {
  serves(a) ? backward(a, begin, end) : attention_dqkv(a, begin, end);
}

}  // namespace FASTNULL_LEVEL
}  // namespace fastnull

#endif
