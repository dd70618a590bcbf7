// AVX512 with VNNI, prompts by AMX tiles.
#include "simd_avx512.h"
#include "linear_tiles.h"

namespace headrace {
const Kernels amx_kernels = with_tiles<Avx512, AmxTiles>("amx");
}
