// AVX512 with VNNI: the vectors of simd_avx512.h.
#include "simd_avx512.h"
#include "table.h"

namespace headrace {
constexpr Kernels avx512vnni_kernels = table<Avx512>("avx512vnni");
}
