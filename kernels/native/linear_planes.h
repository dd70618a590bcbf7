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

// Sums of four products of a step whose factors stay apart, of two even columns and two odd ones, with their start: they fit an int16.
template <class V, int Bits>
__attribute__((always_inline)) inline typename V::I four_products(typename V::I even, typename V::I odd, const ApartCodes& x, size_t step) {
  const int8_t* own = x.codes + step * 2 * V::bytes;
  const auto products = V::add16(V::pair_products(even, V::load(own)), V::pair_products(odd, V::load(own + V::bytes)));
  return V::add16(products, V::load(x.starts[Bits - 5] + step * 2 * V::lanes));
}

// What a unit of such a row, of two steps, adds to its sum: columns half a unit apart share a scale and meet in an int32, times their factors.
template <class V>
__attribute__((always_inline)) inline typename V::F add_unit(typename V::F sum, typename V::I first, typename V::I second,
                                                             const typename V::I (&factors)[2], const ApartCodes& x, size_t unit) {
  const float* scales = x.scales + unit * 2 * V::lanes;
  sum = V::fma(V::to_float(V::dot16(V::zero(), V::low_pairs(first, second), factors[0])), V::loadf(scales), sum);
  return V::fma(V::to_float(V::dot16(V::zero(), V::high_pairs(first, second), factors[1])), V::loadf(scales + V::lanes), sum);
}

// `run` for the units of a row from `from` to `to` - 1: run(unit, whether all of it exists, how many of its steps exist).
template <class Row, class Run>
__attribute__((always_inline)) inline void units_of(const Row& row, size_t from, size_t to, const Run& run) {
  size_t unit = from;
  for (const size_t whole = std::min(to, row.columns / unit_of(8)); unit < whole; unit++) run(unit, Number<1>(), Number<2>());
  if (unit == to) return;
  if (row.columns - unit * unit_of(8) <= unit_of(8) / 2) run(unit, Number<0>(), Number<1>());
  else run(unit, Number<0>(), Number<2>());
}

// Codes of a step of such a row.
template <class V, bool Whole, class Row>
__attribute__((always_inline)) inline void load_step(const Row& row, size_t step, typename V::I& even, typename V::I& odd) {
  if (Whole || (step + 1) * 2 * V::bytes <= row.columns) row.template pair_codes<true>(step, even, odd);
  else row.template pair_codes<false>(step, even, odd);
}

template <class V, class Row>
__attribute__((always_inline)) inline typename V::F row_sum(const Row& row, const ApartCodes& x, size_t from, size_t to) {
  auto sum = V::zerof();
  units_of(row, from, to, [&](size_t unit, auto whole, auto steps) __attribute__((always_inline)) {
    typename V::I product[2] = {V::zero(), V::zero()}, factors[2];
    row.read_ahead(unit * unit_of(8));
    HEADRACE_UNROLL for (int i = 0; i < decltype(steps)::value; i++) {
      typename V::I even, odd;
      load_step<V, decltype(whole)::value>(row, 2 * unit + i, even, odd);
      product[i] = four_products<V, Row::kBits>(even, odd, x, 2 * unit + i);
    }
    row.template unit_factors<decltype(whole)::value>(unit, factors);
    sum = add_unit<V>(sum, product[0], product[1], factors, x, unit);
  });
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
    units_of(row, from, to, [&](size_t unit, auto whole, auto steps) __attribute__((always_inline)) {
      typename V::I product[T][2], factors[2];
      row.template unit_factors<decltype(whole)::value>(unit, factors);
      HEADRACE_UNROLL for (int i = 0; i < 2; i++) {
        const uint8_t* own = codes + (2 * (unit - from) + i) * 2 * V::bytes;
        const bool exists = i < decltype(steps)::value;
        const auto even = V::load(own), odd = V::load(own + V::bytes);
        HEADRACE_UNROLL for (int t = 0; t < T; t++)
            product[t][i] = exists ? four_products<V, Row::kBits>(even, odd, x[t].apart, 2 * unit + i) : V::zero();
      }
      HEADRACE_UNROLL for (int t = 0; t < T; t++) sum[r][t] = add_unit<V>(sum[r][t], product[t][0], product[t][1], factors, x[t].apart, unit);
    });
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
    for (const size_t last = std::min(to, row.whole()); column + 128 <= last; column += 128) {
      row.read_ahead(column);
      HEADRACE_UNROLL for (int step = 0; step < int(128 / bytes); step++)
          V::store(out + column - from + step * bytes, row.template load<true>(column, step));
    }
    for (; column < to; column += bytes) V::store(out + column - from, row.at(column));
  }
}

// The same of rows whose factors stay apart, in steps of even columns and odd ones; what of a last unit does not exist stays as it was.
template <class V, int Bits, int Block>
HEADRACE_APART void unpack_steps(const PlaneRow<V, Bits, Block>& first, size_t stride, int rows, size_t from, size_t to, uint8_t* out) {
  for (int r = 0; r < rows; r++, out += kSegment) {
    const auto row = first.further(r * stride);
    __builtin_prefetch(row.factors + row.factors_ahead, 0, 2);
    units_of(row, from, to, [&](size_t unit, auto whole, auto steps) __attribute__((always_inline)) {
      row.read_ahead(unit * unit_of(8));
      HEADRACE_UNROLL for (int i = 0; i < decltype(steps)::value; i++) {
        typename V::I even, odd;
        load_step<V, decltype(whole)::value>(row, 2 * unit + i, even, odd);
        uint8_t* at = out + (2 * (unit - from) + i) * 2 * V::bytes;
        V::store(at, even), V::store(at + V::bytes, odd);
      }
    });
  }
}

template <class V, int Bits, int Block>
inline void decode_planes(const Weight& w, const Fine* x, int m, int begin, int end, const Out& out, int column) {
  constexpr bool apart = PlaneRow<V, Bits, Block>::apart;
  constexpr int columns = apart ? unit_of(8) : Steps<V, 8>::columns;  // of a step
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
        const int to = std::min(from + kSegment, w.k), step = from / columns, end_step = int(round_up(to, columns)) / columns;
        if (tokens == 1) {
          if constexpr (apart) single_rows<V, Bits, Block>(own, stride, x[first].apart, step, end_step, lanes);
          else single_rows<V, Bits, Block>(own, stride, x[first].eight, step, end_step, lanes);
          continue;
        }
        for (int r = 0; r < V::lanes; r += together) {
          const auto some = own.further(r * stride);
          if constexpr (apart) {
            unpack_steps<V, Bits, Block>(some, stride, together, step, end_step, bytes);
            few_at_a_time<4>(tokens, [&](auto number, int t) {
              for (int i = 0; i < together; i += 2)
                add_apart<V, decltype(number)::value>(some.further(i * stride), stride, bytes + i * kSegment, x + first + t, step, end_step,
                                                      lanes + t * size + (r + i) / 2 * V::lanes);
            });
          } else {
            unpack_rows<V, Bits, Block>(some, stride, together, from, to, bytes);
            const UnpackedRows<V> rows{bytes, r, step};
            few_at_a_time<4>(tokens, [&](auto number, int t) {
              constexpr int T = decltype(number)::value, R = rows_at_once<V>(T, false) < together ? rows_at_once<V>(T, false) : together;
              for (int i = r; i < r + together; i += R)
                add_steps<V, 8, R, T>(rows, i, x + first + t, step, end_step, end_step, lanes + t * size + i / 2 * V::lanes);
            });
          }
        }
      }
      write_sums<V, 8>(w, n, stride, x, first, tokens, lanes, out, column + n - begin);
    }
  });
}

}  // namespace
}  // namespace headrace
