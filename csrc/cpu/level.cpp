// Ops that name and force the processor level; they take no tensor, so their kernel is not a CPU-key one.
#include <string>

#include "cpu/binding.h"

namespace fastnull {
namespace {

std::string cpu_level() { return kernels().level; }

std::string cpu_levels() { return available_levels(); }

bool set_cpu_level(std::string name) { return set_level(name.c_str()); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastnull, m) {
  m.def("_cpu_level() -> str");
  m.def("_cpu_levels() -> str");
  m.def("_set_cpu_level(str name) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(fastnull, CompositeExplicitAutograd, m) {
  m.impl("_cpu_level", TORCH_BOX(&cpu_level));
  m.impl("_cpu_levels", TORCH_BOX(&cpu_levels));
  m.impl("_set_cpu_level", TORCH_BOX(&set_cpu_level));
}

}  // namespace fastnull
