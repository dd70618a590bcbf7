// NEON as every AArch64 processor has it: products of bytes take several instructions.
#include "simd_neon.h"
#include "table.h"

namespace headrace {
constexpr Kernels neon_kernels = table<Neon>("neon");
}
