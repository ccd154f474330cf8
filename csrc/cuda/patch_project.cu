// Projection of image noise on the nullspace of a patch embedding, from and to NCHW (fastnull/ops/patch_project.py).
//
// Two products on the tensor cores, with the patches gathered in the loads of the first and scattered in the stores of
// the second:
//     coefficients = v Q          [patches, width] x [width, rank]
//     result = coefficients Q^T   or v minus that; plus images
//
// The embedding must not see the result: ||W P v|| <= 1e-6 ||W|| ||v||, so products are as exact as float. Each operand
// is split into two tf32 numbers, x = high + low up to 2^-22 x, and three products are added: low high, high low, high
// high. The tensor cores cut their sums off instead of rounding, always towards 0, which over a whole row adds up:
// they add 8 terms at a time, and ordinary float instructions add the rest. Leak at patches of 16 and rank 384,
// emulated: 1e-7; with all sums in the tensor cores 2e-6.
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"

namespace fastnull::cuda {
namespace {

// A block makes PATCHES x COLUMNS values in steps of STEP terms; its 8 warps stand 4 x 2 and make 32 x 32 each.
constexpr int PATCHES = 128, COLUMNS = 64, STEP = 32, BLOCK = 256;
// Rows in shared memory, padded so that the 32 lanes of a warp address 32 banks.
constexpr int TERMS_ROW = STEP + 4;      // of [PATCHES][STEP] and of [COLUMNS][STEP]
constexpr int RIGHT_ROW = COLUMNS + 8;   // of [STEP][COLUMNS]
constexpr int RESULT_ROW = COLUMNS + 8;  // of [PATCHES][COLUMNS], after the product, in the memory of both
constexpr int LEFTS = PATCHES * STEP / BLOCK, RIGHTS = STEP * COLUMNS / BLOCK;  // values that a thread loads

// Offset of the patch of a row in an image tensor.
__device__ __forceinline__ int64_t patch_at(const PatchProjectArgs& args, const Image& image, int64_t row) {
  const int64_t in_batch = row / (args.grid_h * args.grid_w);
  const int within = int(row % (args.grid_h * args.grid_w));
  return in_batch * image.strides[0] + within / args.grid_w * args.patch * image.strides[2] +
         within % args.grid_w * args.patch * image.strides[3];
}

// Offset of a value in its patch: channel, row, column, as in the embedding's weight.
__device__ __forceinline__ int64_t column_at(const PatchProjectArgs& args, const Image& image, int column) {
  const int p = args.patch;
  return column / (p * p) * image.strides[1] + column / p % p * image.strides[2] + column % p * image.strides[3];
}

struct Split {
  uint32_t high, low;
};
__device__ __forceinline__ Split split(float x) {
  const uint32_t high = to_tf32(x);
  return {high, to_tf32(x - __uint_as_float(high))};
}

// sums += left[PATCHES, inner] right[inner, COLUMNS], both given by functions that return 0 outside.
template <typename Left, typename Right>
__device__ __forceinline__ void add_product(float (&sums)[2][4][4], int inner, Left left_value, Right right_value) {
  float* left = static_cast<float*>(dynamic_shared());
  float* right = left + PATCHES * TERMS_ROW;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int row0 = warp / 2 * 32, column0 = warp % 2 * 32;
  float next_left[LEFTS], next_right[RIGHTS];
  const auto fetch = [&](int start) {
    left_value(start, next_left);
    right_value(start, next_right);
  };
  fetch(0);
  for (int start = 0; start < inner; start += STEP) {
    __syncthreads();  // the previous step has been read
#pragma unroll
    for (int i = 0; i < LEFTS; ++i) left[(threadIdx.x / STEP + i * (BLOCK / STEP)) * TERMS_ROW + lane] = next_left[i];
#pragma unroll
    for (int i = 0; i < RIGHTS; ++i) {
      const int at = threadIdx.x + i * BLOCK;
      right[Right::place(Right::inner_of(at), Right::column_of(at))] = next_right[i];
    }
    __syncthreads();
    if (start + STEP < inner) fetch(start + STEP);  // loads run while this step is computed
#pragma unroll 1  // unrolled, registers run out
    for (int k = 0; k < STEP; k += 8) {
      uint32_t a_high[2][4], a_low[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Split x = split(left[(row0 + m * 16 + g + i % 2 * 8) * TERMS_ROW + k + t + i / 2 * 4]);
          a_high[m][i] = x.high, a_low[m][i] = x.low;
        }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint32_t b_high[2], b_low[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Split x = split(right[Right::place(k + t + i * 4, column0 + n * 8 + g)]);
          b_high[i] = x.high, b_low[i] = x.low;
        }
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          float part[4] = {};
          mma_tf32(part, a_low[m], b_high);
          mma_tf32(part, a_high[m], b_low);
          mma_tf32(part, a_high[m], b_high);
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[m][n][i] += part[i];
        }
      }
    }
  }
}

