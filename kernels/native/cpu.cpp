#include "cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "error.h"

namespace headrace {
namespace {

// __builtin_cpu_supports also asks whether the system saves the wide registers.
bool supported(const Kernels* kernels) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");

  if (kernels == &avx2_kernels) return avx2;
  if (kernels == &avx2vnni_kernels) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
  }
  if (kernels == &avx512vnni_kernels)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
#endif
  return kernels == &plain_kernels;
}

}  // namespace

const std::vector<const Kernels*>& known_kernels() {
  static const std::vector<const Kernels*> all = {
#if defined(__x86_64__)
      &avx512vnni_kernels, &avx2vnni_kernels, &avx2_kernels,
#endif
      &plain_kernels};
  return all;
}

const std::vector<const Kernels*>& available_kernels() {
  static const std::vector<const Kernels*> there = [] {
    std::vector<const Kernels*> found;
    for (const Kernels* k : known_kernels())
      if (supported(k)) found.push_back(k);
    return found;
  }();
  return there;
}

const Kernels& choose_kernels(const std::string& name) {
  std::string names;
  for (const Kernels* k : available_kernels()) {
    if (name.empty() || name == k->name) return *k;
    names += std::string(names.empty() ? "" : ", ") + k->name;
  }
  require<ProgramError>(false, "isa ", name, " is not available here; expected one of ", names);
  return plain_kernels;
}

}  // namespace headrace
