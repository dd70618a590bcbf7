// AVX2 without VNNI: products of neighbours take two or three instructions.
#include "simd_avx2.h"
#include "table.h"

namespace headrace {
constexpr Kernels avx2_kernels = table<Avx2>("avx2");
}
