// Which processor level runs: chosen once from what the processor has, or named by set_level.
#include <atomic>
#include <cstring>
#include <string>

#include "cpu/kernels.h"

#define FASTNULL_DECLARE(level)                                                    \
  namespace level {                                                                \
  void layer_norm(const LayerNormArgs&, int64_t, int64_t);                         \
  void layer_norm_dx(const LayerNormDxArgs&, int64_t, int64_t);                    \
  void gelu(const GeluArgs&, int64_t, int64_t);                                    \
  void dgelu(const DgeluArgs&, int64_t, int64_t);                                  \
  int64_t attention_workspace(int64_t, int64_t, bool);                             \
  void attention(const AttentionArgs&, int64_t, int64_t);                          \
  void attention_dqkv(const AttentionArgs&, int64_t, int64_t);                     \
  void patch_gather(const PatchArgs&, int64_t, int64_t);                           \
  void patch_scatter(const PatchArgs&, int64_t, int64_t);                          \
  void objective(const ObjectiveArgs&, int64_t, int64_t);                          \
  void adamw(const AdamWArgs&, int64_t, int64_t, int64_t);                         \
  void direct_step(const DirectStepArgs&, int64_t, int64_t);                       \
  constexpr Kernels table = {                                                      \
      #level,       layer_norm,    layer_norm_dx, gelu,  dgelu,       attention_workspace, attention, \
      attention_dqkv, patch_gather, patch_scatter, objective, adamw, direct_step};  \
  }

namespace fastnull {

FASTNULL_DECLARE(portable)
#ifdef FASTNULL_HAS_AVX2
FASTNULL_DECLARE(avx2)
#endif
#ifdef FASTNULL_HAS_AVX512
FASTNULL_DECLARE(avx512)
#endif
#ifdef FASTNULL_HAS_AVX512_BF16
FASTNULL_DECLARE(avx512_bf16)
namespace avx512_bf16 {
bool dots_are_fast();
int64_t attention_dot_workspace(int64_t, int64_t, bool);
void attention_dot(const AttentionArgs&, int64_t, int64_t);
void attention_dot_dqkv(const AttentionArgs&, int64_t, int64_t);
// The same level with bfloat16 products too, not only conversions.
constexpr Kernels with_dots = [] {
  Kernels kernels = table;
  kernels.level = "avx512_bf16_dot";
  kernels.attention_workspace = attention_dot_workspace;
  kernels.attention = attention_dot;
  kernels.attention_dqkv = attention_dot_dqkv;
  return kernels;
}();
}  // namespace avx512_bf16
#endif

namespace {

struct Level {
  const Kernels* kernels;
  bool present;
  bool worthwhile = true;  // false: only where somebody names it
};

#ifdef FASTNULL_HAS_AVX2
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif
#ifdef FASTNULL_HAS_AVX512
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#ifdef FASTNULL_HAS_AVX512_BF16
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

// Most portable first.
const Level* levels(int* count) {
  static const Level all[] = {
      {&portable::table, true},
#ifdef FASTNULL_HAS_AVX2
      {&avx2::table, has_avx2()},
#endif
#ifdef FASTNULL_HAS_AVX512
      {&avx512::table, has_avx512()},
#endif
#ifdef FASTNULL_HAS_AVX512_BF16
      {&avx512_bf16::table, has_avx512_bf16()},
      {&avx512_bf16::with_dots, has_avx512_bf16(), has_avx512_bf16() && avx512_bf16::dots_are_fast()},
#endif
  };
  *count = int(sizeof all / sizeof *all);
  return all;
}

const Kernels* best() {
  int count;
  const Level* all = levels(&count);
  const Kernels* found = all[0].kernels;
  for (int i = 0; i < count; ++i) {
    if (all[i].present && all[i].worthwhile) found = all[i].kernels;
  }
  return found;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> table{best()};
  return table;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

const char* available_levels() {
  static const std::string names = [] {
    int count;
    const Level* all = levels(&count);
    std::string joined;
    for (int i = 0; i < count; ++i) {
      if (all[i].present) joined += (joined.empty() ? "" : ",") + std::string(all[i].kernels->level);
    }
    return joined;
  }();
  return names.c_str();
}

bool set_level(const char* name) {
  int count;
  const Level* all = levels(&count);
  for (int i = 0; i < count; ++i) {
    if (all[i].present && std::strcmp(all[i].kernels->level, name) == 0) {
      current().store(all[i].kernels, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace fastnull
