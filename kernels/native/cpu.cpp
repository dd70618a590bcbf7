#include "cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "error.h"

namespace headrace {
namespace {

#if defined(__x86_64__)
// Whether there are tiles of bytes, and the system lets this process use them, which it must be asked for once.
bool tiles() {
#if defined(__linux__)
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool there = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 25 & 1);
  return there && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

#if defined(__x86_64__)
// Made here, in a file that is compiled for every machine.
Kernels with_tiles(const TileKernels& tiles) {
  Kernels table = avx512vnni_kernels;
  table.name = tiles.name;
  table.coarse = tiles.coarse;
  table.prompt = tiles.prompt;
  table.prompt_scratch = tiles.prompt_scratch;
  table.tokens = tiles.tokens;
  return table;
}

const Kernels amx_kernels = with_tiles(amx_tiles), amx_emulated_kernels = with_tiles(amx_emulated_tiles);

// Conversions of float16; clang before 17 cannot be asked by name. They need no more of the system than AVX2 does.
bool f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
#endif

// __builtin_cpu_supports also asks whether the system saves the wide registers.
bool supported(const Kernels* kernels) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c();
  if (kernels == &avx2_kernels) return avx2;
  if (kernels == &avx2vnni_kernels) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
  }
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  if (kernels == &avx512vnni_kernels || kernels == &amx_emulated_kernels) return avx512;
  if (kernels == &amx_kernels) return avx512 && tiles();
#elif defined(__aarch64__)
  if (kernels == &neon_kernels) return true;
#if defined(__linux__)
  constexpr unsigned long kDotProduct = 1ul << 20, kInt8Matrix = 1ul << 13;  // HWCAP_ASIMDDP, HWCAP2_I8MM
  const bool dotprod = getauxval(AT_HWCAP) & kDotProduct, i8mm = getauxval(AT_HWCAP2) & kInt8Matrix;
#elif defined(__ARM_FEATURE_DOTPROD)  // this file's own flags: what the system asks of every machine
  const bool dotprod = true, i8mm = false;
#else
  const bool dotprod = false, i8mm = false;
#endif
  if (kernels == &dotprod_kernels) return dotprod;
  if (kernels == &i8mm_kernels) return dotprod && i8mm;
#endif
  return kernels == &plain_kernels;
}

const std::vector<const Kernels*>& built_kernels() {  // of this architecture, best first
  static const std::vector<const Kernels*> all = {
#if defined(__x86_64__)
      &amx_kernels, &avx512vnni_kernels, &avx2vnni_kernels, &avx2_kernels,
#elif defined(__aarch64__)
      &i8mm_kernels, &dotprod_kernels, &neon_kernels,
#endif
      &plain_kernels,
#if defined(__x86_64__)
      &amx_emulated_kernels,
#endif
  };
  return all;
}

}  // namespace

const std::vector<const Kernels*>& available_kernels() {
  static const std::vector<const Kernels*> there = [] {
    std::vector<const Kernels*> found;
    for (const Kernels* k : built_kernels())
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
