// The table of a variant, made of the templates for its vector V. Included last by each variant's source file.
#pragma once
#include "attention.h"
#include "elementwise.h"
#include "linear_decode.h"
#include "linear_prompt.h"

namespace headrace {
namespace {

#include "attend_float.h"

template <class V>
constexpr Kernels table(const char* name) {
  return {name,           quantize<V>,           fine<V>,     decode<V>, coarse<V>,   prompt<V>, prompt_scratch<V>,
          V::panels * V::lanes, 1, rms_norm<V>, add<V>, silu_mul<V>, rope<V>, cache_codes<V>, attend<V>, attend_float};
}

}  // namespace
}  // namespace headrace
