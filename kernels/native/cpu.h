// Which variants this machine can run.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace headrace {

// Every variant's name, those of other architectures too, which this library does not hold.
constexpr const char* kKnownIsas = "amx avx512vnni avx2vnni avx2 i8mm dotprod neon plain amx-emulated";

const std::vector<const Kernels*>& available_kernels();  // those that the machine and its system support, best first

// The variant of that name; the best available when it is empty. Raises ProgramError.
const Kernels& choose_kernels(const std::string& name);

}  // namespace headrace
