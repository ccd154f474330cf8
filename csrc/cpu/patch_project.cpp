// Binding of patch_project_out (fastnull/ops/patch_project.py): gather patches, two library products, scatter.
//
// The products are torch's (MKL's sgemm); this code moves patches from NCHW to a panel and back, without a copy
// of the unfolded batch.
#include <algorithm>

#include "cpu/binding.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name before torch 2.12
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace fastnull {
namespace {

// Rows of a panel. Each product packs the whole basis again, so a panel must be tall enough to pay for that:
// [64, 3, 224, 224] in two panels took 1.2 times the products alone, in four 1.4, in seven 1.35 (2 cores, noisy).
constexpr int64_t PANEL_ROWS = 1568;

Tensor mm_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

PatchImage image_of(const Tensor& t, const Tensor& like, const char* name) {
  check_dtype(t, like.scalar_type(), name);
  check_same_shape(like, t, name);
  return {t.data_ptr(), {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}};
}

void patch_project(const Tensor& noise, const Tensor& basis, int64_t patch, bool complement,
                   const std::optional<Tensor>& images, const Tensor& out) {
  STD_TORCH_CHECK(noise.dim() == 4 && patch >= 1 && noise.size(2) % patch == 0 && noise.size(3) % patch == 0,
                  "fastnull: noise must have shape [B, C, H, W], H and W multiples of patch_size >= 1");
  PatchArgs args{};
  args.dtype = dtype_of(noise, "noise");
  args.noise = image_of(noise, noise, "noise");
  args.out = image_of(out, noise, "out");
  if (images.has_value()) args.images = image_of(*images, noise, "images");
  args.channels = noise.size(1);
  args.patch = patch;
  args.grid_h = noise.size(2) / patch;
  args.grid_w = noise.size(3) / patch;
  args.complement = complement;
  const int64_t width = args.channels * patch * patch;
  check_dtype(basis, ScalarType::Float, "basis");
  check_dense(basis, basis.dim() == 2 && basis.size(0) == width ? basis.numel() : -1, "basis [C * p * p, n]");
  const int64_t rows = noise.size(0) * args.grid_h * args.grid_w;
  if (rows == 0 || width == 0) return;

  const auto new_panel = [&](int64_t columns) {
    return torch::stable::new_empty(basis, {std::min(rows, PANEL_ROWS), columns});
  };
  const Tensor patches = new_panel(width), coordinates = new_panel(basis.size(1));
  const Tensor basis_t = torch::stable::transpose(basis, 0, 1);
  args.panel = static_cast<float*>(patches.mutable_data_ptr());
  const auto& table = kernels();
  for (args.first = 0; args.first < rows; args.first += PANEL_ROWS) {
    const int64_t count = std::min(PANEL_ROWS, rows - args.first);
    const Tensor panel = torch::stable::narrow(const_cast<Tensor&>(patches), 0, 0, count);
    const Tensor seen = torch::stable::narrow(const_cast<Tensor&>(coordinates), 0, 0, count);
    torch::stable::parallel_for(0, count, grain(width),
                                [&](int64_t b, int64_t e) { table.patch_gather(args, b, e); });
    mm_out(panel, basis, seen);
    mm_out(seen, basis_t, panel);
    torch::stable::parallel_for(0, count, grain(width),
                                [&](int64_t b, int64_t e) { table.patch_scatter(args, b, e); });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastnull, CPU, m) { m.impl("patch_project_out", TORCH_BOX(&patch_project)); }

}  // namespace fastnull
