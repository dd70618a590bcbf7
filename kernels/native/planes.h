// Weights of 5 and 6 bits, for any vector V: the four low bits of a code lie as codes of 4 bits do, those above them in planes of a bit a
// column. They become bytes with the zero point 128, in the order of the columns, times the factors of their blocks where scales have such:
// a factor is 1 … 8 for 5 bits and 1 … 4 for 6, so that products fit. From there on they are weights of 8 bits. Where factors stay apart,
// codes become bytes as they are, even columns and odd ones, and sums of their products are multiplied with factors.
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
  static constexpr int kBits = Bits, kZeroPoint = 1 << (Bits - 1), kPlanes = Bits - 4;
  static constexpr bool apart = Block && factors_apart<V>;
  static constexpr bool few_factors = Block == 0 || Block >= V::bytes;  // one a vector or none; otherwise four bytes of them are read at once
  static constexpr BlockBits<V, Block ? Block : 64> kBlockBits{};
  static constexpr FoldTable<V, kZeroPoint> kFolds{};
  using I = typename V::I;

  const uint8_t *low, *high, *factors;
  size_t columns, factor_bytes, behind;  // behind: bytes of factors of the rows that follow
  size_t ahead, high_ahead, factors_ahead;
  int shift;  // logarithm of the columns of a block

  // ahead: columns that are read ahead, those of whole rows.
  PlaneRow(const Weight& w, size_t n, size_t ahead)
      : low(w.packed + n * w.row_bytes()), high(w.high + n * w.high_bytes()), factors(nullptr), columns(w.k), factor_bytes(w.factor_bytes()),
        behind((w.n - 1 - n) * factor_bytes), ahead(ahead / 2), high_ahead(ahead / 8 * kPlanes), factors_ahead(ahead / w.k * factor_bytes),
        shift(__builtin_ctz(w.block)) {
    if (w.factors) factors = w.factors + n * factor_bytes;
  }
  // The row so many further on; quicker than another from the weight, whose blocks are a division.
  PlaneRow further(size_t rows) const {
    PlaneRow row = *this;
    row.low += rows * (columns / 2), row.high += rows * (columns / 8 * kPlanes), row.behind -= rows * factor_bytes;
    if constexpr (Block != 0) row.factors += rows * factor_bytes;
    return row;
  }
  // How many columns load<true> can read.
  size_t whole() const { return few_factors || behind >= 3 ? columns / V::bytes * V::bytes : 0; }

  // V::bytes codes from the vector `step` behind `column` on, which is a multiple of them; Whole: all of them exist.
  template <bool Whole>
  __attribute__((always_inline)) I codes(size_t column, int step = 0) const {
    const uint8_t *own = low + column / 2 + step * (V::bytes / 2), *planes = high + column / 8 + step * (V::bytes / 8);
    if constexpr (Whole) {
      return with_planes(V::nibbles(own), planes, columns / 8);
    } else {
      uint8_t nibbles[V::bytes / 2] = {}, bits[kPlanes * V::bytes / 8] = {};
      const size_t left = columns - column - step * V::bytes, there = left < V::bytes ? left : V::bytes;
      __builtin_memcpy(nibbles, own, there / 2);
      for (int i = 0; i < kPlanes; i++) __builtin_memcpy(bits + i * V::bytes / 8, planes + i * columns / 8, there / 8);
      return with_planes(V::nibbles(nibbles), bits, V::bytes / 8);
    }
  }
  // Where factors stay apart: codes of a step of 2 * V::bytes columns, the even ones and the odd ones.
  template <bool Whole>
  __attribute__((always_inline)) void pair_codes(size_t step, I& even, I& odd) const {
    constexpr size_t own = V::bytes, bits = V::bytes / 4;
    const uint8_t *nibbles = low + step * own, *planes = high + step * bits;
    size_t plane = columns / 8;
    uint8_t copy[own + kPlanes * bits] = {};
    if constexpr (!Whole) {
      const size_t left = columns - step * 2 * own, there = left < 2 * own ? left : 2 * own;
      __builtin_memcpy(copy, nibbles, there / 2);
      for (int i = 0; i < kPlanes; i++) __builtin_memcpy(copy + own + i * bits, planes + i * plane, there / 8);
      nibbles = copy, planes = copy + own, plane = bits;
    }
    const I both = V::load(nibbles);
    even = V::low_nibbles(both), odd = V::high_nibbles(both);
    V::template add_plane<16>(even, odd, planes);
    if constexpr (Bits == 6) V::template add_plane<32>(even, odd, planes + plane);
  }
  // The factors of a unit, two such steps whose sums of two columns lie in turns: in halves of 16 bytes the first four of both, and the last.
  template <bool Whole>
  __attribute__((always_inline)) void unit_factors(size_t unit, I (&factor)[2]) const {
    if constexpr (Block >= 64) {
      const int first = factor_of(unit * unit_of(8)), second = shift == 6 ? factors[unit] >> 4 : first;
      factor[0] = factor[1] = V::set32((first + 1) | (second + 1) << 16);
    } else {
      constexpr size_t bytes = unit_of(8) / Block / 2;
      const uint8_t* own = factors + unit * bytes;
      uint32_t few = 0;
      if (Whole) __builtin_memcpy(&few, own, bytes);
      else for (size_t i = 0; i < bytes && unit * bytes + i < factor_bytes; i++) few |= uint32_t(own[i]) << 8 * i;
      if constexpr (Block == 16) V::factors_of_16(V::set32(int(few)), factor[0], factor[1]);
      else factor[0] = factor[1] = V::factors_of_32(V::set32(int(few)));
    }
  }
  // Where they do not stay apart: codes as bytes, times their factors. Whole: also, four bytes exist from their first factor's on, which the last
  // rows of a weight need not have.
  template <bool Whole>
  __attribute__((always_inline)) I load(size_t column, int step = 0) const {
    const I codes = this->codes<Whole>(column, step);
    if constexpr (Block == 0) {
      return V::add32(codes, V::set8(128 - kZeroPoint));  // no byte carries
    } else if constexpr (!few_factors) {
      uint32_t few = 0;
      const size_t first = column / (2 * Block) + step * (V::bytes / (2 * Block));
      if (!Whole)
        for (size_t i = first; i < factor_bytes && i < first + 4; i++) few |= uint32_t(factors[i]) << 8 * (i - first);
      I factor, rest;
      V::template fold<kZeroPoint>(Whole ? V::broadcast32(factors + first) : V::set32(int(few)), V::load(kBlockBits.of), factor, rest);
      return V::add32(V::mul16(codes, factor), rest);
    } else {
      const int factor = factor_of(column + step * V::bytes);
      return V::add32(V::mul16(codes, V::load(kFolds.factor[factor])), V::load(kFolds.shift[factor]));
    }
  }
  __attribute__((always_inline)) I at(size_t column) const {
    return column + V::bytes <= whole() ? load<true>(column) : load<false>(column);
  }
  // Codes `ahead` columns further come on their way: those of 128 columns from `column` on, a line of memory.
  __attribute__((always_inline)) void read_ahead(size_t column) const {
    __builtin_prefetch(low + column / 2 + ahead, 0, 2), __builtin_prefetch(high + column / 8 * kPlanes + high_ahead, 0, 2);
  }

 private:
  __attribute__((always_inline)) int factor_of(size_t column) const {
    const size_t block = column >> (Block < 64 ? __builtin_ctz(Block) : shift);
    return factors[block / 2] >> block % 2 * 4 & 15;
  }
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
