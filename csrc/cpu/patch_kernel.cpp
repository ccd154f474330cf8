// Patches of an NCHW batch to and from the rows of a dense float panel.
//
//   gather:  panel[m, (c, i, j)] = in[b, c, gy p + i, gx p + j],  patch first + m = (b, gy, gx)
//   scatter: out = panel, or noise - panel if `complement`, plus images if given, at the same places
#include "cpu/vec.h"

namespace fastnull {
namespace FASTNULL_LEVEL {
namespace {

constexpr int W = Vec::size;

// Calls line(part of the panel's row, b, c, y, x of its first pixel) for each of the C * p lines of each patch.
template <typename F>
FASTNULL_INLINE void each_line(const PatchArgs& a, int64_t begin, int64_t end, const F& line) {
  const int64_t p = a.patch, grid = a.grid_h * a.grid_w;
  for (int64_t m = begin; m < end; ++m) {
    const int64_t index = a.first + m;
    const int64_t b = index / grid, y = index % grid / a.grid_w * p, x = index % a.grid_w * p;
    float* row = a.panel + m * a.channels * p * p;
    for (int64_t c = 0; c < a.channels; ++c) {
      for (int64_t i = 0; i < p; ++i) line(row + (c * p + i) * p, b, c, y + i, x);
    }
  }
}

template <typename T>
FASTNULL_INLINE T* pixel(const PatchImage& image, int64_t b, int64_t c, int64_t y, int64_t x) {
  const int64_t* s = image.strides;
  return static_cast<T*>(image.data) + b * s[0] + c * s[1] + y * s[2] + x * s[3];
}

// n pixels at p, `stride` apart.
template <typename T>
FASTNULL_INLINE Vec load_pixels(const T* p, int64_t stride, int n) {
  if (stride == 1) return n == W ? Vec::load(p) : Vec::load(p, n);
  float part[W] = {};
  for (int i = 0; i < n; ++i) part[i] = to_float(p[i * stride]);
  return Vec::load(part);
}

template <typename T>
FASTNULL_INLINE void store_pixels(Vec x, T* p, int64_t stride, int n) {
  if (stride == 1) return n == W ? x.store(p) : x.store(p, n);
  float part[W];
  x.store(part);
  for (int i = 0; i < n; ++i) put(p + i * stride, part[i]);
}

template <typename T>
void gather(const PatchArgs& a, int64_t begin, int64_t end) {
  const int64_t p = a.patch, step = a.noise.strides[3];
  each_line(a, begin, end, [&](float* row, int64_t b, int64_t c, int64_t y, int64_t x) {
    const T* in = pixel<const T>(a.noise, b, c, y, x);
    for (int64_t j = 0; j < p; j += W) {
      const int n = p - j < W ? int(p - j) : W;
      const Vec v = load_pixels(in + j * step, step, n);
      n == W ? v.store(row + j) : v.store(row + j, n);
    }
  });
}

template <typename T, bool COMPLEMENT, bool ADD>
void scatter(const PatchArgs& a, int64_t begin, int64_t end) {
  const int64_t p = a.patch, step = a.noise.strides[3], add_step = a.images.strides[3], out_step = a.out.strides[3];
  each_line(a, begin, end, [&](const float* row, int64_t b, int64_t c, int64_t y, int64_t x) {
    const T* noise = COMPLEMENT ? pixel<const T>(a.noise, b, c, y, x) : nullptr;
    const T* images = ADD ? pixel<const T>(a.images, b, c, y, x) : nullptr;
    T* out = pixel<T>(a.out, b, c, y, x);
    for (int64_t j = 0; j < p; j += W) {
      const int n = p - j < W ? int(p - j) : W;
      Vec v = n == W ? Vec::load(row + j) : Vec::load(row + j, n);
      if (COMPLEMENT) v = load_pixels(noise + j * step, step, n) - v;
      if (ADD) v = load_pixels(images + j * add_step, add_step, n) + v;
      store_pixels(v, out + j * out_step, out_step, n);
    }
  });
}

template <typename T>
void scatter_as_asked(const PatchArgs& a, int64_t begin, int64_t end) {
  const bool add = a.images.data != nullptr;
  if (a.complement) {
    add ? scatter<T, true, true>(a, begin, end) : scatter<T, true, false>(a, begin, end);
  } else {
    add ? scatter<T, false, true>(a, begin, end) : scatter<T, false, false>(a, begin, end);
  }
}

}  // namespace

void patch_gather(const PatchArgs& a, int64_t begin, int64_t end) {
  a.dtype == Dtype::f32 ? gather<float>(a, begin, end) : gather<bf16>(a, begin, end);
}

void patch_scatter(const PatchArgs& a, int64_t begin, int64_t end) {
  a.dtype == Dtype::f32 ? scatter_as_asked<float>(a, begin, end) : scatter_as_asked<bf16>(a, begin, end);
}

}  // namespace FASTNULL_LEVEL
}  // namespace fastnull
