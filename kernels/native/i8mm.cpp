// The same with products of unsigned by signed bytes, which come with the matrix extension for int8 (Armv8.6).
#define HEADRACE_DOTPROD
#define HEADRACE_I8MM
#include "simd_neon.h"
#include "table.h"

namespace headrace {
constexpr Kernels i8mm_kernels = table<Neon>("i8mm");
}
