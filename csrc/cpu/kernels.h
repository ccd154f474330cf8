// The arguments of the kernels, and the table through which they are called.
//
// A kernel is compiled once for each processor level (namespace FASTNULL_LEVEL) and does not depend on torch: it
// gets plain pointers, and sizes and strides in elements, in one struct. `begin, end` is the range of its units of work
// (rows, heads, ...) for one thread. This header holds no function bodies: an inline function shared by the
// levels would be merged by the linker, and the merged one could be the AVX-512 one on a machine without it.
#pragma once

#include <cstdint>

namespace fastnull {

enum class Dtype : int32_t { f32, bf16 };

// Rows of a [outer, inner, width] tensor whose last dimension is dense: row m is at (m / inner, m % inner).
struct Rows {
  void* data;
  int64_t inner;
  int64_t outer_stride;
  int64_t inner_stride;
};

struct LayerNormArgs {
  Dtype dtype;
  Rows x, y;
  const float* weight;  // [width] or null
  const float* bias;    // [width] or null
  const float* shift;   // [width] or null: added to x
  float* mean;          // [rows] or null
  float* rstd;          // [rows]
  int64_t width;
  float eps;
};

struct LayerNormDxArgs {
  Dtype dtype;
  Rows dxhat, x, dres, dx;  // dres.data may be null; dx may be the memory of dres or of dxhat
  const float* mean;        // null: x is normalised
  const float* rstd;
  int64_t width;
};

struct GeluArgs {
  Dtype dtype;
  Rows z, h;          // h may be the memory of z
  const float* bias;  // [width] or null
  void* derivative;   // [rows, width] dense: 8-bit codes if `coded` (always for bf16), else float; null: not wanted
  int64_t width;
  bool tanh;
  bool coded;
};

struct DgeluArgs {
  Dtype dtype;
  Rows g;  // in place
  const void* derivative;  // as in GeluArgs
  int64_t width;
  bool coded;
};

// A [B, N, H, d] tensor (or the q, k or v part of a packed one) with a dense last dimension.
struct Heads {
  void* data;
  int64_t batch_stride, token_stride, head_stride;
};

struct AttentionArgs {
  Dtype dtype;
  Heads q, k, v;
  Heads o;               // forward: out
  Heads grad_o;          // backward: in
  Heads dq, dk, dv;      // backward: out
  int64_t tokens, heads, head_dim;
  float scale;
  void* workspace;       // `workspace_bytes` of attention for each thread that calls, 64-byte aligned
};

struct PatchImage {
  void* data;  // [B, C, H, W]
  int64_t strides[4];
};

// Patches [first, first + rows) of an NCHW batch, against a dense float panel [rows, C * p * p].
struct PatchArgs {
  Dtype dtype;
  PatchImage noise;
  PatchImage images;  // scatter: added to the result; data may be null
  PatchImage out;     // scatter only; may be the memory of noise or of images
  int64_t channels, patch, grid_h, grid_w;
  int64_t first;      // index in the batch of the panel's first patch
  float* panel;
  bool complement;    // scatter: noise - panel instead of panel
};

enum class Objective : int32_t { l2, l2_squared };

struct ObjectiveArgs {
  Dtype clean_dtype, noisy_dtype;
  const void* clean;
  const void* noisy;
  int64_t clean_rows, clean_stride, noisy_stride;  // noisy row i belongs to clean row i % clean_rows
  int64_t classes;
  Objective kind;
  float scale;        // factor of the cotangent
  float* loss;        // [rows]
  float* influence;   // [rows]
  float* cotangent;   // [rows, classes] dense
};

struct AdamWArgs {
  Dtype grad_dtype;
  float* noise;          // [noises, width], all dense
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  const float* gate;     // [noises]: 0 stays as it is, +1 descends, -1 ascends
  const double* lr;      // [noises]
  const double* bias_correction;  // [noises, 2]: 1 - beta^step of both moments, after this step
  int64_t width;
  double beta1, beta2, eps, weight_decay;
};

struct DirectStepArgs {
  Dtype grad_dtype;
  float* noise;
  const void* grad;
  const float* gate;
  const double* lr;
  int64_t width;
  bool sign;             // false: along g / ||g||
};

struct Kernels {
  const char* level;
  void (*layer_norm)(const LayerNormArgs&, int64_t begin, int64_t end);        // rows
  void (*layer_norm_dx)(const LayerNormDxArgs&, int64_t begin, int64_t end);   // rows
  void (*gelu)(const GeluArgs&, int64_t begin, int64_t end);                   // rows
  void (*dgelu)(const DgeluArgs&, int64_t begin, int64_t end);                 // rows
  int64_t (*attention_workspace)(int64_t tokens, int64_t head_dim, bool backward);  // bytes for one thread
  void (*attention)(const AttentionArgs&, int64_t begin, int64_t end);         // (image, head) pairs
  void (*attention_dqkv)(const AttentionArgs&, int64_t begin, int64_t end);    // (image, head) pairs
  void (*patch_gather)(const PatchArgs&, int64_t begin, int64_t end);          // rows of the panel
  void (*patch_scatter)(const PatchArgs&, int64_t begin, int64_t end);         // rows of the panel
  void (*objective)(const ObjectiveArgs&, int64_t begin, int64_t end);         // rows
  void (*adamw)(const AdamWArgs&, int64_t noise, int64_t begin, int64_t end);  // elements of one noise
  void (*direct_step)(const DirectStepArgs&, int64_t begin, int64_t end);      // noises
};

// The table in use: the best level that this processor has, or the one that set_level chose.
const Kernels& kernels();
// Names of the levels that were built and that this processor has, most portable first, as "portable,avx2".
const char* available_levels();
// False if there is no such level here.
bool set_level(const char* name);

}  // namespace fastnull
