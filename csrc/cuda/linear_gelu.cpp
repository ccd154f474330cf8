// Products with the tanh form of GELU, or its derivative, in the library's own epilogue: torch.ops.fastnull_cuda.
// linear_gelu_aux_out and linear_dgelu_aux_out. torch's bindings expose neither the epilogue that keeps z nor the one that
// multiplies by gelu'(z).
//
// The library's matrices have their columns one after the other, ours their rows: it is told the transposed product.
//   h [M, N] = x [M, K] W [N, K]^T    is    h^T [N, M] = (W^T)^T x^T     A = W, read [K, N], transposed; B = x, [K, M]
//   dz [M, N] = dy [M, K] W [K, N]    is    dz^T [N, M] = W^T dy^T       A = W, read [N, K];             B = dy, [K, M]
// Bias [N] is then a column, and z, of the shape and order of the result, the auxiliary matrix.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <map>
#include <mutex>

#include "cuda/cublaslt.h"
#include "cuda/device.h"

namespace fastnull::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t WORKSPACE_BYTES = 32 << 20;  // what Hopper's products may want, by the library's own advice

void check(lt::Status status, const char* what) {
  STD_TORCH_CHECK(status == 0, "fastnull: ", what, " of cublasLt failed with status ", status);
}

// One of the library's objects, made by `create` and given back at the end.
template <typename T>
struct Owned {
  template <typename Create, typename... Args>
  Owned(lt::Status (*destroy)(T), const char* what, Create create, Args... args) : destroy(destroy) {
    check(create(&object, args...), what);
  }
  Owned(const Owned&) = delete;
  ~Owned() { destroy(object); }
  T object = nullptr;
  lt::Status (*destroy)(T);
};

lt::Handle handle_of(int32_t device) {
  static std::mutex mutex;
  static std::map<int32_t, lt::Handle> handles;
  const std::lock_guard<std::mutex> lock(mutex);
  lt::Handle& handle = handles[device];
  if (handle == nullptr) check(lt::library().create(&handle), "cublasLtCreate");
  return handle;
}

// A dense matrix of the product's dtype, as the epilogues want it: from a 16-byte aligned address, rows of 16 bytes.
void check_matrix(const Tensor& t, int64_t rows, int64_t columns, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.is_contiguous(), "fastnull: ", name,
                  " must be dense and have shape [", rows, ", ", columns, "]");
  STD_TORCH_CHECK(t.scalar_type() == type && (type == ScalarType::BFloat16 || type == ScalarType::Half), "fastnull: ",
                  name, " must be bfloat16 or float16, like the others");
  STD_TORCH_CHECK(columns % 8 == 0 && uintptr_t(t.data_ptr()) % 16 == 0, "fastnull: ", name,
                  " must have columns in multiples of 8 and a 16-byte aligned address");
}

