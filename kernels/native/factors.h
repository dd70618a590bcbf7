// Scales that are factors, for any vector V: nibbles of rows one after the other become vectors over rows, or are multiplied into the
// codes, which then are bytes with one scale a row: a code is -8 … 7 and a factor 1 … 16, so that products fit.
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

// What makes unsigned bytes with the zero point 128 of codes with another, of nibbles with 8: a factor in every 16 bits, which no product of a
// byte by it leaves, and what their zero points differ by.
template <class V, int Zero = 8>
struct Fold {
  typename V::I factor, shift;

  explicit Fold(typename V::I words) : factor(words), shift(V::sub32(V::set32(int(0x80808080)), V::mul32(words, V::set32(Zero * 0x101)))) {}
  typename V::I operator()(typename V::I codes) const { return V::add32(V::mul16(codes, factor), shift); }
};

}  // namespace
}  // namespace headrace
