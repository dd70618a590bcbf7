// Linears of few tokens whose weights have planes and one scale a row: a few rows at a time become bytes in the first
// level of the cache, which all tokens share, and are multiplied as those of 8 bits are. A single token takes them as they come.
#pragma once
#include "linear_rows.h"

namespace headrace {
namespace {

// A row by a single token from step `from` to `to` - 1, its sums spread over lanes: the same that add_steps has.
template <class V, int Bits, int Block>
HEADRACE_APART typename V::F single_row(const PlaneRow<V, Bits, Block>& given, const ScaledCodes& codes, size_t from, size_t to) {
  using S = Steps<V, 8>;
  constexpr size_t apart = S::apart, lanes = V::lanes, bytes = V::bytes;
  const auto row = given;
  const auto x = codes;
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
  for (size_t s = unit; s < to && s < unit + apart; s++) {
    if (s + apart < to) add(s, Number<1>(), any);
    else add(s, Number<0>(), any);
  }
  return sum;
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

// Columns from … to - 1 of a row, `from` a multiple of V::bytes, to whole vectors of bytes.
template <class V, int Bits, int Block>
HEADRACE_APART void unpack_row(const PlaneRow<V, Bits, Block>& given, size_t from, size_t to, uint8_t* out) {
  const auto row = given;
  constexpr size_t bytes = V::bytes;
  size_t column = from;
  for (const size_t last = std::min(to, row.whole); column + bytes <= last; column += bytes)
    V::store(out + column - from, row.template load<true>(column));
  for (; column < to; column += bytes) V::store(out + column - from, row.at(column));
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
              const auto sum = [&](int r) { return single_row(Row(w, n + r * stride, ahead), x[first].eight, begin_step, end_step); };
              const auto one = sum(i), two = V::template merge<0>(one, sum(i + 1));
              float* at = lanes + i / 2 * V::lanes;
              V::storef(at, from ? V::add(V::loadf(at), two) : two);
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