// Puts the block's sums into shared memory, [PATCHES][RESULT_ROW], so that neighbouring threads store neighbours.
__device__ __forceinline__ const float* through_shared(const float (&sums)[2][4][4]) {
  float* result = static_cast<float*>(dynamic_shared());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncthreads();  // the last step has been read
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp / 2 * 32 + m * 16 + half * 8 + lane / 4, column = warp % 2 * 32 + n * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(result + row * RESULT_ROW + column) =
            make_float2(sums[m][n][2 * half], sums[m][n][2 * half + 1]);
      }
  __syncthreads();
  return result;
}

// Where the block's patches begin in an image tensor, [PATCHES] in shared memory.
__device__ __forceinline__ void find_patches(int64_t* patches_at, const PatchProjectArgs& args, const Image& image,
                                             int64_t row0) {
  if (threadIdx.x < PATCHES && row0 + threadIdx.x < args.patches)
    patches_at[threadIdx.x] = patch_at(args, image, row0 + threadIdx.x);
}

// The block's patches of the noise, [PATCHES, width]. Each thread has one term of a step and every 8th patch.
template <typename T>
struct Gathered {
  const PatchProjectArgs& args;
  const int64_t* patches_at;
  int patches;  // of the block

  __device__ __forceinline__ void operator()(int start, float (&values)[LEFTS]) const {
    const int column = start + threadIdx.x % STEP;
    const T* from = static_cast<const T*>(args.noise.data) + column_at(args, args.noise, column);
#pragma unroll
    for (int i = 0; i < LEFTS; ++i) {
      const int row = threadIdx.x / STEP + i * (BLOCK / STEP);
      values[i] = column < args.width && row < patches ? to_float(from[patches_at[row]]) : 0;
    }
  }
};

// The block's rows of the coefficients, [PATCHES, rank].
struct Coefficients {
  const PatchProjectArgs& args;
  const float* rows;
  int patches;

  __device__ __forceinline__ void operator()(int start, float (&values)[LEFTS]) const {
    const int r = start + threadIdx.x % STEP;
#pragma unroll
    for (int i = 0; i < LEFTS; ++i) {
      const int row = threadIdx.x / STEP + i * (BLOCK / STEP);
      values[i] = r < args.rank && row < patches ? rows[row * args.rank + r] : 0;
    }
  }
};

// Columns `first` on of the basis [width, rank]: neighbouring threads have neighbouring columns.
struct Basis {
  const PatchProjectArgs& args;
  int first;
  static __host__ __device__ constexpr int inner_of(int at) { return at / COLUMNS; }
  static __host__ __device__ constexpr int column_of(int at) { return at % COLUMNS; }
  static __host__ __device__ constexpr int place(int inner, int column) { return inner * RIGHT_ROW + column; }

  __device__ __forceinline__ void operator()(int start, float (&values)[RIGHTS]) const {
#pragma unroll
    for (int i = 0; i < RIGHTS; ++i) {
      const int k = start + inner_of(threadIdx.x + i * BLOCK), r = first + column_of(threadIdx.x + i * BLOCK);
      values[i] = k < args.width && r < args.rank ? args.basis[k * args.rank + r] : 0;
    }
  }
};

// Columns `first` on of its transpose [rank, width]: neighbouring threads have neighbouring terms.
struct BasisTransposed {
  const PatchProjectArgs& args;
  int first;
  static __host__ __device__ constexpr int inner_of(int at) { return at % STEP; }
  static __host__ __device__ constexpr int column_of(int at) { return at / STEP; }
  static __host__ __device__ constexpr int place(int inner, int column) { return column * TERMS_ROW + inner; }

  __device__ __forceinline__ void operator()(int start, float (&values)[RIGHTS]) const {
#pragma unroll
    for (int i = 0; i < RIGHTS; ++i) {
      const int r = start + inner_of(threadIdx.x + i * BLOCK), k = first + column_of(threadIdx.x + i * BLOCK);
      values[i] = k < args.width && r < args.rank ? args.basis[k * args.rank + r] : 0;
    }
  }
};

// Lanes of a warp that address the fullest bank of shared memory, where lane i addresses the word word_of(i).
template <typename WordOf>
constexpr int lanes_in_fullest_bank(WordOf word_of) {
  int lanes[32] = {}, most = 0;
  for (int lane = 0; lane < 32; ++lane) {
    const int count = ++lanes[word_of(lane) % 32];
    most = count > most ? count : most;
  }
  return most;
}
// The loads and stores of `right` in add_product. `left` has the pattern of BasisTransposed.
template <typename Right>
constexpr bool no_bank_conflicts() {
  return lanes_in_fullest_bank([](int lane) { return Right::place(Right::inner_of(lane), Right::column_of(lane)); }) ==
             1 &&
         lanes_in_fullest_bank([](int lane) { return Right::place(lane % 4, lane / 4); }) == 1;
}
static_assert(no_bank_conflicts<Basis>() && no_bank_conflicts<BasisTransposed>());
static_assert(lanes_in_fullest_bank([](int lane) { return Basis::place(lane, 0); }) == 8, "as BasisTransposed would");

