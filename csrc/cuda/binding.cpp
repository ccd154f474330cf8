// The ops torch.ops.fastnull_cuda.*, with the arguments of torch.ops.fastnull.*: checks, and translation into the plain
// structs of kernels.h. Python chooses between these and Triton for the CUDA key of fastnull::*.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <optional>

#include "cuda/device.h"
#include "cuda/kernels.h"

namespace fastnull::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t MOST_BLOCKS = (int64_t(1) << 31) - 1, MOST_BLOCKS_Y = 65535;

Dtype dtype_of(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "fastnull: ", name, " must be float32, bfloat16 or float16 for the CUDA kernels");
  return type == ScalarType::Float ? Dtype::f32 : type == ScalarType::BFloat16 ? Dtype::bf16 : Dtype::f16;
}

void check_dtype(const Tensor& t, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == type, "fastnull: ", name, " has the wrong dtype");
}

void check_same_shape(const Tensor& t, const Tensor& like, const char* name) {
  bool same = t.dim() == like.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == like.size(i);
  STD_TORCH_CHECK(same, "fastnull: ", name, " has another shape than the input");
}

void check_launched(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, "fastnull: ", op, ": ", cudaGetErrorString(error));
}

// A dense tensor of this dtype and number of elements.
template <typename T>
T* dense(const Tensor& t, ScalarType type, int64_t numel, const char* name) {
  check_dtype(t, type, name);
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == numel, "fastnull: ", name, " must be dense with ", numel,
                  " elements, it has ", t.numel());
  return static_cast<T*>(t.data_ptr());
}

// [B, N, H, d] in a tensor, of which the head axis is given; `offset` elements from its beginning.
Heads heads_of(const Tensor& t, int64_t head_axis, int64_t offset, const char* name) {
  const int64_t last = t.dim() - 1;
  bool aligned = t.stride(last) == 1 && offset % 8 == 0 && uintptr_t(t.data_ptr()) % 16 == 0;
  for (int64_t i = 0; i < last; ++i) aligned = aligned && (t.stride(i) % 8 == 0 || t.size(i) == 1);
  STD_TORCH_CHECK(aligned, "fastnull: ", name,
                  " must be dense in its last dimension, and its address and other strides multiples of 16 bytes");
  return {static_cast<char*>(t.data_ptr()) + 2 * offset, t.stride(0), t.stride(1), t.stride(head_axis)};
}

void check_packed(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 5 && t.size(2) == 3, "fastnull: ", name, " must have shape [B, N, 3, H, d]");
}

Heads packed_part(const Tensor& t, int64_t part, const char* name) { return heads_of(t, 3, part * t.stride(2), name); }

AttentionArgs attention_arguments(const Tensor& qkv, double scale) {
  check_packed(qkv, "qkv");
  const int64_t tokens = qkv.size(1), width = qkv.size(4);
  AttentionArgs args{};
  args.dtype = dtype_of(qkv, "qkv");
  STD_TORCH_CHECK(args.dtype != Dtype::f32, "fastnull: qkv must be bfloat16 or float16 for the CUDA attention");
  STD_TORCH_CHECK(width == 32 || width == 64, "fastnull: the CUDA attention has heads of 32 or 64, not ", width);
  STD_TORCH_CHECK(tokens >= 1 && tokens <= LARGEST_TOKENS, "fastnull: the CUDA attention has 1 to ", LARGEST_TOKENS,
                  " tokens, not ", tokens);
  STD_TORCH_CHECK(qkv.size(0) * qkv.size(3) <= MOST_BLOCKS, "fastnull: too many images and heads for one launch");
  args.q = packed_part(qkv, 0, "qkv");
  args.k = packed_part(qkv, 1, "qkv");
  args.v = packed_part(qkv, 2, "qkv");
  args.batch = int(qkv.size(0));
  args.tokens = int(tokens);
  args.heads = int(qkv.size(3));
  args.head_dim = int(width);
  args.scale = float(scale);
  return args;
}

