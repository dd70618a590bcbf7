// Linears of few tokens whose weights have planes and one scale a row: a few rows at a time become bytes in the first
// level of the cache, which all tokens share, and are multiplied as those of 8 bits are. A single token takes them as they come.
#pragma once
#include "linear_rows.h"

namespace headrace {
namespace {

// Two rows, for a single token.
template <class V, int Bits, int Block>
struct TwoRows {
  PlaneRow<V, Bits, Block> rows[2];
  template <bool Whole>
  __attribute__((always_inline)) typename V::I load(size_t row, int step) const {
    return rows[row].template load<Whole>(step * V::bytes);
  }
};

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

// Columns from … to - 1 of a row, `from` a multiple of V::bytes, to whole vectors of bytes.
template <class V, int Bits, int Block>
HEADRACE_APART void unpack_row(const PlaneRow<V, Bits, Block>& given, int from, int to, uint8_t* out) {
  const auto row = given;
  const int whole = int(row.columns) / V::bytes * V::bytes;
  int column = from;
  for (const int end = to < whole ? to : whole; column + V::bytes <= end; column += V::bytes, out += V::bytes)
    V::store(out, row.template load<true>(column));
  for (; column < to; column += V::bytes, out += V::bytes) V::store(out, row.at(column));
}

template <class V, int Bits, int Block>
inline void decode_planes(const Weight& w, const Fine* x, int m, int begin, int end, const Out& out, int column) {
  using S = Steps<V, 8>;
  using Row = PlaneRow<V, Bits, Block>;
  constexpr int together = V::lanes < 4 ? V::lanes : 4;
  alignas(64) float lanes[kMostTokens * V::lanes * V::lanes];
  alignas(64) uint8_t bytes[together * kSegment];
  const size_t ahead = columns_ahead(w, m == 1 ? 2 : together);
  vectors_of_rows<V>(begin, end, [&](int n, int stride) {
    for (int first = 0; first < m; first += kMostTokens) {
      const int tokens = std::min(m - first, kMostTokens);
      for (int r = 0; r < V::lanes; r += together)
        for (int from = 0; from < w.k; from += kSegment) {
          const int to = std::min(from + kSegment, w.k), begin_step = from / S::columns, end_step = int(round_up(to, S::columns)) / S::columns;
          for (int i = 0; from == 0 && i < together; i++)
            __builtin_prefetch(w.factors + (n + (r + i) * stride + ahead / w.k) * w.factor_bytes(), 0, 2);
          if (tokens == 1) {
            for (int i = r; i < r + together; i += 2) {
              const TwoRows<V, Bits, Block> two{{Row(w, n + i * stride, ahead), Row(w, n + (i + 1) * stride, ahead)}};
              add_steps<V, 8, 2, 1>(two, 0, x + first, begin_step, end_step, w.k / S::columns, lanes + i / 2 * V::lanes);
            }
            continue;
          }
          for (int i = 0; i < together; i++) unpack_row(Row(w, n + (r + i) * stride, ahead), from, to, bytes + i * kSegment);
          const UnpackedRows<V> rows{bytes, kSegment, r, begin_step};
          few_at_a_time<4>(tokens, [&](auto number, int t) {
            constexpr int T = decltype(number)::value, R = rows_at_once<V>(T, false) < together ? rows_at_once<V>(T, false) : together;
            for (int i = r; i < r + together; i += R)
              add_steps<V, 8, R, T>(rows, i, x + first + t, begin_step, end_step, end_step, lanes + t * V::lanes * V::lanes + i / 2 * V::lanes);
          });
        }
      write_sums<V, 8>(w, n, stride, x, first, tokens, lanes, out, column + n - begin);
    }
  });
}

}  // namespace
}  // namespace headrace
