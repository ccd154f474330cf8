// Gradient of attention into packed dqkv (fastnull/ops/attention.py), from qkv and the gradient of o alone.
//
// One block per head, q, k, v and do in shared memory, read once. First each warp takes 16 queries against all keys:
//     P = softmax(S);  delta = rowsum(P dP);  dS = P (dP - delta);  dq = scale dS k
// and keeps log2 of the sum of powers and delta of each row; then 16 keys against all queries, transposed:
//     P^T, dP^T, dS^T again;  dv = P^T do;  dk = scale dS^T q
// Every sum stays in one warp: no atomics, results repeat bit for bit. That costs 8 products against the 5 of a kernel
// that adds up across warps; 5 would need dS of all queries in shared memory, or the 3 sums over keys across warps.
#include "cuda/attention.cuh"

namespace fastnull::cuda {

template <typename T, int WIDTH, int KEY_TILES>
__device__ __forceinline__ void query_gradient(const AttentionArgs& args, T* dq_rows, SharedRows<WIDTH> q,
                                               SharedRows<WIDTH> k, SharedRows<WIDTH> v, SharedRows<WIDTH> grad_o,
                                               float* logs, float* deltas, int tile) {
  Powers<KEY_TILES> row;
  powers_of_scores<T>(row, q, k, tile, args.tokens, args.scale * LOG2_E);
  const float per_sum[2] = {reciprocal_approx(row.sum[0]), reciprocal_approx(row.sum[1])};

  // rowsum(P dP) = do . o: o is computed again instead of all of dP, which does not fit in registers beside P.
  float o[WIDTH / 8][4] = {};
  product_with_values<T>(o, row, v);
  uint32_t grad[WIDTH / 16][4];
#pragma unroll
  for (int c = 0; c < WIDTH / 16; ++c) fragment_a(grad[c], grad_o, tile, c);
  float delta[2] = {};
#pragma unroll
  for (int c = 0; c < WIDTH / 8; ++c)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 pair = unpack<T>(grad[c / 2][c % 2 * 2 + i]);
      delta[i] += pair.x * o[c][2 * i] + pair.y * o[c][2 * i + 1];
    }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    delta[i] = sum_of_row(delta[i]) * per_sum[i];
    if (threadIdx.x % 4 == 0) {
      const int query = tile * TILE + i * 8 + threadIdx.x % WARP / 4;
      logs[query] = row.largest[i] + log2_approx(row.sum[i]);
      deltas[query] = delta[i];
    }
  }
  float dq[WIDTH / 8][4] = {};
#pragma unroll
  for (int j = 0; j < KEY_TILES; ++j) {
    float dp[2][4] = {};
#pragma unroll
    for (int c = 0; c < WIDTH / 16; ++c) {
      uint32_t b[4];
      fragment_b_of_transpose(b, v, j, c);
      mma<T>(dp[0], grad[c], b[0], b[1]);
      mma<T>(dp[1], grad[c], b[2], b[3]);
    }
    __syncwarp();
    uint32_t ds[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack<T>(row.p[j][i]);
      const float factor = j < row.GROUP ? row.first_factor[i % 2] * per_sum[i % 2] : per_sum[i % 2];
      ds[i] = pack<T>(pair.x * factor * (dp[i / 2][i % 2 * 2] - delta[i % 2]),
                      pair.y * factor * (dp[i / 2][i % 2 * 2 + 1] - delta[i % 2]));
    }
    add_product<T>(dq, ds, k, j);
  }
  store_rows<T, WIDTH>(dq, args.scale, args.scale, dq_rows, args.dq.token_stride, tile, args.tokens);
}

