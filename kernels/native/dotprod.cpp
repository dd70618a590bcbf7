// NEON with products of four bytes, as on nearly all processors since Armv8.2.
#define HEADRACE_DOTPROD
#include "simd_neon.h"
#include "table.h"

namespace headrace {
constexpr Kernels dotprod_kernels = table<Neon>("dotprod");
}
