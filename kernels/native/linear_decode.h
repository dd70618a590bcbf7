// Linears of few tokens, for any vector V: rows of packed codes are read once, straight from the file's pages. The results of a
// token are the same bits whatever other tokens are computed with it.
#pragma once
#include "linear_blocks.h"
#include "linear_split.h"

namespace headrace {
namespace {

// How often a row has a scale is a template parameter, Parts: 0 one a row; 1 blocks of whole steps; more: blocks of less than
// a step, so many in each.
template <class V, int Bits>
inline int parts_of(const Weight& w) {
  const int columns = Steps<V, Bits>::columns;
  if (is_split(Bits) && w.factors) return 0;  // they are folded into the codes
  return !w.block ? 0 : w.block >= columns ? 1 : columns / w.block;
}

template <class V, int Bits>
inline void decode_bits(const Weight& w, const Fine* x, int m, int begin, int end, const Out& out, int column) {
  constexpr int most = Steps<V, Bits>::columns / 16;  // blocks of a step
  const auto run = [&](auto parts) {
    constexpr int Parts = decltype(parts)::value;
    if constexpr (Parts <= most) decode_blocks<V, Bits, Parts>(w, x, m, begin, end, out, column);
  };
  switch (parts_of<V, Bits>(w)) {
    case 0:
      if constexpr (!is_split(Bits)) return decode_rows<V, Bits>(w, x, m, begin, end, out, column);
      else return with_block<Bits, true>(w, [&](auto block) { decode_split<V, Bits, decltype(block)::value>(w, x, m, begin, end, out, column); });
    case 1: return run(Number<1>());
    case 2: return run(Number<2>());
    case 4: return run(Number<4>());
    case 8: return run(Number<8>());
  }
}

template <class V>
void decode(const Weight& w, const Fine* x, int m, int begin, int end, const Out& out, int column) {
  switch (w.bits) {
    case 4: return decode_bits<V, 4>(w, x, m, begin, end, out, column);
    case 5: return decode_bits<V, 5>(w, x, m, begin, end, out, column);
    case 6: return decode_bits<V, 6>(w, x, m, begin, end, out, column);
    default: return decode_bits<V, 8>(w, x, m, begin, end, out, column);
  }
}

}  // namespace
}  // namespace headrace