template <typename T, int WIDTH>
__device__ __forceinline__ void key_and_value_gradients(const AttentionArgs& args, T* dk_rows, T* dv_rows,
                                                        SharedRows<WIDTH> q, SharedRows<WIDTH> k, SharedRows<WIDTH> v,
                                                        SharedRows<WIDTH> grad_o, const float* logs,
                                                        const float* deltas, int tile) {
  uint32_t keys[WIDTH / 16][4], values[WIDTH / 16][4];
#pragma unroll
  for (int c = 0; c < WIDTH / 16; ++c) fragment_a(keys[c], k, tile, c), fragment_a(values[c], v, tile, c);
  float dk[WIDTH / 8][4] = {}, dv[WIDTH / 8][4] = {};
  // Rows beyond `tokens`: those of q and do are zero and add nothing; results for those of k and v are not stored.
#pragma unroll 1
  for (int i = 0; i * TILE < args.tokens; ++i) {
    float s[2][4] = {}, dp[2][4] = {};  // transposed: 16 keys, 16 queries
#pragma unroll
    for (int c = 0; c < WIDTH / 16; ++c) {
      uint32_t b[4];
      fragment_b_of_transpose(b, q, i, c);
      mma<T>(s[0], keys[c], b[0], b[1]);
      mma<T>(s[1], keys[c], b[2], b[3]);
      fragment_b_of_transpose(b, grad_o, i, c);
      mma<T>(dp[0], values[c], b[0], b[1]);
      mma<T>(dp[1], values[c], b[2], b[3]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = i * TILE + half * 8 + threadIdx.x % 4 * 2;
      const float2 log = *reinterpret_cast<const float2*>(logs + query);
      const float2 delta = *reinterpret_cast<const float2*>(deltas + query);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[half][e] = exp2_approx(s[half][e] * (args.scale * LOG2_E) - (e % 2 == 0 ? log.x : log.y));
        dp[half][e] = s[half][e] * (dp[half][e] - (e % 2 == 0 ? delta.x : delta.y));
      }
    }
    uint32_t a[4];
    as_fragment_a<T>(a, s[0], s[1]);
    add_product<T>(dv, a, grad_o, i);
    as_fragment_a<T>(a, dp[0], dp[1]);
    add_product<T>(dk, a, q, i);
  }
  store_rows<T, WIDTH>(dk, args.scale, args.scale, dk_rows, args.dk.token_stride, tile, args.tokens);
  store_rows<T, WIDTH>(dv, 1, 1, dv_rows, args.dv.token_stride, tile, args.tokens);
}

template <typename T, int WIDTH, int KEY_TILES, int WARPS, int BLOCKS>
__global__ void __launch_bounds__(WARPS* WARP, BLOCKS) attention_dqkv_kernel(const AttentionArgs args) {
  constexpr int ROWS = KEY_TILES * TILE;
  const int image = blockIdx.x / args.heads, head = blockIdx.x % args.heads, tokens = args.tokens;
  float* logs = static_cast<float*>(dynamic_shared());
  float* deltas = logs + ROWS;
  const SharedRows<WIDTH> q{shared_address(deltas + ROWS)};
  const SharedRows<WIDTH> k{q.begin + ROWS * q.ROW_BYTES}, v{k.begin + ROWS * k.ROW_BYTES};
  const SharedRows<WIDTH> grad_o{v.begin + ROWS * v.ROW_BYTES};
  copy_rows<T>(q, head_of<T>(args.q, image, head), args.q.token_stride, tokens, ROWS);
  copy_rows<T>(k, head_of<T>(args.k, image, head), args.k.token_stride, tokens, ROWS);
  copy_rows<T>(v, head_of<T>(args.v, image, head), args.v.token_stride, tokens, ROWS);
  copy_rows<T>(grad_o, head_of<T>(args.grad_o, image, head), args.grad_o.token_stride, tokens, ROWS);
  wait_for_copies();
  __syncthreads();

  const int first = threadIdx.x / WARP;
  for (int tile = first; tile * TILE < tokens; tile += WARPS)
    query_gradient<T, WIDTH, KEY_TILES>(args, head_of<T>(args.dq, image, head), q, k, v, grad_o, logs, deltas, tile);
  __syncthreads();  // logs and deltas of all queries
  for (int tile = first; tile * TILE < tokens; tile += WARPS)
    key_and_value_gradients<T, WIDTH>(args, head_of<T>(args.dk, image, head), head_of<T>(args.dv, image, head), q, k,
                                      v, grad_o, logs, deltas, tile);
}

template <typename T, int WIDTH, int KEY_TILES, int WARPS, int BLOCKS>
cudaError_t launch_dqkv(const AttentionArgs& args, cudaStream_t stream) {
  return launch(attention_dqkv_kernel<T, WIDTH, KEY_TILES, WARPS, BLOCKS>, args.batch * args.heads, WARPS * WARP,
                KEY_TILES * TILE * (4 * WIDTH * sizeof(T) + 2 * sizeof(float)), stream, args);
}

cudaError_t attention_dqkv(const AttentionArgs& args, cudaStream_t stream) {
  return for_dtype_and_width(args, [&](auto element, auto width) {
    using T = decltype(element);
    constexpr int WIDTH = decltype(width)::value;
    if (args.tokens <= 64) return launch_dqkv<T, WIDTH, 4, 4, 3>(args, stream);    // 50: 33 KB
    if (args.tokens <= 80) return launch_dqkv<T, WIDTH, 5, 5, 2>(args, stream);    // 65: 41 KB
    if (args.tokens <= 208) return launch_dqkv<T, WIDTH, 13, 4, 2>(args, stream);  // 197: 106 KB; 5 warps spill
    return launch_dqkv<T, WIDTH, 17, 6, 1>(args, stream);                          // 257: 138 KB
  });
}

}  // namespace fastnull::cuda
