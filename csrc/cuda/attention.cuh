// What the two attention kernels share: rows of one head in shared memory, a whole row of scores in registers, stores.
//
// One block has one image and one head. Its tokens are cut into tiles of 16; a warp has one tile of rows at a time. A
// tile's fragments are those of mma.cuh; `lane / 4` and `lane / 4 + 8` are a lane's two rows.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"

namespace fastnull::cuda {

constexpr int WARP = 32, TILE = 16;
constexpr float LOG2_E = 1.4426950408889634f;

// Rows of one head, WIDTH 16-bit values each, in shared memory. 16-byte chunks are exchanged within a row so that the
// 8 rows of one ldmatrix lie in different banks.
template <int WIDTH>
struct SharedRows {
  static_assert(WIDTH == 64 || WIDTH == 32);
  static constexpr int CHUNKS = WIDTH / 8, ROW_BYTES = 2 * WIDTH;
  SharedAddress begin;

  __device__ __forceinline__ SharedAddress at(int row, int chunk) const {
    return begin + row * ROW_BYTES + (chunk ^ (WIDTH == 64 ? row & 7 : row >> 1 & 3)) * 16;
  }
};

// Starts to copy `rows` rows of a head, zeros beyond `tokens`.
template <typename T, int WIDTH>
__device__ __forceinline__ void copy_rows(SharedRows<WIDTH> to, const T* from, int64_t stride, int tokens, int rows) {
  constexpr int CHUNKS = SharedRows<WIDTH>::CHUNKS;
  for (int i = threadIdx.x; i < rows * CHUNKS; i += blockDim.x) {
    const int row = i / CHUNKS, chunk = i % CHUNKS;
    const bool valid = row < tokens;
    copy16_async(to.at(row, chunk), from + (valid ? row : 0) * stride + chunk * 8, valid);
  }
}

// A of a product: 16 rows of `tile`, columns 16 k on.
template <int WIDTH>
__device__ __forceinline__ void fragment_a(uint32_t (&a)[4], SharedRows<WIDTH> rows, int tile, int k) {
  const int lane = threadIdx.x % WARP;
  ldmatrix(a, rows.at(tile * TILE + lane % 16, 2 * k + lane / 16));
}

// B of a product with the transpose of 16 rows: columns of B are rows of `tile`, its inner dimension columns 16 k on.
// b[0], b[1] are the first 8 columns of B, b[2], b[3] the other 8.
template <int WIDTH>
__device__ __forceinline__ void fragment_b_of_transpose(uint32_t (&b)[4], SharedRows<WIDTH> rows, int tile, int k) {
  const int lane = threadIdx.x % WARP;
  ldmatrix(b, rows.at(tile * TILE + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
}

// B of a product with 16 rows as they are: its inner dimension is the rows of `tile`, columns are 16 n on.
template <int WIDTH>
__device__ __forceinline__ void fragment_b(uint32_t (&b)[4], SharedRows<WIDTH> rows, int tile, int n) {
  const int lane = threadIdx.x % WARP;
  ldmatrix_transposed(b, rows.at(tile * TILE + lane % 16, 2 * n + lane / 16));
}

// sums[16, WIDTH] += a[16, 16] times 16 rows as they are.
template <typename T, int WIDTH>
__device__ __forceinline__ void add_product(float (&sums)[WIDTH / 8][4], const uint32_t (&a)[4],
                                            SharedRows<WIDTH> rows, int tile) {
#pragma unroll
  for (int n = 0; n < WIDTH / 16; ++n) {
    uint32_t b[4];
    fragment_b(b, rows, tile, n);
    mma<T>(sums[2 * n], a, b[0], b[1]);
    mma<T>(sums[2 * n + 1], a, b[2], b[3]);
  }
}

// Two neighbouring D [16, 8] as the A [16, 16] of a next product.
template <typename T>
__device__ __forceinline__ void as_fragment_a(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack<T>(left[0], left[1]);
  a[1] = pack<T>(left[2], left[3]);
  a[2] = pack<T>(right[0], right[1]);
  a[3] = pack<T>(right[2], right[3]);
}

// Over the four lanes that share a row.
__device__ __forceinline__ float sum_of_row(float x) {
  x += __shfl_xor_sync(0xFFFFFFFF, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFF, x, 2);
}
__device__ __forceinline__ float largest_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 2));
}

// Every __syncwarp() in these kernels is for the compiler: without it, operands of several iterations of an unrolled
// loop are loaded ahead and registers run out.

// The scores of 16 queries against all keys, as powers of two packed as the A of a product with keys or values. They
// are computed in two groups of key tiles where one would not fit in registers: the first group is relative to its own
// largest score, the second to the largest of all, and `first_factor` corrects for that.
template <int KEY_TILES>
struct Powers {
  static constexpr int GROUP = KEY_TILES <= 8 ? KEY_TILES : (KEY_TILES + 1) / 2;
  uint32_t p[KEY_TILES][4];
  float largest[2], sum[2], first_factor[2];  // of a lane's two rows; sum: with first_factor
};

