// Bindings of attention and attention_dqkv (fastnull/ops/attention.py).
#include <cstdlib>
#include <memory>

#include "cpu/binding.h"

namespace fastnull {
namespace {

// A 64-byte aligned buffer per thread that only grows: a new one per call would cost page faults.
void* workspace(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> buffer;
  thread_local int64_t size = 0;
  if (bytes > size) {
    const int64_t rounded = (bytes + 63) / 64 * 64;
    buffer.reset(std::aligned_alloc(64, size_t(rounded)));
    STD_TORCH_CHECK(buffer != nullptr, "fastnull: no memory for an attention workspace of ", rounded, " bytes");
    size = rounded;
  }
  return buffer.get();
}

Heads heads_of(const Tensor& t, int64_t element_offset, int64_t head_axis) {
  const int64_t element = t.scalar_type() == ScalarType::Float ? 4 : 2;
  return {static_cast<char*>(t.data_ptr()) + element_offset * element, t.stride(0), t.stride(1), t.stride(head_axis)};
}

// The q, k or v part of a [B, N, 3, H, d] tensor.
Heads packed_part(const Tensor& t, int64_t part) { return heads_of(t, part * t.stride(2), 3); }

AttentionArgs arguments(const Tensor& qkv, double scale) {
  AttentionArgs a{};
  a.dtype = dtype_of(qkv, "qkv");
  check_last_dim_dense(qkv, 5, "qkv");
  STD_TORCH_CHECK(qkv.size(2) == 3, "fastnull: qkv must have shape [B, N, 3, H, d]");
  a.q = packed_part(qkv, 0);
  a.k = packed_part(qkv, 1);
  a.v = packed_part(qkv, 2);
  a.tokens = qkv.size(1);
  a.heads = qkv.size(3);
  a.head_dim = qkv.size(4);
  a.scale = float(scale);
  return a;
}

void check_heads(const Tensor& t, const Tensor& qkv, const char* name) {
  check_last_dim_dense(t, 4, name);
  check_dtype(t, qkv.scalar_type(), name);
  STD_TORCH_CHECK(t.size(0) == qkv.size(0) && t.size(1) == qkv.size(1) && t.size(2) == qkv.size(3) &&
                      t.size(3) == qkv.size(4),
                  "fastnull: ", name, " must have shape [B, N, H, d] of qkv");
}

template <typename Kernel>
void run(const AttentionArgs& args, const Tensor& qkv, bool backward, Kernel kernel) {
  if (qkv.numel() == 0) return;
  const int64_t units = qkv.size(0) * args.heads;
  const int64_t bytes = kernels().attention_workspace(args.tokens, args.head_dim, backward);
  const int64_t work = args.tokens * args.tokens * args.head_dim;  // multiply-adds of one product
  torch::stable::parallel_for(0, units, grain(work / 16), [&](int64_t b, int64_t e) {
    AttentionArgs mine = args;
    mine.workspace = workspace(bytes);
    kernel(mine, b, e);
  });
}

void attention(const Tensor& qkv, double scale, const Tensor& o) {
  AttentionArgs args = arguments(qkv, scale);
  check_heads(o, qkv, "o");
  args.o = heads_of(o, 0, 2);
  run(args, qkv, false, kernels().attention);
}

void attention_dqkv(const Tensor& qkv, const Tensor& grad_o, double scale, const Tensor& dqkv) {
  AttentionArgs args = arguments(qkv, scale);
  check_heads(grad_o, qkv, "grad_o");
  check_last_dim_dense(dqkv, 5, "dqkv");
  check_dtype(dqkv, qkv.scalar_type(), "dqkv");
  check_same_shape(qkv, dqkv, "dqkv");
  args.grad_o = heads_of(grad_o, 0, 2);
  args.dq = packed_part(dqkv, 0);
  args.dk = packed_part(dqkv, 1);
  args.dv = packed_part(dqkv, 2);
  run(args, qkv, true, kernels().attention_dqkv);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastnull, CPU, m) {
  m.impl("attention_out", TORCH_BOX(&attention));
  m.impl("attention_dqkv_out", TORCH_BOX(&attention_dqkv));
}

}  // namespace fastnull
