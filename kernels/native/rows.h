// Rows of a weight, for any vector V: a vector of codes at a time as they lie or, of 5 and 6 bits, two of bytes.
#pragma once
#include "split.h"

namespace headrace {
namespace {

// A weight's rows of 4 or 8 bits, `stride` apart from row n on, a vector of codes at a time.
template <class V>
class PlainRows {
 public:
  PlainRows(const Weight& w, size_t n, size_t stride, size_t ahead)
      : packed_(w.packed + n * w.row_bytes()), row_bytes_(stride * w.row_bytes()), ahead_(ahead * w.bits / 8),
        own_(int(w.row_bytes())) {}
  // Step `step` of a row; codes `ahead` columns further come on their way.
  template <bool Whole>
  __attribute__((always_inline)) typename V::I load(size_t row, int step) const {
    return at<Whole>(packed_ + row * row_bytes_, step);
  }

 protected:
  template <bool Whole>
  __attribute__((always_inline)) typename V::I at(const uint8_t* row, int step) const {
    const uint8_t* codes = row + size_t(step) * V::bytes;
    __builtin_prefetch(codes + ahead_, 0, 2);
    if constexpr (Whole) return V::kept(V::load(codes));
    else return V::load_part(codes, own_ - step * V::bytes);
  }

  const uint8_t* packed_;
  size_t row_bytes_;

 private:
  size_t ahead_;
  int own_;
};

// The same of rows in two places, `apart` rows from each other: in turn one from the first and one from the second.
template <class V>
class PairedRows : PlainRows<V> {
 public:
  PairedRows(const Weight& w, size_t n, size_t stride, size_t apart, size_t ahead)
      : PlainRows<V>(w, n, stride, ahead), apart_(apart * w.row_bytes()) {}
  template <bool Whole>
  __attribute__((always_inline)) typename V::I load(size_t row, int step) const {
    return this->template at<Whole>(this->packed_ + row / 2 * this->row_bytes_ + row % 2 * apart_, step);
  }

 private:
  size_t apart_;
};

// The same of split rows, of which a step is two vectors.
template <class V, int Bits, int Block>
struct SplitRows {
  SplitRow<V, Bits, Block> first;
  size_t stride;
  typename V::template HighBits<Bits> bits = {};
  __attribute__((always_inline)) void load(size_t row, size_t step, typename V::I& even, typename V::I& odd) const {
    const auto own = first.further(row * stride);
    own.read_ahead(step);
    own.at(bits, step, even, odd);
  }
};

// Rows from n on; Block: of split ones.
template <class V, int Bits, int Block>
inline auto rows_of(const Weight& w, size_t n, size_t stride, size_t ahead) {
  if constexpr (is_split(Bits)) return SplitRows<V, Bits, Block>{{w, n, ahead}, stride, {}};
  else return PlainRows<V>(w, n, stride, ahead);
}

}  // namespace
}  // namespace headrace