Heads check_heads(const Tensor& t, const Tensor& qkv, const char* name) {
  check_dtype(t, qkv.scalar_type(), name);
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == qkv.size(0) && t.size(1) == qkv.size(1) && t.size(2) == qkv.size(3) &&
                      t.size(3) == qkv.size(4),
                  "fastnull: ", name, " must have shape [B, N, H, d] of qkv");
  return heads_of(t, 2, 0, name);
}

void attention_out(const Tensor& qkv, double scale, const Tensor& o) {
  if (qkv.numel() == 0) return;
  AttentionArgs args = attention_arguments(qkv, scale);
  args.o = check_heads(o, qkv, "o");
  const OnDevice device(qkv);
  check_launched(attention(args, device.stream), "attention");
}

void attention_dqkv_out(const Tensor& qkv, const Tensor& grad_o, double scale, const Tensor& dqkv) {
  if (qkv.numel() == 0) return;
  AttentionArgs args = attention_arguments(qkv, scale);
  args.grad_o = check_heads(grad_o, qkv, "grad_o");
  check_dtype(dqkv, qkv.scalar_type(), "dqkv");
  check_same_shape(dqkv, qkv, "dqkv");
  args.dq = packed_part(dqkv, 0, "dqkv");
  args.dk = packed_part(dqkv, 1, "dqkv");
  args.dv = packed_part(dqkv, 2, "dqkv");
  const OnDevice device(qkv);
  check_launched(attention_dqkv(args, device.stream), "attention_dqkv");
}

Image image_of(const Tensor& t, const Tensor& like, const char* name) {
  check_dtype(t, like.scalar_type(), name);
  check_same_shape(t, like, name);
  return {t.data_ptr(), {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}};
}

void patch_project_out(const Tensor& noise, const Tensor& basis, int64_t patch, bool complement,
                       const std::optional<Tensor>& images, const Tensor& out) {
  STD_TORCH_CHECK(noise.dim() == 4 && patch >= 1 && noise.size(2) % patch == 0 && noise.size(3) % patch == 0,
                  "fastnull: noise must have shape [B, C, H, W], H and W multiples of patch_size >= 1");
  if (noise.numel() == 0) return;
  PatchProjectArgs args{};
  args.dtype = dtype_of(noise, "noise");
  args.noise = image_of(noise, noise, "noise");
  if (images.has_value()) args.images = image_of(*images, noise, "images");
  args.out = image_of(out, noise, "out");
  args.patch = int(patch);
  args.grid_h = int(noise.size(2) / patch);
  args.grid_w = int(noise.size(3) / patch);
  args.patches = noise.size(0) * args.grid_h * args.grid_w;
  args.width = int(noise.size(1) * patch * patch);
  args.complement = complement;
  STD_TORCH_CHECK(basis.dim() == 2 && basis.size(0) == args.width, "fastnull: basis must have shape [", args.width,
                  ", n]");
  STD_TORCH_CHECK(basis.numel() < MOST_BLOCKS && args.patches < MOST_BLOCKS,
                  "fastnull: basis or number of patches too large for the CUDA patch_project");
  args.basis = dense<const float>(basis, ScalarType::Float, basis.numel(), "basis");
  args.rank = int(basis.size(1));
  const OnDevice device(noise);
  const Tensor coefficients = torch::stable::new_empty(basis, {args.patches, basis.size(1)});
  args.coefficients = static_cast<float*>(coefficients.data_ptr());
  check_launched(patch_project(args, device.stream), "patch_project");
}

