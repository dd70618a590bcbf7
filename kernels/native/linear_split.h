// Linears of few tokens whose weights are split and have one scale a row: a few rows at a time become bytes in the first
// level of the cache, which all tokens share. As many tokens as have their sums in registers take rows as they come, up to four or eight;
// five to seven would unpack them twice.
#pragma once
#include "linear_rows.h"

namespace headrace {
namespace {

// `run` for the steps of a row from `from` to `to` - 1: run(step, whether all of it exists); codes ahead come on their way.
template <class Row, class Run>
__attribute__((always_inline)) inline void steps_of(const Row& row, size_t from, size_t to, const Run& run) {
  const size_t whole = std::min(to, row.columns / Row::kStep);
  size_t step = from;
  for (; step < whole; step++) row.read_ahead(step), run(step, Number<1>());
  if (step < to) run(step, Number<0>());
}

// What a row's step adds to its sum, spread over lanes. Where factors stay apart, four products, of two even columns and two odd ones,
// fit an int16 with their start.
template <class V, class Row>
__attribute__((always_inline)) inline typename V::F add_step(typename V::F sum, typename V::I even, typename V::I odd, typename V::I factors,
                                                             const SplitStep<V>& x) {
  const auto first = V::load(x.codes), second = V::load(x.codes + V::bytes);
  typename V::I product = V::zero();
  if constexpr (Row::apart) {
    const auto four = V::add16(V::pair_products(even, first), V::pair_products(odd, second));
    product = V::dot16(product, V::add16(four, V::load(x.start)), factors);
  } else {
    if constexpr (!V::signed_bytes) product = V::load(x.start);
    product = V::dot_bytes(V::dot_bytes(product, even, first), odd, second);
  }
  return V::fma(V::to_float(product), V::loadf(x.scales), sum);
}

// The factors that add_step takes.
template <class V, bool Whole, class Row>
__attribute__((always_inline)) inline typename V::I factors_for(const Row& row, size_t step) {
  if constexpr (Row::apart) return row.template factor_pairs<Whole>(step);
  else return V::zero();
}

// A row by T tokens.
template <class V, int T, class Row>
__attribute__((always_inline)) inline void row_sums(const Row& row, const typename Row::HighBits& bits, const SplitStep<V>* x, size_t together,
                                                    size_t from, size_t to, typename V::F (&sum)[T]) {
  HEADRACE_UNROLL for (int t = 0; t < T; t++) sum[t] = V::zerof();
  steps_of(row, from, to, [&](size_t step, auto whole) __attribute__((always_inline)) {
    constexpr bool all = decltype(whole)::value;
    typename V::I even, odd;
    row.template load<all>(bits, step, even, odd);
    const auto factors = factors_for<V, all>(row, step);
    HEADRACE_UNROLL for (int t = 0; t < T; t++) sum[t] = add_step<V, Row>(sum[t], even, odd, factors, x[step * together + t]);
  });
}

// V::lanes rows, `stride` apart, by T tokens; sums of two rows lie in a vector, lanes[t][vector][lane].
template <class V, int T, class Row>
HEADRACE_APART void few_rows(const Row& first, size_t stride, const Fine* x, size_t from, size_t to, float* lanes) {
  const typename Row::HighBits bits;
  const SplitStep<V>* const own = SplitStep<V>::of(*x, Row::kBits);
  const size_t together = x->together;
  for (size_t r = 0; r < V::lanes; r += 2, lanes += V::lanes) {
    const auto row = first.further(r * stride);
    __builtin_prefetch(row.factors + row.factors_ahead, 0, 2);
    typename V::F one[T], other[T];
    row_sums<V, T>(row, bits, own, together, from, to, one), row_sums<V, T>(row.further(stride), bits, own, together, from, to, other);
    HEADRACE_UNROLL for (int t = 0; t < T; t++) {
      const auto two = V::template merge<0>(one[t], other[t]);
      float* at = lanes + t * V::lanes * V::lanes;
      V::storef(at, from ? V::add(V::loadf(at), two) : two);
    }
  }
}

// Columns of some rows from step `from` to `to` - 1, to rows of `out`.
template <class V, class Row>
HEADRACE_APART void unpack_rows(const Row& first, size_t stride, int rows, size_t from, size_t to, uint8_t* out) {
  const typename Row::HighBits bits;
  for (int r = 0; r < rows; r++, out += kSegment) {
    const auto row = first.further(r * stride);
    __builtin_prefetch(row.factors + row.factors_ahead, 0, 2);
    steps_of(row, from, to, [&](size_t step, auto whole) __attribute__((always_inline)) {
      typename V::I even, odd;
      row.template load<decltype(whole)::value>(bits, step, even, odd);
      uint8_t* at = out + (step - from) * Row::kStep;
      V::store(at, even), V::store(at + V::bytes, odd);
    });
  }
}

// R such rows, the first one and those `stride` further, by T tokens; sums are those that row_sums has, of two rows to a vector. Where few registers
// are there, one row goes after the other, so that sums of all tokens stay in them.
template <class V, int R, int T, class Row>
HEADRACE_APART void add_rows(const Row& first, size_t stride, const uint8_t* bytes, const Fine* x, size_t from, size_t to, float* out) {
  constexpr int together = Row::apart ? 1 : R;
  const SplitStep<V>* const steps = SplitStep<V>::of(*x, Row::kBits);
  typename V::F sum[R][T];
  HEADRACE_UNROLL for (int r = 0; r < R; r++) HEADRACE_UNROLL for (int t = 0; t < T; t++) sum[r][t] = V::zerof();
  HEADRACE_UNROLL for (int r = 0; r < R; r += together) {
    const Row row = first.further(r * stride);
    const auto add = [&](size_t step, auto whole) __attribute__((always_inline)) {
      const uint8_t* own = bytes + r * kSegment + (step - from) * Row::kStep;
      const auto factors = factors_for<V, decltype(whole)::value>(row, step);
      typename V::I even[together], odd[together];
      HEADRACE_UNROLL for (int i = 0; i < together; i++)
          even[i] = V::kept(V::load(own + i * kSegment)), odd[i] = V::kept(V::load(own + i * kSegment + V::bytes));
      HEADRACE_UNROLL for (int t = 0; t < T; t++) HEADRACE_UNROLL for (int i = 0; i < together; i++)
          sum[r + i][t] = add_step<V, Row>(sum[r + i][t], even[i], odd[i], factors, steps[step * x->together + t]);
    };
    const size_t whole = std::min(to, row.columns / Row::kStep);
    for (size_t step = from; step < whole; step++) add(step, Number<1>());
    if (whole < to) add(whole, Number<0>());
  }
  HEADRACE_UNROLL for (int t = 0; t < T; t++) HEADRACE_UNROLL for (int i = 0; i < R / 2; i++) {
    float* at = out + (t * V::lanes + i) * V::lanes;
    const auto two = V::template merge<0>(sum[2 * i][t], sum[2 * i + 1][t]);
    V::storef(at, from ? V::add(V::loadf(at), two) : two);
  }
}

template <class V, int Bits, int Block>
inline void decode_split(const Weight& w, const Fine* x, int m, int begin, int end, const Out& out, int column) {
  using Row = SplitRow<V, Bits, Block>;
  constexpr bool narrow = V::bytes < 64;  // a wide vector's loads of activations are what rows together share
  constexpr int together = 4, at_once = narrow ? 2 : 4;  // rows
  constexpr int size = V::lanes * V::lanes;
  alignas(64) float lanes[kFew * size];
  alignas(64) uint8_t bytes[together * kSegment];
  const Row top(w, begin, columns_ahead(w, m == 1 ? 2 : together));
  vectors_of_rows<V>(begin, end, [&](int n, int stride) {
    const auto own = top.further(n - begin);
    for (int first = 0; first < m; first += kFew) {
      const int tokens = std::min(m - first, kFew);
      for (int segment = 0; segment < w.k; segment += kSegment) {
        const size_t from = segment / Row::kStep, to = round_up(std::min(segment + kSegment, w.k), Row::kStep) / Row::kStep;
        if (tokens == 1 || (narrow && (tokens <= 4 || tokens == kFew))) {
          few_at_a_time<narrow ? kFew : 1>(tokens, [&](auto number, int t) {
            few_rows<V, decltype(number)::value>(own, stride, x + first + t, from, to, lanes + t * size);
          });
          continue;
        }
        for (int r = 0; r < V::lanes; r += together) {
          const auto some = own.further(r * stride);
          unpack_rows<V>(some, stride, together, from, to, bytes);
          few_at_a_time<4>(tokens, [&](auto number, int t) {
            for (int i = 0; i < together; i += at_once)
              add_rows<V, at_once, decltype(number)::value>(some.further(i * stride), stride, bytes + i * kSegment, x + first + t, from, to,
                                                            lanes + t * size + (r + i) / 2 * V::lanes);
          });
        }
      }
      write_sums<V>(w, n, stride, first, tokens, lanes, [](int) { return 1.0f; }, out, column + n - begin);
    }
  });
}

}  // namespace
}  // namespace headrace
