// What both attention kernels (float32 multiply-adds, bfloat16 dot products) share; see attention_kernel.cpp.
#pragma once

#include "cpu/gemm.h"

namespace fastnull {
namespace FASTNULL_LEVEL {

// attention_kernel.cpp
int64_t attention_workspace(int64_t tokens, int64_t head_dim, bool backward);
void attention(const AttentionArgs& a, int64_t begin, int64_t end);
void attention_dqkv(const AttentionArgs& a, int64_t begin, int64_t end);

namespace {

constexpr int64_t W = Vec::size;
// Most queries in a block. Blocks of 36 to 200 rows take the same time at N = 197 (2 %, Emerald Rapids); at N = 50
// the scores of one block should fit into L1.
constexpr int64_t QUERIES = 72;

int64_t vectors(int64_t n) { return (n + W - 1) / W; }

// Floats between rows of `n` values. An odd number of vectors, so that the rows of a tile spread over the L1 sets.
int64_t pitch(int64_t n) { return (vectors(n) | 1) * W; }

int64_t query_block(int64_t tokens) {
  const int64_t blocks = (tokens + QUERIES - 1) / QUERIES;
  return blocks ? (tokens + blocks - 1) / blocks : 0;
}

template <typename T>
FASTNULL_INLINE Vec load_part(const T* p, int64_t n) {
  return n >= W ? Vec::load(p) : Vec::load(p, int(n));
}

// out [rows, d] = factor * in [rows, dp], one factor per row if `factors` is given.
template <typename T>
void unpack_rows(const float* in, int64_t rows, int64_t d, float factor, const float* factors, T* out, int64_t stride) {
  const int64_t dp = vectors(d) * W;
  for (int64_t r = 0; r < rows; ++r) {
    const Vec f = Vec::set(factors ? factors[r] : factor);
    int64_t c = 0;
    for (; c + W <= d; c += W) (Vec::load(in + r * dp + c) * f).store(out + r * stride + c);
    if (c < d) (Vec::load(in + r * dp + c) * f).store(out + r * stride + c, int(d - c));
  }
}

// Scores [rows, N] → exp(score - row maximum) in `out`, below 1e-37 after N up to whole vectors; inv = 1 / row sum.
// `out` may be the scores.
template <typename T>
void softmax_rows(float* scores, int64_t rows, int64_t N, int64_t np, float* inv, T* out, int64_t out_pitch) {
  const int64_t end = vectors(N) * W;
  for (int64_t r = 0; r < rows; ++r) {
    float* s = scores + r * np;
    T* to = out + r * out_pitch;
    if (end > N) Vec::set(-INFINITY).store(s + N, int(end - N));
    Vec top = Vec::load(s), top2 = Vec::set(-INFINITY);
    int64_t j = W;
    for (; j + 2 * W <= end; j += 2 * W) {
      top = max(top, Vec::load(s + j));
      top2 = max(top2, Vec::load(s + j + W));
    }
    if (j < end) top = max(top, Vec::load(s + j));
    const Vec peak = Vec::set(max(top, top2).max());
    Vec sum = Vec::set(0.0f), sum2 = sum;
    for (j = 0; j + 2 * W <= end; j += 2 * W) {
      const Vec e = exp(Vec::load(s + j) - peak), e2 = exp(Vec::load(s + j + W) - peak);
      e.store(to + j);
      e2.store(to + j + W);
      sum = sum + e;
      sum2 = sum2 + e2;
    }
    if (j < end) {
      const Vec e = exp(Vec::load(s + j) - peak);
      e.store(to + j);
      sum = sum + e;
    }
    inv[r] = 1.0f / (sum + sum2).sum();
  }
}

template <typename T>
FASTNULL_INLINE T* head_of(const Heads& x, int64_t b, int64_t h) {
  return static_cast<T*>(x.data) + b * x.batch_stride + h * x.head_stride;
}

// Prefetches `rows` rows that will be read (or written) soon. Rows of a head are 3 H d elements apart, too far for the
// hardware prefetcher.
template <bool WRITE, typename T>
FASTNULL_INLINE void prefetch_rows(const T* p, int64_t stride, int64_t rows, int64_t d) {
  constexpr int64_t line = 64 / int64_t(sizeof(T));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < d; c += line) __builtin_prefetch(p + r * stride + c, WRITE, 2);
  }
}

}  // namespace
}  // namespace FASTNULL_LEVEL
}  // namespace fastnull
