// Weights of 5 and 6 bits, for any vector V, whose codes are split: their four low bits lie as codes of 4 bits do, those above them apart, in
// units of 64 columns. A step is 2 * V::bytes columns, the even ones and the odd ones, as nibbles lie, so that a lane of both covers eight
// neighbours. Of a unit's n bytes the j-th has in its low nibble the high bits of the even columns 2 * j, 2 * (j + n), …, from the lowest on,
// in its high nibble those of the odd columns beside them: a vector that repeats these bytes needs one shift for each of the two.
// Codes become bytes with the zero point 128, times the factors of their blocks where scales have such: a factor is 1 … 8 for 5 bits and
// 1 … 4 for 6, so that products fit. Where factors stay apart, codes become bytes as they are, and sums of their products are
// multiplied with factors.
#pragma once
#include "factors.h"

namespace headrace {
namespace {

constexpr bool is_split(int bits) { return bits == 5 || bits == 6; }

// From which bit of a step's factors, nibbles, on that of a lane's block lies.
template <class V, int Block>
struct BlockBits {
  alignas(64) int of[V::lanes];
  constexpr BlockBits() : of() {
    for (int lane = 0; lane < V::lanes; lane++) of[lane] = 4 * (8 * lane / Block);
  }
};

// A row of such codes. Block: columns that share a factor, where 64 are that or more; 0: codes have no factors.
template <class V, int Bits, int Block>
struct SplitRow {
  static constexpr int kBits = Bits, kZeroPoint = 1 << (Bits - 1);
  static constexpr bool apart = Block && factors_apart<V>;
  static constexpr size_t kStep = 2 * V::bytes;  // columns of a step
  static constexpr size_t kUnitBytes = kUnit / 8 * (Bits - 4);
  static constexpr BlockBits<V, Block ? Block : 64> kBlockBits{};
  using I = typename V::I;
  using HighBits = typename V::template HighBits<Bits>;

  const uint8_t *low, *high, *factors;
  size_t columns, high_bytes, factor_bytes;
  size_t ahead, high_ahead, factors_ahead;
  int shift;  // logarithm of the columns of a block

  // ahead: columns that are read ahead, those of whole rows.
  SplitRow(const Weight& w, size_t n, size_t ahead)
      : low(w.packed + n * w.row_bytes()), high(w.high + n * w.high_bytes()), factors(nullptr), columns(w.k), high_bytes(w.high_bytes()),
        factor_bytes(w.factor_bytes()), ahead(ahead / 2), high_ahead(ahead / kUnit * kUnitBytes), factors_ahead(ahead / w.k * factor_bytes),
        shift(__builtin_ctz(w.block)) {
    if (w.factors) factors = w.factors + n * factor_bytes;
  }
  // The row so many further on; quicker than another from the weight, whose blocks are a division. Member by member, because gcc 12 copies
  // a whole object through memory.
  SplitRow further(size_t rows) const { return {*this, rows}; }
  SplitRow(const SplitRow& of, size_t rows)
      : low(of.low + rows * (of.columns / 2)), high(of.high + rows * of.high_bytes),
        factors(Block ? of.factors + rows * of.factor_bytes : nullptr), columns(of.columns), high_bytes(of.high_bytes),
        factor_bytes(of.factor_bytes), ahead(of.ahead), high_ahead(of.high_ahead), factors_ahead(of.factors_ahead), shift(of.shift) {}

  // Bytes of a step, even columns and odd ones. Whole: all of them exist.
  template <bool Whole>
  __attribute__((always_inline)) void load(const HighBits& bits, size_t step, I& even, I& odd) const {
    constexpr size_t own = V::bytes, units = (kStep + kUnit - 1) / kUnit;  // of which a step has some, or is a part of one
    const uint8_t *nibbles = low + step * own, *above = high + step * kStep / kUnit * kUnitBytes;
    uint8_t copy[own + units * kUnitBytes] = {};
    if constexpr (!Whole) {
      const size_t left = columns - step * kStep, there = left < kStep ? left : kStep;
      __builtin_memcpy(copy, nibbles, there / 2);
      __builtin_memcpy(copy + own, above, (there + kUnit - 1) / kUnit * kUnitBytes);
      nibbles = copy, above = copy + own;
    }
    const I both = V::load(nibbles);
    even = V::low_nibbles(both), odd = V::high_nibbles(both);
    bits.add(even, odd, above, int(step * kStep % kUnit / kStep));
    if constexpr (Block == 0) {
      const I shift = V::set8(128 - kZeroPoint);
      even = V::add32(even, shift), odd = V::add32(odd, shift);  // no byte carries
    } else if constexpr (!apart) {
      I factor, rest;
      V::template fold<kZeroPoint>(nibbles_of<Whole>(step), V::load(kBlockBits.of), factor, rest);
      even = V::add32(V::mul16(even, factor), rest), odd = V::add32(V::mul16(odd, factor), rest);
    }
  }
  // The same, whether all of them exist or not.
  __attribute__((always_inline)) void at(const HighBits& bits, size_t step, I& even, I& odd) const {
    if ((step + 1) * kStep <= columns) load<true>(bits, step, even, odd);
    else load<false>(bits, step, even, odd);
  }
  // Where factors stay apart: a step's, each in every 16 bits of its lanes.
  template <bool Whole>
  __attribute__((always_inline)) I factor_pairs(size_t step) const {
    return V::factor_pairs(nibbles_of<Whole>(step), V::load(kBlockBits.of));
  }
  // Codes `ahead` columns further than a step come on their way.
  __attribute__((always_inline)) void read_ahead(size_t step) const {
    __builtin_prefetch(low + step * V::bytes + ahead, 0, 2), __builtin_prefetch(high + step * kStep / kUnit * kUnitBytes + high_ahead, 0, 2);
  }

 private:
  uint32_t nibble_of(size_t block) const { return factors[block / 2] >> block % 2 * 4 & 15; }
  // The factors of a step's blocks, less 1.
  template <bool Whole>
  __attribute__((always_inline)) uint32_t nibbles_of(size_t step) const {
    constexpr size_t bytes = kStep / (2 * Block);
    uint32_t few = 0;
    if constexpr (Block == 64) {
      few = nibble_of(step * kStep >> shift);
      if constexpr (kStep > 64) few |= shift == 6 ? factors[step] & 0xf0u : few << 4;
    } else if constexpr (bytes == 0) {
      few = nibble_of(step * kStep / Block);
    } else if constexpr (Whole) {
      __builtin_memcpy(&few, factors + step * bytes, bytes);
    } else {
      for (size_t i = 0; i < bytes && step * bytes + i < factor_bytes; i++) few |= uint32_t(factors[step * bytes + i]) << 8 * i;
    }
    return few;
  }
};

// `run` with the Block of a weight's rows, 0 where they are not split either; Folded: they have factors.
template <int Bits, bool Folded, class Run>
inline void with_block(const Weight& w, const Run& run) {
  if constexpr (!is_split(Bits) || !Folded) run(Number<0>());
  else if (w.block == 16) run(Number<16>());
  else if (w.block == 32) run(Number<32>());
  else run(Number<64>());
}

}  // namespace
}  // namespace headrace
