// float16 to float32, exactly, in integers: for machines without the instruction and for single values. Single codes and scales of weights.
#pragma once
#include <cstring>

#include "kernels.h"

namespace headrace {

static inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  uint32_t bits = sign | (exponent + 112) << 23 | fraction << 13;
  if (exponent == 31) bits = sign | 0x7f800000 | fraction << 13;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
    const float value = float(fraction) * 5.9604644775390625e-08f;
    return sign ? -value : value;
  }
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline int code_of(const Weight& w, int n, int k) {
  const uint8_t* row = w.packed + n * w.row_bytes();
  if (w.bits == 8) return row[k] - 128;
  int code = row[k / 2] >> k % 2 * 4 & 15;
  if (w.high) {  // as split.h has it
    const int above = w.bits - 4, bytes = kUnit / 8 * above, pair = k % kUnit / 2;
    const int nibble = w.high[n * w.high_bytes() + size_t(k / kUnit) * bytes + pair % bytes] >> k % 2 * 4;
    code |= (nibble >> pair / bytes * above & ((1 << above) - 1)) << 4;
  }
  return code - (1 << (w.bits - 1));
}

static inline float scale_of(const Weight& w, int n, int block) {
  if (!w.factors) return half_to_float(w.scale[size_t(n) * w.blocks() + block]);
  return half_to_float(w.scale[n]) * float(w.factor(n, block));
}

}  // namespace headrace
