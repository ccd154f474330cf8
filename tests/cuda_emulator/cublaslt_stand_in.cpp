// A library with the name and the functions of cublasLt that computes what it is told, element by element, on the CPU.
// It shares nothing with csrc/cuda but the numbers and struct layouts of the ABI, written down once more.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace {

struct Descriptor {
  int32_t transa = 0, transb = 0;
  uint32_t epilogue = 1;
  const void* bias = nullptr;
  void* aux = nullptr;
  int64_t aux_ld = 0;
};
struct Layout {
  int type;
  uint64_t rows, columns;
  int64_t ld;
};
struct Result {
  uint64_t algorithm[8];
  size_t workspace_bytes;
  int state;
  float waves;
  int reserved[4];
};
constexpr int OK = 0, INVALID = 7, NOT_SUPPORTED = 15;
constexpr uint64_t ALGORITHM = 0x5eed;

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// bfloat16 alone: the kinds differ by a type number only
float load(const void* data, int64_t index) {
  return from_bits(uint32_t(static_cast<const uint16_t*>(data)[index]) << 16);
}
void store(void* data, int64_t index, double value) {
  const float narrow = float(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, 4);
  static_cast<uint16_t*>(data)[index] = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

double gelu(double z) { return 0.5 * z * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z))); }
double gelu_slope(double z) {
  const double k = std::sqrt(2 / M_PI), t = std::tanh(k * (z + 0.044715 * z * z * z));
  return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * k * (1 + 3 * 0.044715 * z * z);
}

// The size of op(matrix), or nothing that fits where a leading dimension is too small.
uint64_t height(const Layout* m, int32_t turned) { return turned ? m->columns : m->rows; }
uint64_t width(const Layout* m, int32_t turned) { return turned ? m->rows : m->columns; }

bool fits(const Descriptor* p, const Layout* a, const Layout* b, const Layout* c, const Layout* d) {
  for (const Layout* m : {a, b, c, d})
    if (m->type != 14 || m->ld < int64_t(m->rows)) return false;
  return height(a, p->transa) == d->rows && width(b, p->transb) == d->columns &&
         width(a, p->transa) == height(b, p->transb) && c->rows == d->rows && c->columns == d->columns &&
         (p->epilogue == 164 || p->epilogue == 192) && p->aux != nullptr && p->aux_ld % 8 == 0 &&
         p->aux_ld >= int64_t(d->rows) && (p->epilogue == 192) == (p->bias == nullptr);
}

}  // namespace

#define API extern "C" __attribute__((visibility("default"))) int

API cublasLtCreate(void** handle) {
  static int any;
  *handle = &any;
  return OK;
}
API cublasLtMatmulDescCreate(Descriptor** made, int compute, int scale) {
  *made = new Descriptor;
  return compute == 68 && scale == 0 ? OK : INVALID;
}
API cublasLtMatmulDescDestroy(Descriptor* descriptor) {
  delete descriptor;
  return OK;
}
API cublasLtMatmulDescSetAttribute(Descriptor* p, int attribute, const void* value, size_t bytes) {
  const auto take = [&](auto& field) {
    if (bytes != sizeof(field)) return INVALID;
    std::memcpy(&field, value, bytes);
    return OK;
  };
  switch (attribute) {
    case 3: return take(p->transa);
    case 4: return take(p->transb);
    case 7: return take(p->epilogue);
    case 8: return take(p->bias);
    case 11: return take(p->aux);
    case 12: return take(p->aux_ld);
  }
  return INVALID;
}
API cublasLtMatrixLayoutCreate(Layout** made, int type, uint64_t rows, uint64_t columns, int64_t ld) {
  *made = new Layout{type, rows, columns, ld};
  return OK;
}
API cublasLtMatrixLayoutDestroy(Layout* layout) {
  delete layout;
  return OK;
}
API cublasLtMatmulPreferenceCreate(uint64_t** made) {
  *made = new uint64_t(0);
  return OK;
}
API cublasLtMatmulPreferenceDestroy(uint64_t* preference) {
  delete preference;
  return OK;
}
API cublasLtMatmulPreferenceSetAttribute(uint64_t* preference, int attribute, const void* value, size_t bytes) {
  if (attribute != 1 || bytes != sizeof(*preference)) return INVALID;
  std::memcpy(preference, value, bytes);
  return OK;
}
API cublasLtMatmulAlgoGetHeuristic(void* handle, Descriptor* p, Layout* a, Layout* b, Layout* c, Layout* d,
                                   uint64_t* preference, int asked, Result* results, int* found) {
  *found = 0;
  if (handle == nullptr || asked < 1) return INVALID;
  if (!fits(p, a, b, c, d)) return NOT_SUPPORTED;
  if (d->rows == 4096) return OK;  // as where the library knows no algorithm
  *results = Result{};
  results->algorithm[0] = ALGORITHM;
  results->workspace_bytes = *preference / 2;
  *found = 1;
  return OK;
}
API cublasLtMatmul(void*, Descriptor* p, const float* alpha, const void* a, Layout* a_layout, const void* b,
                   Layout* b_layout, const float* beta, const void*, Layout* c_layout, void* d, Layout* d_layout,
                   const uint64_t* algorithm, void* workspace, size_t workspace_bytes, void*) {
  if (!fits(p, a_layout, b_layout, c_layout, d_layout) || *alpha != 1 || *beta != 0 || *algorithm != ALGORITHM)
    return INVALID;
  std::memset(workspace, 0xFF, workspace_bytes);
  const int64_t inner = int64_t(width(a_layout, p->transa));
  const auto at = [](const void* data, const Layout* m, int32_t turned, int64_t i, int64_t j) {
    return double(load(data, turned ? j + i * m->ld : i + j * m->ld));
  };
  for (int64_t j = 0; j < int64_t(d_layout->columns); ++j)
    for (int64_t i = 0; i < int64_t(d_layout->rows); ++i) {
      double sum = 0;
      for (int64_t k = 0; k < inner; ++k) sum += at(a, a_layout, p->transa, i, k) * at(b, b_layout, p->transb, k, j);
      if (p->epilogue == 164) {
        sum += load(p->bias, i);
        store(p->aux, i + j * p->aux_ld, sum);
        store(d, i + j * d_layout->ld, gelu(sum));
      } else {
        store(d, i + j * d_layout->ld, sum * gelu_slope(load(p->aux, i + j * p->aux_ld)));
      }
    }
  return OK;
}
