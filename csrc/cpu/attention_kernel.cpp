// Attention over short sequences: forward from packed qkv, and backward into packed dqkv, one (image, head) at a time.
//
//   S = scale q k^T;  P = softmax(S);  o = P v
//   dv = P^T do;  dP = do v^T;  dS = P * (dP - rowsum(P * dP));  dq = scale dS k;  dk = scale dS^T q
//
// k and v of a head are packed once as float32 into a workspace that stays in L2 (50 KB each at N = 197, d = 64), then
// the queries are processed in blocks of whole softmax rows: no rescaling, nothing of size N^2 in memory.
// The softmax stays unnormalised: with E = exp(S - max) and inv = 1 / rowsum(E), inv is multiplied into the rows of o
// in the forward and of do in the backward (N d products instead of N^2):
//   do' = inv do;  dP' = do' v^T;  dS = E * (dP' - inv rowsum(E * dP'));  dv = E^T do'
#include <initializer_list>

#include "cpu/attention_rows.h"

namespace fastnull {
namespace FASTNULL_LEVEL {
namespace {

struct Workspace {
  float *kt, *vt;    // [d, pitch(N)] transposed
  float *k, *v;      // [N, dp]
  float *dk, *dv;    // [N, dp]
  float *q, *grad_o; // [block, dp]
  float *scores;     // [block, pitch(N)]
  float *dscores;    // [block, pitch(N)]
  float *result;     // [block, dp]
  float *inv;        // [block]
};

// Lays the buffers out from `base` (null: only counts); returns the number of floats.
int64_t lay_out(int64_t N, int64_t d, bool backward, float* base, Workspace* w) {
  const int64_t dp = vectors(d) * W, np = pitch(N), block = query_block(N);
  int64_t used = 0;
  const auto take = [&](float** p, int64_t count) {
    *p = base + used;
    used += (count + 15) / 16 * 16;
  };
  take(&w->kt, d * np);
  take(&w->q, block * dp);
  take(&w->scores, block * np);
  take(&w->result, block * dp);
  take(&w->inv, block);
  if (!backward) {
    take(&w->v, N * dp);
    return used;
  }
  take(&w->vt, d * np);
  take(&w->k, N * dp);
  take(&w->dk, N * dp);
  take(&w->dv, N * dp);
  take(&w->grad_o, block * dp);
  take(&w->dscores, block * np);
  return used;
}

// out [rows, dp] = factor * in, zero after d. `factors` (one per row) or one `factor` for all.
template <typename T>
void pack_rows(const T* in, int64_t stride, int64_t rows, int64_t d, float factor, const float* factors, float* out) {
  const int64_t dp = vectors(d) * W;
  for (int64_t r = 0; r < rows; ++r) {
    const Vec f = Vec::set(factors ? factors[r] : factor);
    for (int64_t c = 0; c < d; c += W) (load_part(in + r * stride + c, d - c) * f).store(out + r * dp + c);
  }
}

// out [d, np] = in [N, d] transposed, zero after N up to whole vectors.
template <typename T>
void pack_transposed(const T* in, int64_t stride, int64_t N, int64_t d, int64_t np, float* out) {
  for (int64_t j = 0; j < N; j += W) {
    for (int64_t c = 0; c < d; c += W) {
      Vec x[W];
      for (int64_t r = 0; r < W; ++r) {
        x[r] = j + r < N ? load_part(in + (j + r) * stride + c, d - c) : Vec::set(0.0f);
      }
      transpose(x);
      const int64_t columns = d - c < W ? d - c : W;
      for (int64_t r = 0; r < columns; ++r) x[r].store(out + (c + r) * np + j);
    }
  }
}

// dscores holds dP'; becomes dS = E * (dP' - inv * rowsum(E * dP')).
void softmax_backward_rows(const float* e, float* dscores, int64_t rows, int64_t N, int64_t np, const float* inv) {
  const int64_t end = vectors(N) * W;
  for (int64_t r = 0; r < rows; ++r) {
    const float* p = e + r * np;
    float* g = dscores + r * np;
    Vec sum = Vec::set(0.0f), sum2 = sum;
    int64_t j = 0;
    for (; j + 2 * W <= end; j += 2 * W) {
      sum = fmadd(Vec::load(p + j), Vec::load(g + j), sum);
      sum2 = fmadd(Vec::load(p + j + W), Vec::load(g + j + W), sum2);
    }
    if (j < end) sum = fmadd(Vec::load(p + j), Vec::load(g + j), sum);
    const Vec delta = Vec::set((sum + sum2).sum() * inv[r]);
    for (j = 0; j < end; j += W) (Vec::load(p + j) * (Vec::load(g + j) - delta)).store(g + j);
  }
}

template <typename T>
void forward(const AttentionArgs& a, int64_t begin, int64_t end) {
  const int64_t N = a.tokens, d = a.head_dim, dp = vectors(d) * W, np = pitch(N), block = query_block(N);
  Workspace w;
  lay_out(N, d, false, static_cast<float*>(a.workspace), &w);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / a.heads, h = unit % a.heads;
    const T* q = head_of<T>(a.q, b, h);
    T* o = head_of<T>(a.o, b, h);
    const int64_t next = unit + 1 < end ? unit + 1 : unit, nb = next / a.heads, nh = next % a.heads;
    pack_transposed(head_of<T>(a.k, b, h), a.k.token_stride, N, d, np, w.kt);
    pack_rows(head_of<T>(a.v, b, h), a.v.token_stride, N, d, 1.0f, nullptr, w.v);
    for (int64_t i = 0; i < N; i += block) {
      const int64_t rows = N - i < block ? N - i : block;
      pack_rows(q + i * a.q.token_stride, a.q.token_stride, rows, d, a.scale, nullptr, w.q);
      prefetch_rows<true>(o + i * a.o.token_stride, a.o.token_stride, rows, d);
      for (const Heads* x : {&a.q, &a.k, &a.v}) {
        prefetch_rows<false>(head_of<T>(*x, nb, nh) + i * x->token_stride, x->token_stride, rows, d);
      }
      gemm<true, false>(rows, vectors(N), d, w.q, dp, w.kt, np, w.scores, np);
      softmax_rows(w.scores, rows, N, np, w.inv, w.scores, np);
      gemm<true, false>(rows, vectors(d), N, w.scores, np, w.v, dp, w.result, dp);
      unpack_rows(w.result, rows, d, 1.0f, w.inv, o + i * a.o.token_stride, a.o.token_stride);
    }
  }
}

template <typename T>
void backward(const AttentionArgs& a, int64_t begin, int64_t end) {
  const int64_t N = a.tokens, d = a.head_dim, dp = vectors(d) * W, np = pitch(N), block = query_block(N);
  Workspace w;
  lay_out(N, d, true, static_cast<float*>(a.workspace), &w);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / a.heads, h = unit % a.heads;
    const T* q = head_of<T>(a.q, b, h);
    const T* k = head_of<T>(a.k, b, h);
    const T* grad_o = head_of<T>(a.grad_o, b, h);
    T* dq = head_of<T>(a.dq, b, h);
    const int64_t next = unit + 1 < end ? unit + 1 : unit, nb = next / a.heads, nh = next % a.heads;
    pack_transposed(k, a.k.token_stride, N, d, np, w.kt);
    pack_transposed(head_of<T>(a.v, b, h), a.v.token_stride, N, d, np, w.vt);
    pack_rows(k, a.k.token_stride, N, d, 1.0f, nullptr, w.k);
    for (int64_t i = 0; i < N; i += block) {
      const int64_t rows = N - i < block ? N - i : block;
      pack_rows(q + i * a.q.token_stride, a.q.token_stride, rows, d, a.scale, nullptr, w.q);
      for (const Heads* x : {&a.dq, &a.dk, &a.dv}) {
        prefetch_rows<true>(head_of<T>(*x, b, h) + i * x->token_stride, x->token_stride, rows, d);
      }
      gemm<true, false>(rows, vectors(N), d, w.q, dp, w.kt, np, w.scores, np);
      softmax_rows(w.scores, rows, N, np, w.inv, w.scores, np);
      for (const Heads* x : {&a.q, &a.k, &a.v, &a.grad_o}) {
        prefetch_rows<false>(head_of<T>(*x, nb, nh) + i * x->token_stride, x->token_stride, rows, d);
      }
      pack_rows(grad_o + i * a.grad_o.token_stride, a.grad_o.token_stride, rows, d, 1.0f, w.inv, w.grad_o);
      gemm<true, false>(rows, vectors(N), d, w.grad_o, dp, w.vt, np, w.dscores, np);
      softmax_backward_rows(w.scores, w.dscores, rows, N, np, w.inv);
      gemm<true, false>(rows, vectors(d), N, w.dscores, np, w.k, dp, w.result, dp);
      unpack_rows(w.result, rows, d, a.scale, nullptr, dq + i * a.dq.token_stride, a.dq.token_stride);
      if (i == 0) {
        gemm<false, false>(N, vectors(d), rows, w.scores, np, w.grad_o, dp, w.dv, dp);
        gemm<false, false>(N, vectors(d), rows, w.dscores, np, w.q, dp, w.dk, dp);
      } else {
        gemm<false, true>(N, vectors(d), rows, w.scores, np, w.grad_o, dp, w.dv, dp);
        gemm<false, true>(N, vectors(d), rows, w.dscores, np, w.q, dp, w.dk, dp);
      }
    }
    unpack_rows(w.dk, N, d, 1.0f, nullptr, head_of<T>(a.dk, b, h), a.dk.token_stride);
    unpack_rows(w.dv, N, d, 1.0f, nullptr, head_of<T>(a.dv, b, h), a.dv.token_stride);
  }
}

}  // namespace

int64_t attention_workspace(int64_t tokens, int64_t head_dim, bool backward) {
  Workspace unused;
  return lay_out(tokens, head_dim, backward, nullptr, &unused) * int64_t(sizeof(float));
}

void attention(const AttentionArgs& a, int64_t begin, int64_t end) {
  a.dtype == Dtype::f32 ? forward<float>(a, begin, end) : forward<bf16>(a, begin, end);
}

void attention_dqkv(const AttentionArgs& a, int64_t begin, int64_t end) {
  a.dtype == Dtype::f32 ? backward<float>(a, begin, end) : backward<bf16>(a, begin, end);
}

}  // namespace FASTNULL_LEVEL
}  // namespace fastnull
