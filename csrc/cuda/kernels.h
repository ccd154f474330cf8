// Arguments of the launchers: plain pointers, sizes and strides in elements. Nothing here depends on torch.
//
// A launcher puts its kernels on a stream and returns; it neither waits nor allocates. binding.cpp
// checks the arguments.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastnull::cuda {

enum class Dtype { f32, bf16, f16 };

// A [B, N, H, d] tensor, or the q, k or v part of a packed one: last dimension dense, rows 16-byte aligned.
struct Heads {
  void* data;
  int64_t batch_stride, token_stride, head_stride;
};

// Keys and values of a head must fit in shared memory, scores of 16 queries in a warp's registers.
constexpr int LARGEST_TOKENS = 272;

struct AttentionArgs {
  Dtype dtype;  // bf16 or f16
  Heads q, k, v;
  Heads o;           // forward: written
  Heads grad_o;      // backward: read
  Heads dq, dk, dv;  // backward: written
  int batch, heads, tokens, head_dim;  // head_dim 32 or 64
  float scale;
};
cudaError_t attention(const AttentionArgs&, cudaStream_t);
cudaError_t attention_dqkv(const AttentionArgs&, cudaStream_t);

struct Image {
  void* data;          // [B, C, H, W], any strides
  int64_t strides[4];  // of batch, channel, row, column
};

struct PatchProjectArgs {
  Dtype dtype;          // of noise, images and out
  Image noise;
  Image images;         // added to the result; data may be null
  Image out;            // may be the memory of noise or of images
  const float* basis;   // [width, rank] dense, width = C p^2
  float* coefficients;  // [patches, rank] dense, scratch
  int64_t patches;      // B * grid_h * grid_w
  int grid_h, grid_w, patch, width, rank;
  bool complement;      // noise minus its part in the span of the basis, instead of that part
};
cudaError_t patch_project(const PatchProjectArgs&, cudaStream_t);

struct ObjectiveArgs {
  Dtype clean_dtype, noisy_dtype;
  const void* clean;
  const void* noisy;
  int64_t clean_stride, noisy_stride;
  int rows, clean_rows, classes;  // noisy row i belongs to clean row i % clean_rows
  bool squared;
  float scale;         // factor of the cotangent
  float* loss;         // [rows]
  float* cotangent;    // [rows, classes] dense
  float* influence;    // [rows]
  // Means over the rows of each group, in the same launch; null: not wanted.
  int groups;
  float* mean_loss;       // [groups]
  float* mean_influence;  // [groups]
  unsigned* tickets;      // [groups], scratch
};
cudaError_t noise_objective(const ObjectiveArgs&, cudaStream_t);

struct AdamWArgs {
  Dtype grad_dtype;
  float* noise;  // [noises, width], as all of these dense
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  int64_t* steps;     // [noises], incremented by the launch
  const float* gate;  // [noises]: 0 stays as it is, +1 descends, -1 ascends
  const double* lr;   // [noises]
  int64_t width;
  int noises;
  double beta1, beta2, eps, weight_decay;
};
cudaError_t adamw_step(const AdamWArgs&, cudaStream_t);

// Elements of a noise per block of the steps.
constexpr int CHUNK = 2048;

struct DirectStepArgs {
  Dtype grad_dtype;
  float* noise;  // [noises, width] dense
  const void* grad;
  double* square_sums;  // [noises, ceil(width / CHUNK)], scratch; null: along the sign of the gradient
  const float* gate;
  const double* lr;
  int64_t width;
  int noises;
};
cudaError_t direct_step(const DirectStepArgs&, cudaStream_t);

}  // namespace fastnull::cuda
