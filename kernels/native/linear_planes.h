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
  const auto dot = [&](auto product, size_t unit, int step, auto whole) __attribute__((always_inline)) {
    return V::dot_bytes(product, row.template load<decltype(whole)::value>(unit * bytes, step), V::load(x.codes + (unit + step) * bytes));
  };
  const auto add = [&](size_t unit, int step, bool has_second, auto whole) __attribute__((always_inline)) {
    auto product = dot(start_of_pairs<V>(x, unit + step), unit, step, whole);
    if (has_second) product = dot(product, unit, step + apart, whole);
    sum = V::fma(V::to_float(product), V::loadf(x.scales + (unit + step) * lanes), sum);
  };
  const size_t whole = std::min(to, row.whole() / bytes);
  size_t unit = from;
  for (; unit + 2 * apart <= whole; unit += 2 * apart) {
    row.read_ahead(unit * bytes);
    HEADRACE_UNROLL for (int step = 0; step < int(apart); step++) add(unit, step, true, Number<1>());
  }
  if (unit + apart == whole && to == whole) {
    HEADRACE_UNROLL for (int step = 0; step < int(apart); step++) add(unit, step, false, Number<1>());
  } else {
    for (; unit < to; unit += 2 * apart)
      for (int step = 0; step < int(apart) && unit + step < to; step++) add(unit, step, unit + step + apart < to, Number<0>());
  }
  return sum;
}

// What a step of such a row whose factors stay apart adds to its sum: four products of two columns fit an int16, where its start is added and
// from where its factors multiply them into an int32.
template <class V, int Bits>
__attribute__((always_inline)) inline typename V::F add_pairs(typename V::F sum, typename V::I even, typename V::I odd, typename V::I factors,
                                                              const ApartCodes& x, size_t step) {
  const int8_t* own = x.codes + step * 2 * V::bytes;
  const auto products = V::add16(V::pair_products(even, V::load(own)), V::pair_products(odd, V::load(own + V::bytes)));
  const auto whole = V::add16(products, V::load(x.starts[Bits - 5] + step * 2 * V::lanes));
  return V::fma(V::to_float(V::dot16(V::zero(), whole, factors)), V::loadf(x.scales + step * V::lanes), sum);
}

template <class V, class Row>
__attribute__((always_inline)) inline typename V::F row_sum(const Row& row, const ApartCodes& x, size_t from, size_t to) {
  auto sum = V::zerof();
  const auto add = [&](size_t step, auto whole) __attribute__((always_inline)) {
    constexpr bool Whole = decltype(whole)::value;
    typename V::I even, odd;
    row.template pair_codes<Whole>(step, even, odd);
    sum = add_pairs<V, Row::kBits>(sum, even, odd, row.template pair_factors<Whole>(step), x, step);
  };
  const size_t whole = std::min(to, row.columns / (2 * V::bytes));
  size_t step = from;
  for (; step + 2 <= whole; step += 2) {
    row.read_ahead(step * 2 * V::bytes);
    HEADRACE_UNROLL for (int i = 0; i < 2; i++) add(step + i, Number<1>());
  }
  if (step < whole) add(step++, Number<1>());
  if (step < to) add(step, Number<0>());
  return sum;
}

// V::lanes rows, `stride` apart, by a single token; sums of two rows lie in a vector.
template <class V, int Bits, int Block, class Codes>
HEADRACE_APART void single_rows(const PlaneRow<V, Bits, Block>& first, size_t stride, const Codes& codes, size_t from, size_t to,
                                float* lanes) {
  const auto x = codes;
  for (size_t r = 0; r < V::lanes; r += 2, lanes += V::lanes) {
    const auto row = first.further(r * stride);
    __builtin_prefetch(row.factors + row.factors_ahead, 0, 2);
    const auto one = row_sum<V>(row, x, from, to), other = row_sum<V>(row.further(stride), x, from, to);
    const auto two = V::template merge<0>(one, other);
    V::storef(lanes, from ? V::add(V::loadf(lanes), two) : two);
  }
}

// Rows as bytes, from `row` on, their columns from step `step` on.
template <class V>
struct UnpackedRows {
  const uint8_t* bytes;
  int row, step;
  template <bool>
  __attribute__((always_inline)) typename V::I load(size_t of, int at) const {
    return V::kept(V::load(bytes + (of - row) * kSegment + size_t(at - step) * V::bytes));
  }
};