// a [M, K] times W, with an epilogue that reads or writes z [M, N]; `transposed`: W is [N, K], else [K, N].
void run(const Tensor& a, const Tensor& weight, bool transposed, lt::Epilogue epilogue, const void* bias,
         const Tensor& z, const Tensor& out) {
  const lt::Library& library = lt::library();
  const int64_t M = a.size(0), K = a.size(1), N = out.size(1);
  const lt::Type type = a.scalar_type() == ScalarType::BFloat16 ? lt::R_16BF : lt::R_16F;
  Owned<lt::Descriptor> product(library.descriptor_destroy, "cublasLtMatmulDescCreate", library.descriptor_create,
                                lt::COMPUTE_32F, lt::R_32F);
  const auto set = [&](lt::Attribute attribute, const auto& value) {
    check(library.descriptor_set(product.object, attribute, &value, sizeof(value)), "cublasLtMatmulDescSetAttribute");
  };
  void* aux = z.data_ptr();
  set(lt::TRANSA, transposed ? lt::OP_T : lt::OP_N);
  set(lt::TRANSB, lt::OP_N);
  set(lt::EPILOGUE, epilogue);
  set(lt::AUX_POINTER, aux);
  set(lt::AUX_LD, N);
  if (bias != nullptr) set(lt::BIAS_POINTER, bias);
  const auto layout = [&](int64_t rows, int64_t columns) {
    return Owned<lt::Layout>(library.layout_destroy, "cublasLtMatrixLayoutCreate", library.layout_create, type,
                             uint64_t(rows), uint64_t(columns), rows);
  };
  const auto w = transposed ? layout(K, N) : layout(N, K), x = layout(K, M), d = layout(N, M);
  Owned<lt::Preference> preference(library.preference_destroy, "cublasLtMatmulPreferenceCreate",
                                   library.preference_create);
  const uint64_t most = WORKSPACE_BYTES;
  check(library.preference_set(preference.object, lt::MAX_WORKSPACE_BYTES, &most, sizeof(most)),
        "cublasLtMatmulPreferenceSetAttribute");
  const OnDevice device(a);
  const lt::Handle handle = handle_of(a.get_device_index());
  lt::Heuristic best{};
  int found = 0;
  check(library.heuristic(handle, product.object, w.object, x.object, d.object, d.object, preference.object, 1, &best,
                          &found),
        "cublasLtMatmulAlgoGetHeuristic");
  STD_TORCH_CHECK(found > 0, "fastnull: cublasLt has no product [", M, ", ", K, "] x [", K, ", ", N,
                  "] with this epilogue");
  // freed when the product has been launched: later work on the stream comes after it
  const Tensor workspace = torch::stable::new_empty(a, {int64_t(best.workspace_bytes)}, ScalarType::Byte);
  const float one = 1, zero = 0;
  check(library.matmul(handle, product.object, &one, weight.data_ptr(), w.object, a.data_ptr(), x.object, &zero,
                       out.data_ptr(), d.object, out.data_ptr(), d.object, &best.algorithm, workspace.data_ptr(),
                       best.workspace_bytes, device.stream),
        "cublasLtMatmul");
}

// The matrices of both products, N the columns of z: a [M, K], W [N, K] or [K, N], out and z [M, N].
void check_matrices(const Tensor& a, const Tensor& weight, bool transposed, const Tensor& z, const Tensor& out) {
  STD_TORCH_CHECK(a.dim() == 2 && z.dim() == 2, "fastnull: the operands must be matrices");
  const int64_t M = a.size(0), K = a.size(1), N = z.size(1);
  const ScalarType type = a.scalar_type();
  check_matrix(a, M, K, type, transposed ? "x" : "dy");
  check_matrix(weight, transposed ? N : K, transposed ? K : N, type, "weight");
  check_matrix(z, M, N, type, "z");
  check_matrix(out, M, N, type, transposed ? "h" : "dz");
}

void linear_gelu_aux_out(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& h, const Tensor& z) {
  check_matrices(x, weight, true, z, h);
  STD_TORCH_CHECK(bias.scalar_type() == x.scalar_type() && bias.dim() == 1 && bias.size(0) == z.size(1) &&
                      bias.is_contiguous() && uintptr_t(bias.data_ptr()) % 16 == 0,
                  "fastnull: bias must have shape [", z.size(1), "], the dtype of x and a 16-byte aligned address");
  if (x.size(0) > 0) run(x, weight, true, lt::GELU_AUX_BIAS, bias.data_ptr(), z, h);
}

void linear_dgelu_aux_out(const Tensor& dy, const Tensor& weight, const Tensor& z, const Tensor& dz) {
  check_matrices(dy, weight, false, z, dz);
  if (dy.size(0) > 0) run(dy, weight, false, lt::DGELU, nullptr, z, dz);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTNULL_CUDA_LIBRARY, m) {
  m.def("linear_gelu_aux_out(Tensor x, Tensor weight, Tensor bias, Tensor(a!) h, Tensor(b!) z) -> ()");
  m.def("linear_dgelu_aux_out(Tensor dy, Tensor weight, Tensor z, Tensor(a!) dz) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(FASTNULL_CUDA_LIBRARY, FASTNULL_CUDA_KEY, m) {
  m.impl("linear_gelu_aux_out", TORCH_BOX(&linear_gelu_aux_out));
  m.impl("linear_dgelu_aux_out", TORCH_BOX(&linear_dgelu_aux_out));
}

}  // namespace fastnull::cuda
