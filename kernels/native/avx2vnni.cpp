// AVX2 with AVX-VNNI, as on processors without AVX512 that have it (Intel since Alder Lake).
#define HEADRACE_VNNI
#include "simd_avx2.h"
#include "table.h"

namespace headrace {
constexpr Kernels avx2vnni_kernels = table<Avx2>("avx2vnni");
}
