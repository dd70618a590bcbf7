// Scales that are factors, for any vector V: nibbles of rows one after the other become vectors over rows.
#pragma once
#include "elementwise.h"

namespace headrace {
namespace {

// Some bytes of up to V::lanes rows, `stride` apart: up to eight, of two factors each.
template <class V>
struct RowFactors {
  alignas(64) uint32_t words[2][V::lanes] = {};

  RowFactors(const uint8_t* p, size_t stride, int rows, int bytes) {
    int from = 0;
    for (; from + 4 <= bytes; from += 4)
      for (int r = 0; r < rows; r++) __builtin_memcpy(&words[from / 4][r], p + r * stride + from, 4);
    for (; from < bytes; from++)
      for (int r = 0; r < rows; r++) words[from / 4][r] |= uint32_t(p[r * stride + from]) << from % 4 * 8;
  }
  typename V::F of(int block) const { return V::factors(V::load(words[block / 8]), V::set32(block % 8 * 4)); }
};

}  // namespace
}  // namespace headrace
