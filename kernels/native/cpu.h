// Which variants this machine can run.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace headrace {

const std::vector<const Kernels*>& known_kernels();      // of this architecture, best first
const std::vector<const Kernels*>& available_kernels();  // those that the machine and its system support, best first

// The variant of that name; the best available when it is empty. Raises ProgramError.
const Kernels& choose_kernels(const std::string& name);

}  // namespace headrace