void run_objective(const Tensor& clean, const Tensor& noisy, bool squared, double scale, const Tensor& loss,
                   const Tensor& cotangent, const Tensor& influence, ObjectiveArgs args) {
  STD_TORCH_CHECK(clean.dim() == 2 && noisy.dim() == 2 && clean.size(1) == noisy.size(1) &&
                      (noisy.size(1) <= 1 || (clean.stride(1) == 1 && noisy.stride(1) == 1)),
                  "fastnull: clean and noisy must have shape [B, K], dense in K, with one K");
  const int64_t rows = noisy.size(0), classes = noisy.size(1), clean_rows = clean.size(0);
  if (noisy.numel() == 0) return;
  STD_TORCH_CHECK(clean_rows > 0 && rows % clean_rows == 0 && rows <= MOST_BLOCKS && classes <= MOST_BLOCKS,
                  "fastnull: the rows of noisy must be a multiple of those of clean");
  args.clean_dtype = dtype_of(clean, "clean");
  args.noisy_dtype = dtype_of(noisy, "noisy");
  args.clean = clean.data_ptr();
  args.noisy = noisy.data_ptr();
  args.clean_stride = clean.stride(0);
  args.noisy_stride = noisy.stride(0);
  args.rows = int(rows);
  args.clean_rows = int(clean_rows);
  args.classes = int(classes);
  args.squared = squared;
  args.scale = float(scale);
  args.loss = dense<float>(loss, ScalarType::Float, rows, "loss");
  args.cotangent = dense<float>(cotangent, ScalarType::Float, rows * classes, "cotangent");
  args.influence = dense<float>(influence, ScalarType::Float, rows, "influence");
  const OnDevice device(noisy);
  check_launched(noise_objective(args, device.stream), "noise_objective");
}

void noise_objective_out(const Tensor& clean, const Tensor& noisy, bool squared, double scale, const Tensor& loss,
                         const Tensor& cotangent, const Tensor& influence) {
  run_objective(clean, noisy, squared, scale, loss, cotangent, influence, {});
}

// noise_objective_out, and in the same launch the means over the rows of each group.
void noise_objective_means_out(const Tensor& clean, const Tensor& noisy, bool squared, double scale,
                               const Tensor& loss, const Tensor& cotangent, const Tensor& influence,
                               const Tensor& mean_loss, const Tensor& mean_influence) {
  const int64_t groups = mean_loss.numel();
  if (noisy.size(0) == 0) {  // no mean of nothing
    torch::stable::fill_(mean_loss, NAN);
    torch::stable::fill_(mean_influence, NAN);
    return;
  }
  STD_TORCH_CHECK(groups > 0 && loss.numel() % groups == 0, "fastnull: mean_loss has ", groups,
                  " elements, which must divide the ", loss.numel(), " rows of noisy");
  ObjectiveArgs args{};
  args.groups = int(groups);
  args.mean_loss = dense<float>(mean_loss, ScalarType::Float, groups, "mean_loss");
  args.mean_influence = dense<float>(mean_influence, ScalarType::Float, groups, "mean_influence");
  const Tensor tickets = torch::stable::new_empty(loss, {groups}, ScalarType::Int);  // held until the launch
  args.tickets = static_cast<unsigned*>(tickets.data_ptr());
  run_objective(clean, noisy, squared, scale, loss, cotangent, influence, args);
}

// Noise [M, ...] as M rows, each with blocks of its own.
void check_noises(const Tensor& noise, const char* op) {
  STD_TORCH_CHECK(noise.size(0) <= MOST_BLOCKS_Y, "fastnull: ", op, " takes at most ", MOST_BLOCKS_Y,
                  " noises at once, not ", noise.size(0));
}

