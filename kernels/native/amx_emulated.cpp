// The same with tiles in plain C++: slow, for checking layout and arithmetic where there is no AMX; never picked unasked.
#include "simd_avx512.h"
#include "linear_tiles.h"

namespace headrace {
const Kernels amx_emulated_kernels = with_tiles<Avx512, EmulatedTiles>("amx-emulated");
}
