// Linears of few tokens whose weights have planes and one scale a row: a few rows at a time become bytes in the first
// level of the cache, which all tokens share, and are multiplied as those of 8 bits are. A single token takes them as they come.
#pragma once
#include "linear_rows.h"

namespace headrace {
namespace {

// A row by a single token from step `from` to `to` - 1; sums, spread over lanes, are those that add_steps has.
template <class V, class Row>
__attribute__((always_inline)) inline typename V::F row_sum(const Row& row, const ScaledCodes& x, size_t from, size_t to) {
  constexpr size_t apart = Steps<V, 8>::apart, lanes = V::lanes, bytes = V::bytes;
  auto sum = V::zerof();
  const auto add = [&](size_t s, auto has_second, const auto& load) __attribute__((always_inline)) {
    auto product = V::load(x.pairs + s * lanes);
    product = V::template dot8<8>(product, load(s), V::load(x.codes + s * bytes));
    if constexpr (decltype(has_second)::value)
      product = V::template dot8<8>(product, load(s + apart), V::load(x.codes + (s + apart) * bytes));
    sum = V::fma(V::to_float(product), V::loadf(x.scales + s * lanes), sum);
  };
  const auto whole = [&](size_t s) __attribute__((always_inline)) { return row.template load<true>(s * bytes); };
  const auto any = [&](size_t s) { return row.at(s * bytes); };
  size_t unit = from;
  for (const size_t last = std::min(to, row.whole / bytes); unit + 2 * apart <= last; unit += 2 * apart)
    HEADRACE_UNROLL for (size_t s = unit; s < unit + apart; s++) add(s, Number<1>(), whole);
  for (; unit < to; unit += 2 * apart)
    for (size_t s = unit; s < to && s < unit + apart; s++) {
      if (s + apart < to) add(s, Number<1>(), any);
      else add(s, Number<0>(), any);
    }
  return sum;
}

// V::lanes rows, `stride` apart, by a single token; sums of two rows lie in a vector.
template <class V, int Bits, int Block>
HEADRACE_APART void single_rows(const Weight& w, size_t n, size_t stride, size_t ahead, const ScaledCodes& codes, size_t from, size_t to,
                                float* lanes) {
  using Row = PlaneRow<V, Bits, Block>;
  const auto x = codes;
  for (size_t r = 0; r < V::lanes; r += 2, lanes += V::lanes) {
    __builtin_prefetch(w.factors + (n + r * stride + ahead / w.k) * w.factor_bytes(), 0, 2);
    const auto one = row_sum<V>(Row(w, n + r * stride, ahead), x, from, to), other = row_sum<V>(Row(w, n + (r + 1) * stride, ahead), x, from, to);
    const auto two = V::template merge<0>(one, other);
    V::storef(lanes, from ? V::add(V::loadf(lanes), two) : two);
  }
}

// Rows as bytes, from `row` on, their columns from step `step` on.
template <class V>
struct UnpackedRows {
  const uint8_t* bytes;
  size_t stride;
  int row, step;
  template <bool>
  __attribute__((always_inline)) typename V::I load(size_t of, int at) const {
    return V::kept(V::load(bytes + (of - row) * stride + size_t(at - step) * V::bytes));
  }
};

// Columns from … to - 1 of some rows, `from` a multiple of V::bytes, to rows of `out` in whole vectors.
template <class V, int Bits, int Block>
HEADRACE_APART void unpack_rows(const Weight& w, size_t n, size_t stride, int rows, size_t ahead, size_t from, size_t to, uint8_t* out) {
  constexpr size_t bytes = V::bytes;
  for (int r = 0; r < rows; r++, out += kSegment) {
    const PlaneRow<V, Bits, Block> row(w, n + r * stride, ahead);
    __builtin_prefetch(row.factors + ahead / w.k * w.factor_bytes(), 0, 2);
    size_t column = from;
    for (const size_t last = std::min(to, row.whole); column + bytes <= last; column += bytes)
      V::store(out + column - from, row.template load<true>(column));
    for (; column < to; column += bytes) V::store(out + column - from, row.at(column));
  }
}

template <class V, int Bits, int Block>
inline void decode_planes(const Weight& w, const Fine* x, int m, int begin, int end, const Out& out, int column) {
  using S = Steps<V, 8>;
  constexpr int together = V::lanes < 4 ? V::lanes : 4, size = V::lanes * V::lanes;
  alignas(64) float lanes[kMostTokens * size];
  alignas(64) uint8_t bytes[together * kSegment];
  const size_t ahead = columns_ahead(w, m == 1 ? 2 : together);
  vectors_of_rows<V>(begin, end, [&](int n, int stride) {
    for (int first = 0; first < m; first += kMostTokens) {
      const int tokens = std::min(m - first, kMostTokens);
      for (int from = 0; from < w.k; from += kSegment) {
        const int to = std::min(from + kSegment, w.k), step = from / S::columns, end_step = int(round_up(to, S::columns)) / S::columns;
        if (tokens == 1) {
          single_rows<V, Bits, Block>(w, n, stride, ahead, x[first].eight, step, end_step, lanes);
          continue;
        }
        for (int r = 0; r < V::lanes; r += together) {
          unpack_rows<V, Bits, Block>(w, n + r * stride, stride, together, ahead, from, to, bytes);
          const UnpackedRows<V> rows{bytes, kSegment, r, step};
          few_at_a_time<4>(tokens, [&](auto number, int t) {
            constexpr int T = decltype(number)::value, R = rows_at_once<V>(T, false) < together ? rows_at_once<V>(T, false) : together;
            for (int i = r; i < r + together; i += R)
              add_steps<V, 8, R, T>(rows, i, x + first + t, step, end_step, end_step, lanes + t * size + i / 2 * V::lanes);
          });
        }
      }
      write_sums<V, 8>(w, n, stride, x, first, tokens, lanes, out, column + n - begin);
    }
  });
}

}  // namespace
}  // namespace headrace
