// Weights of 5 and 6 bits, for any vector V: the four low bits of a code lie as codes of 4 bits do, those above them in planes of a bit a
// column. They become bytes with the zero point 128, in the order of the columns, times the factors of their blocks where scales have such:
// a factor is 1 … 8 for 5 bits and 1 … 4 for 6, so that products fit. From there on they are weights of 8 bits.
#pragma once
#include "factors.h"

namespace headrace {
namespace {

constexpr bool has_planes(int bits) { return bits == 5 || bits == 6; }

// Where the nibble of a lane's block lies among those of V::bytes columns: from which bit on.
template <class V>
struct BlockBits {
  alignas(64) int of[3][V::lanes];  // blocks of 16 columns, of 32, of more
  constexpr BlockBits() : of() {
    for (int i = 0; i < 3; i++)
      for (int lane = 0; lane < V::lanes; lane++) of[i][lane] = i == 2 ? 0 : 4 * lane / (16 << i) * 4;
  }
};

// Rows `stride` apart, from row n on.
template <class V, int Bits, bool Folded>
class PlaneRows {
  static constexpr BlockBits<V> kBlockBits{};
  static constexpr int kZeroPoint = 1 << (Bits - 1), kPlanes = Bits - 4;
  using I = typename V::I;

 public:
  PlaneRows(const Weight& w, size_t n, size_t stride, size_t ahead)
      : packed_(w.packed + n * w.row_bytes()), high_(w.high + n * w.high_bytes()), row_bytes_(stride * w.row_bytes()),
        high_bytes_(stride * w.high_bytes()), ahead_(ahead / 2), high_ahead_(ahead / 8 * kPlanes),
        plane_(size_t(w.k) / 8), columns_(w.k) {
    if constexpr (Folded) {
      factors_ = w.factors + n * w.factor_bytes(), factor_bytes_ = stride * w.factor_bytes(), last_ = w.factor_bytes() - 1;
      while (16 << block_ < w.block) block_++;
    }
  }

  // Step `step` of a row, V::bytes columns; Whole: all of them exist. Others, `ahead` columns further, come on their way.
  template <bool Whole>
  __attribute__((always_inline)) I load(size_t row, int step) const {
    const size_t column = size_t(step) * V::bytes;
    const uint8_t *low = packed_ + row * row_bytes_ + column / 2, *high = high_ + row * high_bytes_ + column / 8;
    __builtin_prefetch(low + ahead_, 0, 2), __builtin_prefetch(high + high_ahead_, 0, 2);
    I codes;
    if constexpr (Whole) {
      codes = with_planes(V::nibbles(low), high, plane_);
    } else {
      uint8_t nibbles[V::bytes / 2] = {}, bits[kPlanes * V::bytes / 8] = {};
      const size_t there = columns_ - column < V::bytes ? columns_ - column : V::bytes;
      __builtin_memcpy(nibbles, low, there / 2);
      for (int i = 0; i < kPlanes; i++) __builtin_memcpy(bits + i * V::bytes / 8, high + i * plane_, there / 8);
      codes = with_planes(V::nibbles(nibbles), bits, V::bytes / 8);
    }
    if constexpr (Folded) return fold(row, column)(codes);
    else return V::add32(codes, V::set8(128 - kZeroPoint));  // no byte carries
  }

 private:
  __attribute__((always_inline)) static I with_planes(I codes, const uint8_t* high, size_t plane) {
    codes = V::template add_plane<16>(codes, high);
    if constexpr (Bits == 6) codes = V::template add_plane<32>(codes, high + plane);
    return codes;
  }
  __attribute__((always_inline)) Fold<V, kZeroPoint> fold(size_t row, size_t column) const {
    const size_t first = column >> (4 + block_);  // block
    const uint8_t* own = factors_ + row * factor_bytes_ + first / 2;
    uint32_t nibbles = own[0];
    if (V::bytes == 64 && block_ == 0 && first / 2 < last_) nibbles |= uint32_t(own[1]) << 8;
    nibbles >>= first % 2 * 4;
    return Fold<V, kZeroPoint>(V::factor_words(V::set32(int(nibbles)), V::load(kBlockBits.of[block_ < 2 ? block_ : 2])));
  }

  const uint8_t *packed_, *high_, *factors_ = nullptr;
  size_t row_bytes_, high_bytes_, ahead_, high_ahead_, plane_, columns_, factor_bytes_ = 0, last_ = 0;
  int block_ = 0;  // 16 << block_ columns
};

}  // namespace
}  // namespace headrace