// FIRST, COUNT: the group's tiles. scale_log2 holds log2(e).
template <typename T, int WIDTH, int KEY_TILES, int FIRST, int COUNT>
__device__ __forceinline__ void powers_of_group(Powers<KEY_TILES>& row, SharedRows<WIDTH> q, SharedRows<WIDTH> k,
                                                int tile, int tokens, float scale_log2) {
  float s[COUNT][2][4] = {};  // [16, 16] a tile
#pragma unroll 1  // unrolled, fragments are loaded so early that registers run out
  for (int c = 0; c < WIDTH / 16; ++c) {
    uint32_t a[4];
    fragment_a(a, q, tile, c);
#pragma unroll
    for (int j = 0; j < COUNT; ++j) {
      uint32_t b[4];
      fragment_b_of_transpose(b, k, FIRST + j, c);
      mma<T>(s[j][0], a, b[0], b[1]);
      mma<T>(s[j][1], a, b[2], b[3]);
    }
  }
  float largest[2] = {row.largest[0], row.largest[1]};
#pragma unroll
  for (int j = 0; j < COUNT; ++j)
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int key = (FIRST + j) * TILE + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
      float& score = s[j][i / 4][i % 4];
      score = key < tokens ? score * scale_log2 : -INFINITY;
      largest[i % 4 / 2] = fmaxf(largest[i % 4 / 2], score);
    }
  float sum[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) largest[half] = largest_of_row(largest[half]);
#pragma unroll
  for (int j = 0; j < COUNT; ++j) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& score = s[j][i / 4][i % 4];
      score = exp2_approx(score - largest[i % 4 / 2]);
      sum[i % 4 / 2] += score;
    }
    as_fragment_a<T>(row.p[FIRST + j], s[j][0], s[j][1]);
    __syncwarp();
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    row.first_factor[half] = FIRST == 0 ? 1 : exp2_approx(row.largest[half] - largest[half]);
    row.sum[half] = row.sum[half] * row.first_factor[half] + sum_of_row(sum[half]);
    row.largest[half] = largest[half];
  }
}

template <typename T, int WIDTH, int KEY_TILES>
__device__ __forceinline__ void powers_of_scores(Powers<KEY_TILES>& row, SharedRows<WIDTH> q, SharedRows<WIDTH> k,
                                                 int tile, int tokens, float scale_log2) {
  constexpr int GROUP = Powers<KEY_TILES>::GROUP;
  row.largest[0] = row.largest[1] = -INFINITY;
  row.sum[0] = row.sum[1] = 0;
  powers_of_group<T, WIDTH, KEY_TILES, 0, GROUP>(row, q, k, tile, tokens, scale_log2);
  if constexpr (GROUP < KEY_TILES)
    powers_of_group<T, WIDTH, KEY_TILES, GROUP, KEY_TILES - GROUP>(row, q, k, tile, tokens, scale_log2);
}

// o[16, WIDTH] = powers times v, not yet divided by their sum.
template <typename T, int WIDTH, int KEY_TILES>
__device__ __forceinline__ void product_with_values(float (&o)[WIDTH / 8][4], const Powers<KEY_TILES>& row,
                                                    SharedRows<WIDTH> v) {
#pragma unroll
  for (int j = 0; j < KEY_TILES; ++j) {
    if (j > 0 && j == row.GROUP)
#pragma unroll
      for (int n = 0; n < WIDTH / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[n][i] *= row.first_factor[i / 2];
    __syncwarp();
    add_product<T>(o, row.p[j], v, j);
  }
}

// Stores factor * sums as the 16 rows of `tile` that are within `tokens`, 64 bytes of a row at a time. A lane holds 4
// bytes of each of four neighbouring D: the four lanes of a row exchange them, so that each stores 16 bytes of one.
template <typename T, int WIDTH>
__device__ __forceinline__ void store_rows(const float (&sums)[WIDTH / 8][4], float factor0, float factor1, T* to,
                                           int64_t stride, int tile, int tokens) {
  const int lane = threadIdx.x % WARP, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = tile * TILE + half * 8 + lane / 4;
    const float factor = half == 0 ? factor0 : factor1;
#pragma unroll
    for (int group = 0; group < WIDTH / 32; ++group) {
      uint32_t v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&d)[4] = sums[group * 4 + i];
        v[i] = pack<T>(d[2 * half] * factor, d[2 * half + 1] * factor);
      }
      // Transpose [lane t][D i]: exchange with the neighbour, then with the pair beside.
#pragma unroll
      for (int distance = 1; distance <= 2; ++distance) {
        const bool upper = t & distance;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int low = distance == 1 ? 2 * i : i, high = low + distance;
          const uint32_t other = __shfl_xor_sync(0xFFFFFFFF, upper ? v[low] : v[high], distance);
          v[low] = upper ? other : v[low];
          v[high] = upper ? v[high] : other;
        }
      }
      if (row < tokens)
        *reinterpret_cast<uint4*>(to + row * stride + group * 32 + t * 8) = make_uint4(v[0], v[1], v[2], v[3]);
    }
  }
}

template <typename T>
__device__ __forceinline__ T* head_of(const Heads& x, int image, int head) {
  return static_cast<T*>(x.data) + image * x.batch_stride + head * x.head_stride;
}

// Calls run(T{}, std::integral_constant<int, WIDTH>{}) for the dtype and the width of a head.
template <typename Run>
cudaError_t for_dtype_and_width(const AttentionArgs& args, Run run) {
  const bool bf16 = args.dtype == Dtype::bf16;
  if (args.head_dim == 64)
    return bf16 ? run(Bf16{}, std::integral_constant<int, 64>{}) : run(Fp16{}, std::integral_constant<int, 64>{});
  return bf16 ? run(Bf16{}, std::integral_constant<int, 32>{}) : run(Fp16{}, std::integral_constant<int, 32>{});
}

}  // namespace fastnull::cuda
