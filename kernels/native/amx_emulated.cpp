// The same with tiles in plain C++: slow, for checking layout and arithmetic where there is no AMX; never picked unasked.
#include "simd_avx512.h"
#include "linear_tiles.h"

namespace headrace {
constexpr TileKernels amx_emulated_tiles = tile_kernels<Avx512, EmulatedTiles>("amx-emulated");
}