void adamw_step_(const Tensor& noise, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                 const Tensor& steps, const Tensor& gate, const Tensor& lr, double beta1, double beta2, double eps,
                 double weight_decay) {
  const int64_t total = noise.numel();
  if (total == 0) return;
  check_noises(noise, "adamw_step");
  AdamWArgs args{};
  args.grad_dtype = dtype_of(grad, "grad");
  args.noise = dense<float>(noise, ScalarType::Float, total, "noise");
  args.grad = dense<void>(grad, grad.scalar_type(), total, "grad");
  args.exp_avg = dense<float>(exp_avg, ScalarType::Float, total, "exp_avg");
  args.exp_avg_sq = dense<float>(exp_avg_sq, ScalarType::Float, total, "exp_avg_sq");
  args.noises = int(noise.size(0));
  args.steps = dense<int64_t>(steps, ScalarType::Long, args.noises, "steps");
  args.gate = dense<const float>(gate, ScalarType::Float, args.noises, "gate");
  args.lr = dense<const double>(lr, ScalarType::Double, args.noises, "lr");
  args.width = total / args.noises;
  args.beta1 = beta1;
  args.beta2 = beta2;
  args.eps = eps;
  args.weight_decay = weight_decay;
  const OnDevice device(noise);
  check_launched(adamw_step(args, device.stream), "adamw_step");
}

void direct_step_(const Tensor& noise, const Tensor& grad, const Tensor& gate, const Tensor& lr, bool sign) {
  const int64_t total = noise.numel();
  if (total == 0) return;
  check_noises(noise, "direct_step");
  DirectStepArgs args{};
  args.grad_dtype = dtype_of(grad, "grad");
  args.noise = dense<float>(noise, ScalarType::Float, total, "noise");
  args.grad = dense<void>(grad, grad.scalar_type(), total, "grad");
  args.noises = int(noise.size(0));
  args.gate = dense<const float>(gate, ScalarType::Float, args.noises, "gate");
  args.lr = dense<const double>(lr, ScalarType::Double, args.noises, "lr");
  args.width = total / args.noises;
  const OnDevice device(noise);
  std::optional<Tensor> square_sums;  // held until the launch
  if (!sign) {
    square_sums = torch::stable::new_empty(noise, {args.noises, (args.width + CHUNK - 1) / CHUNK}, ScalarType::Double);
    args.square_sums = static_cast<double*>(square_sums->data_ptr());
  }
  check_launched(direct_step(args, device.stream), "direct_step");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTNULL_CUDA_LIBRARY, m) {
  m.def("attention_out(Tensor qkv, float scale, Tensor(a!) o) -> ()");
  m.def("attention_dqkv_out(Tensor qkv, Tensor grad_o, float scale, Tensor(a!) dqkv) -> ()");
  m.def(
      "patch_project_out(Tensor noise, Tensor basis, int patch_size, bool complement, Tensor? images, Tensor(a!) out)"
      " -> ()");
  m.def(
      "noise_objective_out(Tensor clean, Tensor noisy, bool squared, float scale, Tensor(a!) loss, Tensor(b!) "
      "cotangent, Tensor(c!) influence) -> ()");
  m.def(
      "noise_objective_means_out(Tensor clean, Tensor noisy, bool squared, float scale, Tensor(a!) loss, Tensor(b!) "
      "cotangent, Tensor(c!) influence, Tensor(d!) mean_loss, Tensor(e!) mean_influence) -> ()");
  m.def(
      "adamw_step_(Tensor(a!) noise, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) steps, Tensor "
      "gate, Tensor lr, float beta1, float beta2, float eps, float weight_decay) -> ()");
  m.def("direct_step_(Tensor(a!) noise, Tensor grad, Tensor gate, Tensor lr, bool sign) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(FASTNULL_CUDA_LIBRARY, FASTNULL_CUDA_KEY, m) {
  m.impl("attention_out", TORCH_BOX(&attention_out));
  m.impl("attention_dqkv_out", TORCH_BOX(&attention_dqkv_out));
  m.impl("patch_project_out", TORCH_BOX(&patch_project_out));
  m.impl("noise_objective_out", TORCH_BOX(&noise_objective_out));
  m.impl("noise_objective_means_out", TORCH_BOX(&noise_objective_means_out));
  m.impl("adamw_step_", TORCH_BOX(&adamw_step_));
  m.impl("direct_step_", TORCH_BOX(&direct_step_));
}

}  // namespace fastnull::cuda
