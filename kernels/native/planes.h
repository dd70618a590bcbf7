// Weights of 5 and 6 bits, for any vector V: the four low bits of a code lie as codes of 4 bits do, those above them in planes of a bit a
// column. They become bytes with the zero point 128, in the order of the columns, times the factors of their blocks where scales have such:
// a factor is 1 … 8 for 5 bits and 1 … 4 for 6, so that products fit. From there on they are weights of 8 bits.
#pragma once
#include "factors.h"

namespace headrace {
namespace {

constexpr bool has_planes(int bits) { return bits == 5 || bits == 6; }

// From which bit of a vector's nibbles on that of a lane's block lies.
template <class V, int Block>
struct BlockBits {
  alignas(64) int of[V::lanes];
  constexpr BlockBits() : of() {
    for (int lane = 0; lane < V::lanes; lane++) of[lane] = 4 * (4 * lane / Block);
  }
};

// For factors 1 … 16, of which a vector has one: it in every 16 bits, and what is left to 128 of a zero point times it in every byte.
// A table, since making them takes AVX2 a sixth of a token's time.
template <class V, int Zero>
struct FoldTable {
  alignas(64) uint32_t factor[16][V::lanes], shift[16][V::lanes];
  constexpr FoldTable() : factor(), shift() {
    for (uint32_t i = 0; i < 16; i++)
      for (int lane = 0; lane < V::lanes; lane++)
        factor[i][lane] = (i + 1) * 0x10001, shift[i][lane] = ((128 - Zero * (i + 1)) & 255) * 0x1010101;
  }
};

// A row of such codes. Block: columns that share a factor, where 64 are that or more; 0: codes have no factors.
template <class V, int Bits, int Block>
struct PlaneRow {
  static constexpr int kZeroPoint = 1 << (Bits - 1), kPlanes = Bits - 4;
  static constexpr bool few_factors = Block == 0 || Block >= V::bytes;  // one a vector or none; otherwise four bytes of them are read at once
  static constexpr BlockBits<V, Block ? Block : 64> kBlockBits{};
  static constexpr FoldTable<V, kZeroPoint> kFolds{};
  using I = typename V::I;

  const uint8_t *low, *high, *factors;
  size_t columns, whole;  // whole: those that load<true> can read
  size_t factor_bytes, ahead, high_ahead;
  int shift;  // logarithm of the columns of a block

  PlaneRow(const Weight& w, size_t n, size_t ahead)
      : low(w.packed + n * w.row_bytes()), high(w.high + n * w.high_bytes()), factors(w.factors ? w.factors + n * w.factor_bytes() : nullptr),
        columns(w.k), whole(few_factors || (w.n - 1 - n) * w.factor_bytes() >= 3 ? w.k / V::bytes * V::bytes : 0),
        factor_bytes(w.factor_bytes()),
        ahead(ahead / 2), high_ahead(ahead / 8 * kPlanes), shift(__builtin_ctz(w.block)) {}

  // V::bytes columns from `column` on, a multiple of that; Whole: all of them exist, and so do four bytes from their first factor's on,
  // which the last rows of a weight need not have. Codes `ahead` columns further come on their way.
  template <bool Whole>
  __attribute__((always_inline)) I load(size_t column) const {
    I codes;
    __builtin_prefetch(low + column / 2 + ahead, 0, 2), __builtin_prefetch(high + column / 8 * kPlanes + high_ahead, 0, 2);
    if constexpr (Whole) {
      codes = with_planes(V::nibbles(low + column / 2), high + column / 8, columns / 8);
    } else {
      uint8_t nibbles[V::bytes / 2] = {}, bits[kPlanes * V::bytes / 8] = {};
      const size_t there = columns - column < V::bytes ? columns - column : V::bytes;
      __builtin_memcpy(nibbles, low + column / 2, there / 2);
      for (int i = 0; i < kPlanes; i++) __builtin_memcpy(bits + i * V::bytes / 8, high + column / 8 + i * columns / 8, there / 8);
      codes = with_planes(V::nibbles(nibbles), bits, V::bytes / 8);
    }
    if constexpr (Block == 0) {
      return V::add32(codes, V::set8(128 - kZeroPoint));  // no byte carries
    } else if constexpr (!few_factors) {
      uint32_t few = 0;
      const size_t first = column / (2 * Block);
      if (!Whole)
        for (size_t i = first; i < factor_bytes && i < first + 4; i++) few |= uint32_t(factors[i]) << 8 * (i - first);
      I factor, rest;
      V::template fold<kZeroPoint>(Whole ? V::broadcast32(factors + first) : V::set32(int(few)), V::load(kBlockBits.of), factor, rest);
      return V::add32(V::mul16(codes, factor), rest);
    } else {
      const size_t block = column >> (Block < 64 ? __builtin_ctz(Block) : shift);
      const int factor = factors[block / 2] >> block % 2 * 4 & 15;
      return V::add32(V::mul16(codes, V::load(kFolds.factor[factor])), V::load(kFolds.shift[factor]));
    }
  }
  __attribute__((always_inline)) I at(size_t column) const {
    return column + V::bytes <= whole ? load<true>(column) : load<false>(column);
  }

 private:
  static I with_planes(I codes, const uint8_t* high, size_t plane) {
    codes = V::template add_plane<16>(codes, high);
    if constexpr (Bits == 6) codes = V::template add_plane<32>(codes, high + plane);
    return codes;
  }
};

// `run` with the Block of a weight's rows, 0 where they have no planes either; Folded: they have factors.
template <int Bits, bool Folded, class Run>
inline void with_block(const Weight& w, const Run& run) {
  if constexpr (!has_planes(Bits) || !Folded) run(Number<0>());
  else if (w.block == 16) run(Number<16>());
  else if (w.block == 32) run(Number<32>());
  else run(Number<64>());
}

}  // namespace
}  // namespace headrace