__device__ __forceinline__ int patches_of_block(const PatchProjectArgs& args, int64_t row0) {
  return args.patches - row0 < PATCHES ? int(args.patches - row0) : PATCHES;
}

template <typename T>
__global__ void __launch_bounds__(BLOCK, 2) coefficients_kernel(const PatchProjectArgs args) {
  __shared__ int64_t noise_at[PATCHES];
  const int tiles = (args.rank + COLUMNS - 1) / COLUMNS, column0 = blockIdx.x % tiles * COLUMNS;
  const int64_t row0 = int64_t(blockIdx.x / tiles) * PATCHES;
  const int patches = patches_of_block(args, row0);
  find_patches(noise_at, args, args.noise, row0);
  __syncthreads();
  float sums[2][4][4] = {};
  add_product(sums, args.width, Gathered<T>{args, noise_at, patches}, Basis{args, column0});
  const float* result = through_shared(sums);
  const int column = threadIdx.x % COLUMNS;
  if (column0 + column >= args.rank) return;
  for (int row = threadIdx.x / COLUMNS; row < patches; row += BLOCK / COLUMNS)
    args.coefficients[(row0 + row) * args.rank + column0 + column] = result[row * RESULT_ROW + column];
}

template <typename T>
__global__ void __launch_bounds__(BLOCK, 2) result_kernel(const PatchProjectArgs args) {
  __shared__ int64_t noise_at[PATCHES], images_at[PATCHES], out_at[PATCHES];
  const int tiles = (args.width + COLUMNS - 1) / COLUMNS, column0 = blockIdx.x % tiles * COLUMNS;
  const int64_t row0 = int64_t(blockIdx.x / tiles) * PATCHES;
  const int patches = patches_of_block(args, row0);
  const bool add = args.images.data != nullptr;
  find_patches(out_at, args, args.out, row0);
  if (args.complement) find_patches(noise_at, args, args.noise, row0);
  if (add) find_patches(images_at, args, args.images, row0);
  float sums[2][4][4] = {};
  add_product(sums, args.rank, Coefficients{args, args.coefficients + row0 * args.rank, patches},
              BasisTransposed{args, column0});
  const float* result = through_shared(sums);
  const int column = threadIdx.x % COLUMNS;
  if (column0 + column >= args.width) return;
  const auto column_of = [&](const Image& image) {
    return static_cast<T*>(image.data) + column_at(args, image, column0 + column);
  };
  const T *noise = column_of(args.noise), *images = add ? column_of(args.images) : nullptr;
  T* out = column_of(args.out);
  // `out` may be the memory of noise or images: this launch reads each of their values here alone, where it writes it.
  for (int row = threadIdx.x / COLUMNS; row < patches; row += BLOCK / COLUMNS) {
    float value = result[row * RESULT_ROW + column];
    if (args.complement) value = to_float(noise[noise_at[row]]) - value;
    if (add) value += to_float(images[images_at[row]]);
    out[out_at[row]] = from_float<T>(value);
  }
}

template <typename T>
cudaError_t launch_both(const PatchProjectArgs& args, cudaStream_t stream) {
  static_assert(COLUMNS * TERMS_ROW == STEP * RIGHT_ROW);
  const size_t product = PATCHES * TERMS_ROW + STEP * RIGHT_ROW, result = PATCHES * RESULT_ROW;
  const size_t shared = (product > result ? product : result) * sizeof(float);
  const auto blocks = [&](int columns) {
    return unsigned((args.patches + PATCHES - 1) / PATCHES * ((columns + COLUMNS - 1) / COLUMNS));
  };
  if (args.rank > 0) {  // of an empty basis the sums are 0
    const cudaError_t error = launch(coefficients_kernel<T>, blocks(args.rank), BLOCK, shared, stream, args);
    if (error != cudaSuccess) return error;
  }
  return launch(result_kernel<T>, blocks(args.width), BLOCK, shared, stream, args);
}

}  // namespace

cudaError_t patch_project(const PatchProjectArgs& args, cudaStream_t stream) {
  if (args.dtype == Dtype::f32) return launch_both<float>(args, stream);
  return args.dtype == Dtype::bf16 ? launch_both<Bf16>(args, stream) : launch_both<Fp16>(args, stream);
}

}  // namespace fastnull::cuda
