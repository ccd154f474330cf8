// Stands for csrc/cuda/mma.cuh in tests: the same functions, from the fragment tables of the PTX ISA.
//
// Sums round as pessimists read the tensor cores (Fasi et al., "Numerical behavior of NVIDIA tensor cores", 2021): the
// addends of one instruction are aligned to the largest, cut off one bit below its last, added, and cut off to float.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace fastnull::cuda {

struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };

template <typename To, typename From>
To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(To));
  return y;
}

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) { return bits_as<c10::BFloat16>(x.bits); }
inline float to_float(Fp16 x) { return bits_as<c10::Half>(x.bits); }

template <typename T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline Bf16 from_float<Bf16>(float x) { return {bits_as<uint16_t>(c10::BFloat16(x))}; }
template <> inline Fp16 from_float<Fp16>(float x) { return {bits_as<uint16_t>(c10::Half(x))}; }

template <typename T>
uint32_t pack(float first, float second) {
  return from_float<T>(first).bits | uint32_t(from_float<T>(second).bits) << 16;
}

template <typename T>
float2 unpack(uint32_t both) {
  return make_float2(to_float(T{uint16_t(both)}), to_float(T{uint16_t(both >> 16)}));
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline float reciprocal_approx(float x) { return 1 / x; }

using SharedAddress = uint32_t;
inline SharedAddress shared_address(const void* shared) {
  return SharedAddress(static_cast<const unsigned char*>(shared) - emulator::device.shared);
}
inline unsigned char* at(SharedAddress address) { return emulator::device.shared + int32_t(address); }

struct Rows8x8 { SharedAddress row; uint32_t r[4]; };

inline void ldmatrix_either(uint32_t (&r)[4], SharedAddress row, bool transposed, const char* name) {
  if (row % 16 != 0) emulator::fail(std::string(name) + " from a misaligned row");
  const Rows8x8 result = emulator::of_whole_warp(name, Rows8x8{row, {}}, [transposed](Rows8x8(&all)[32]) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t m[8][8];
      for (int i = 0; i < 8; ++i) std::memcpy(m[i], at(all[8 * matrix + i].row), 16);
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const uint16_t first = transposed ? m[2 * t][g] : m[g][2 * t];
        const uint16_t second = transposed ? m[2 * t + 1][g] : m[g][2 * t + 1];
        all[lane].r[matrix] = first | uint32_t(second) << 16;
      }
    }
  });
  std::copy(result.r, result.r + 4, r);
}
inline void ldmatrix(uint32_t (&r)[4], SharedAddress row) { ldmatrix_either(r, row, false, "ldmatrix"); }
inline void ldmatrix_transposed(uint32_t (&r)[4], SharedAddress row) {
  ldmatrix_either(r, row, true, "ldmatrix.trans");
}

// c + sum of the products, as the tensor cores add.
inline float sum_of_products(float c, const double* products, int count) {
  double largest = std::fabs(c), plain = c;
  for (int i = 0; i < count; ++i) largest = std::max(largest, std::fabs(products[i])), plain += products[i];
  if (!std::isfinite(plain) || largest == 0) return float(plain);
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 24);
  double sum = std::trunc(c / unit) * unit;
  for (int i = 0; i < count; ++i) sum += std::trunc(products[i] / unit) * unit;
  const float nearest = float(sum);
  return std::fabs(double(nearest)) > std::fabs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}

struct Fragments { uint32_t a[4], b[2]; float d[4]; };

// K: inner dimension of the instruction; a_at, b_at put a lane's values into the matrices.
template <int K, typename Place>
void mma_either(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const char* name, Place place) {
  const Fragments mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]}};
  const Fragments result = emulator::of_whole_warp(name, mine, [place](Fragments(&all)[32]) {
    double A[16][K], B[8][K], products[K];
    for (int lane = 0; lane < 32; ++lane) place(all[lane], lane / 4, lane % 4, A, B);
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const double *row = A[lane / 4 + i / 2 * 8], *column = B[lane % 4 * 2 + i % 2];
        for (int k = 0; k < K; ++k) products[k] = row[k] * column[k];
        all[lane].d[i] = sum_of_products(all[lane].d[i], products, K);
      }
  });
  std::copy(result.d, result.d + 4, d);
}

template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_either<16>(d, a, b0, b1, "mma.m16n8k16", [](const Fragments& f, int g, int t, auto& A, auto& B) {
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack<T>(f.a[i]);
      A[g + i % 2 * 8][2 * t + i / 2 * 8] = pair.x, A[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = pair.y;
    }
    for (int i = 0; i < 2; ++i) {
      const float2 pair = unpack<T>(f.b[i]);
      B[g][2 * t + i * 8] = pair.x, B[g][2 * t + i * 8 + 1] = pair.y;
    }
  });
}

inline uint32_t to_tf32(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  return (bits & 0x7F800000) == 0x7F800000 ? bits : (bits + 0x1000) & 0xFFFFE000;
}

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_either<8>(d, a, b[0], b[1], "mma.m16n8k8.tf32", [](const Fragments& f, int g, int t, auto& A, auto& B) {
    // The 13 bits below tf32's are not read: who forgets to round loses them.
    for (int i = 0; i < 4; ++i) A[g + i % 2 * 8][t + i / 2 * 4] = bits_as<float>(f.a[i] & 0xFFFFE000);
    for (int i = 0; i < 2; ++i) B[g][t + i * 4] = bits_as<float>(f.b[i] & 0xFFFFE000);
  });
}

inline void copy16_async(SharedAddress shared, const void* global, bool valid) {
  if (shared % 16 != 0 || (valid && uintptr_t(global) % 16 != 0)) emulator::fail("a misaligned copy");
  emulator::device.running->copies.push_back({at(shared), valid ? global : nullptr});
}

inline void wait_for_copies() {
  for (const emulator::Copy& copy : emulator::device.running->copies)
    if (copy.from != nullptr)
      std::memcpy(copy.to, copy.from, 16);
    else
      std::memset(copy.to, 0, 16);
  emulator::device.running->copies.clear();
}

}  // namespace fastnull::cuda