// Two such rows whose factors stay apart, `first` and the one `stride` further, by T tokens: add_steps, with the sums that row_sum has. One row
// after the other, so that sums and products of all tokens stay in registers.
template <class V, int T, class Row>
HEADRACE_APART void add_apart(const Row& first, size_t stride, const uint8_t* bytes, const Fine* x, size_t from, size_t to, float* out) {
  typename V::F sum[2][T];
  HEADRACE_UNROLL for (int r = 0; r < 2; r++) {
    const Row row = first.further(r * stride);
    const uint8_t* codes = bytes + r * kSegment;
    HEADRACE_UNROLL for (int t = 0; t < T; t++) sum[r][t] = V::zerof();
    const auto add = [&](size_t step, auto whole) __attribute__((always_inline)) {
      const auto factors = row.template pair_factors<decltype(whole)::value>(step);
      const uint8_t* own = codes + (step - from) * 2 * V::bytes;
      const auto even = V::load(own), odd = V::load(own + V::bytes);
      HEADRACE_UNROLL for (int t = 0; t < T; t++) sum[r][t] = add_pairs<V, Row::kBits>(sum[r][t], even, odd, factors, x[t].apart, step);
    };
    size_t step = from;
    for (const size_t last = std::min(to, row.columns / (2 * V::bytes)); step < last; step++) add(step, Number<1>());
    if (step < to) add(step, Number<0>());
  }
  HEADRACE_UNROLL for (int t = 0; t < T; t++) {
    float* at = out + t * V::lanes * V::lanes;
    const auto two = V::template merge<0>(sum[0][t], sum[1][t]);
    V::storef(at, from ? V::add(V::loadf(at), two) : two);
  }
}

// Columns from … to - 1 of some rows, `from` a multiple of V::bytes, to rows of `out` in whole vectors.
template <class V, int Bits, int Block>
HEADRACE_APART void unpack_rows(const PlaneRow<V, Bits, Block>& first, size_t stride, int rows, size_t from, size_t to, uint8_t* out) {
  constexpr size_t bytes = V::bytes;
  for (int r = 0; r < rows; r++, out += kSegment) {
    const auto row = first.further(r * stride);
    __builtin_prefetch(row.factors + row.factors_ahead, 0, 2);
    size_t column = from;
    if constexpr (PlaneRow<V, Bits, Block>::apart) {  // even and odd columns of a step
      const auto store = [&](auto whole) __attribute__((always_inline)) {
        typename V::I even, odd;
        row.template pair_codes<decltype(whole)::value>(column / (2 * bytes), even, odd);
        V::store(out + column - from, even), V::store(out + column - from + bytes, odd);
      };
      for (const size_t last = std::min(to, row.columns / (2 * bytes) * 2 * bytes); column < last; column += 2 * bytes) {
        if (column % 128 == 0) row.read_ahead(column);
        store(Number<1>());
      }
      if (column < to) store(Number<0>());
      continue;
    }
    for (const size_t last = std::min(to, row.whole()); column + 128 <= last; column += 128) {
      row.read_ahead(column);
      HEADRACE_UNROLL for (int step = 0; step < int(128 / bytes); step++)
          V::store(out + column - from + step * bytes, row.template load<true>(column, step));
    }
    for (; column < to; column += bytes) V::store(out + column - from, row.at(column));
  }
}

template <class V, int Bits, int Block>
inline void decode_planes(const Weight& w, const Fine* x, int m, int begin, int end, const Out& out, int column) {
  constexpr bool apart = PlaneRow<V, Bits, Block>::apart;
  using S = Steps<V, apart ? 4 : 8>;
  constexpr int together = V::lanes < 4 ? V::lanes : 4, size = V::lanes * V::lanes;
  alignas(64) float lanes[kMostTokens * size];
  alignas(64) uint8_t bytes[together * kSegment];
  const size_t ahead = columns_ahead(w, m == 1 ? 2 : together);
  const PlaneRow<V, Bits, Block> top(w, begin, ahead);
  vectors_of_rows<V>(begin, end, [&](int n, int stride) {
    const auto own = top.further(n - begin);
    for (int first = 0; first < m; first += kMostTokens) {
      const int tokens = std::min(m - first, kMostTokens);
      for (int from = 0; from < w.k; from += kSegment) {
        const int to = std::min(from + kSegment, w.k), step = from / S::columns, end_step = int(round_up(to, S::columns)) / S::columns;
        if (tokens == 1) {
          if constexpr (apart) single_rows<V, Bits, Block>(own, stride, x[first].apart, step, end_step, lanes);
          else single_rows<V, Bits, Block>(own, stride, x[first].eight, step, end_step, lanes);
          continue;
        }
        for (int r = 0; r < V::lanes; r += together) {
          const auto some = own.further(r * stride);
          unpack_rows<V, Bits, Block>(some, stride, together, from, to, bytes);
          if constexpr (apart) {
            few_at_a_time<4>(tokens, [&](auto number, int t) {
              for (int i = 0; i < together; i += 2)
                add_apart<V, decltype(number)::value>(some.further(i * stride), stride, bytes + i * kSegment, x + first + t, step, end_step,
                                                      lanes + t * size + (r + i) / 2 * V::lanes);
            });
            continue;
          }
          const UnpackedRows<V> rows{bytes, r, step};
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
