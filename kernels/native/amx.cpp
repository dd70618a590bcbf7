// AVX512 with VNNI, prompts by AMX tiles.
#include "simd_avx512.h"
#include "linear_tiles.h"

namespace headrace {
constexpr TileKernels amx_tiles = tile_kernels<Avx512, AmxTiles>("amx");
}
