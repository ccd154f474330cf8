// o = softmax(scale q k^T) v for every image and head, from packed qkv (fastnull/ops/attention.py).
//
// One block per head. q, k and v are read once, into shared memory; a warp holds the scores of 16 queries against all
// keys in registers, packed to 16 bits, and o is written once. It moves 4 B N H d values, the least possible.
#include "cuda/attention.cuh"

namespace fastnull::cuda {

template <typename T, int WIDTH, int KEY_TILES, int WARPS, int BLOCKS>
__global__ void __launch_bounds__(WARPS* WARP, BLOCKS) attention_kernel(const AttentionArgs args) {
  constexpr int ROWS = KEY_TILES * TILE;
  const int image = blockIdx.x / args.heads, head = blockIdx.x % args.heads, tokens = args.tokens;
  const SharedRows<WIDTH> q{shared_address(dynamic_shared())};
  const SharedRows<WIDTH> k{q.begin + ROWS * q.ROW_BYTES}, v{k.begin + ROWS * k.ROW_BYTES};
  copy_rows<T>(q, head_of<T>(args.q, image, head), args.q.token_stride, tokens, ROWS);
  copy_rows<T>(k, head_of<T>(args.k, image, head), args.k.token_stride, tokens, ROWS);
  copy_rows<T>(v, head_of<T>(args.v, image, head), args.v.token_stride, tokens, ROWS);
  wait_for_copies();
  __syncthreads();

  for (int tile = threadIdx.x / WARP; tile * TILE < tokens; tile += WARPS) {
    Powers<KEY_TILES> row;
    powers_of_scores<T>(row, q, k, tile, tokens, args.scale * LOG2_E);
    float o[WIDTH / 8][4] = {};
    product_with_values<T>(o, row, v);
    store_rows<T, WIDTH>(o, reciprocal_approx(row.sum[0]), reciprocal_approx(row.sum[1]),
                         head_of<T>(args.o, image, head), args.o.token_stride, tile, tokens);
  }
}

template <typename T, int WIDTH, int KEY_TILES, int WARPS, int BLOCKS>
cudaError_t launch_attention(const AttentionArgs& args, cudaStream_t stream) {
  return launch(attention_kernel<T, WIDTH, KEY_TILES, WARPS, BLOCKS>, args.batch * args.heads, WARPS * WARP,
                3 * KEY_TILES * TILE * WIDTH * sizeof(T), stream, args);
}

cudaError_t attention(const AttentionArgs& args, cudaStream_t stream) {
  return for_dtype_and_width(args, [&](auto element, auto width) {
    using T = decltype(element);
    constexpr int WIDTH = decltype(width)::value;
    // As many warps as divide the tiles evenly, and as many blocks as registers and shared memory of sm_90 allow.
    if (args.tokens <= 64) return launch_attention<T, WIDTH, 4, 4, 4>(args, stream);    // 50: 4 tiles, 24 KB
    if (args.tokens <= 80) return launch_attention<T, WIDTH, 5, 5, 3>(args, stream);    // 65: 5, 30 KB
    if (args.tokens <= 208) return launch_attention<T, WIDTH, 13, 5, 2>(args, stream);  // 197: 5 + 5 + 3, 78 KB
    return launch_attention<T, WIDTH, 17, 6, 2>(args, stream);                          // 257: 6 + 6 + 5, 102 KB
  });
}

}  // namespace fastnull::cuda
