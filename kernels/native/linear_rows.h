// Linears of few tokens whose weights have one scale a row. Sums stay spread over lanes until a row's end.
#pragma once
#include <algorithm>
#include <cstring>

#include "products.h"

namespace headrace {
namespace {

constexpr int kLong = 4096;  // columns beyond which one token's activations do not stay in the first level

// Rows that share loads of activations. A vector is loaded in the time of a product of four bytes, so few rows wait for loads; a single
// token waits for memory, which is read fastest in two streams, but with long rows for activations instead.
template <class V>
constexpr int rows_at_once(int tokens, bool long_rows) {
  if (V::bytes < 64) return 2;
  if (tokens == 1) return long_rows ? 8 : 2;
  return 4;
}

// R rows from `row` on by T tokens over the columns of a segment from step `from` to `to` - 1, of a row's whole `steps`; sums, those of two rows to a vector, lie in
// out[t][vector][lane] and begin anew with the first. Products of two steps that share scales are added first.
template <class V, int Bits, int R, int T, class Rows>
HEADRACE_APART void add_steps(const Rows& rows, int row, const Fine* x, int from, int to, int steps, float* out) {
  using S = Steps<V, Bits>;
  using I = typename V::I;
  using F = typename V::F;
  constexpr int N = vectors_of<V, Bits>(R), pairs = R / 2;
  const int whole = std::min(to, steps);
  Sum<V, Bits> sum[T][N];
  HEADRACE_UNROLL for (int t = 0; t < T; t++) HEADRACE_UNROLL for (int i = 0; i < N; i++) {
    if constexpr (Bits == 4) sum[t][i] = V::load(x[t].four.segments + from / (kSegment / S::columns) * V::lanes);
    else sum[t][i] = V::zerof();
  }
  const auto add = [&](int s, const auto& first, auto has_second, const auto& second) __attribute__((always_inline)) {
    HEADRACE_UNROLL for (int t = 0; t < T; t++) {
      I start = V::zero(), product[R];
      if constexpr (Bits != 4) start = start_of_pairs<V>(x[t].eight, s);
      HEADRACE_UNROLL for (int r = 0; r < R; r++) product[r] = start;
      first.dot(S::codes(x[t], s), product);
      if constexpr (decltype(has_second)::value) second.dot(S::codes(x[t], s + S::apart), product);
      add_scaled<V, Bits, R>(x[t], s, product, sum[t]);
    }
  };
  using Whole = Columns<V, Bits, R, true>;
  const auto with_columns = [&](int s, auto&& use) __attribute__((always_inline)) {
    if (s < whole) use(Whole(rows, row, s));
    else use(Columns<V, Bits, R, false>(rows, row, s));
  };
  int unit = from;
  for (; unit + 2 * S::apart <= whole; unit += 2 * S::apart)
    HEADRACE_UNROLL for (int s = unit; s < unit + S::apart; s++)
        add(s, Whole(rows, row, s), Number<1>(), Whole(rows, row, s + S::apart));
  for (int s = unit; s < to && s < unit + S::apart; s++)
    with_columns(s, [&](const auto& first) __attribute__((always_inline)) {
      if (s + S::apart >= to) return add(s, first, Number<0>(), first);
      with_columns(s + S::apart, [&](const auto& second) __attribute__((always_inline)) { add(s, first, Number<1>(), second); });
    });
  HEADRACE_UNROLL for (int t = 0; t < T; t++) HEADRACE_UNROLL for (int i = 0; i < pairs; i++) {
    float* at = out + (t * V::lanes + i) * V::lanes;
    F two;
    if constexpr (Bits == 4) two = V::to_float(sum[t][i]);
    else two = V::template merge<0>(sum[t][2 * i], sum[t][2 * i + 1]);
    V::storef(at, from ? V::add(V::loadf(at), two) : two);
  }
}

// Sums over the lanes of rows, of which N vectors hold two each.
template <class V, int N>
inline typename V::F row_sums(const float* p) {
  typename V::F two[N];
  HEADRACE_UNROLL for (int i = 0; i < N; i++) two[i] = V::loadf(p + i * V::lanes);
  return all_merged<V, 1>(two);
}

constexpr int kMostTokens = 8;  // whose sums are kept

// Results of V::lanes rows from n on for some tokens, from `first` on, whose sums are `lanes`.
template <class V, int Bits>
inline void write_sums(const Weight& w, int n, int stride, const Fine* x, int first, int tokens, const float* lanes, const Out& out, int column) {
  const auto scales = row_scales<V>(w, n, stride);
  for (int t = 0; t < tokens; t++) {
    const auto total = V::mul(row_sums<V, V::lanes / 2>(lanes + t * V::lanes * V::lanes), scales);
    write_rows<V, Bits>(w, n, stride ? V::lanes : 1, total, x[first + t], out.y + out.rows[first + t] * out.stride + column);
  }
}

// The same of rows in two places, `apart` rows from each other, of which sums lie in turn; of row n alone where `stride` of rows is 0.
template <class V, int Bits>
inline void write_paired(const Weight& w, int n, int stride, int apart, const Fine* x, int first, int tokens, const float* lanes, const Out& out,
                         int column) {
  if (!stride) return write_sums<V, Bits>(w, n, 0, x, first, tokens, lanes, out, column);
  constexpr int each = V::lanes / 2;
  const auto scales = V::template halves_of<each>(w.scale + n, apart);
  float both[V::lanes], bias[V::lanes] = {};
  if (w.bias) std::memcpy(bias, w.bias + n, sizeof both / 2), std::memcpy(bias + each, w.bias + n + apart, sizeof both / 2);
  for (int t = 0; t < tokens; t++) {
    const auto total = V::mul(V::evens_first(row_sums<V, each>(lanes + t * V::lanes * V::lanes)), scales);
    V::storef(both, with_scale_and_bias<V, Bits>(total, x[first + t], w.bias ? bias : nullptr));
    float* y = out.y + out.rows[first + t] * out.stride + column;
    std::memcpy(y, both, sizeof both / 2), std::memcpy(y + apart, both + each, sizeof both / 2);
  }
}

// All go over a segment of some rows one after the other, so that the rows' codes and the tokens' activations stay in the first
// level of the cache; a single token reads some rows from end to end. They are read in two streams far from each other, since a
// processor's prefetchers follow one in a page.
template <class V, int Bits>
inline void decode_rows(const Weight& w, const Fine* x, int m, int begin, int end, const Out& out, int column) {
  using S = Steps<V, Bits>;
  constexpr int size = V::lanes * V::lanes;
  alignas(64) float lanes[kMostTokens * size];
  halves_of_rows<V>(begin, end, rows_ahead(w), [&](int n, int stride, int apart, int ahead) {
    const PairedRows<V> rows(w, n, stride, apart, size_t(ahead) * w.k);
    for (int first = 0; first < m; first += kMostTokens) {
      const int tokens = std::min(m - first, kMostTokens);
      // Rows from … to - 1 over one segment.
      const auto add = [&](int segment, int from, int to) {
        const int last = int(round_up(std::min(segment + kSegment, w.k), S::columns));
        few_at_a_time<4>(tokens, [&](auto number, int t) {
          constexpr int T = decltype(number)::value;
          const auto run = [&](auto at_once) {
            constexpr int R = decltype(at_once)::value;
            for (int r = from; r < to; r += R)
              add_steps<V, Bits, R, T>(rows, r, x + first + t, segment / S::columns, last / S::columns, w.k / S::columns,
                                       lanes + t * size + r / 2 * V::lanes);
          };
          if (w.k > kLong) run(Number<rows_at_once<V>(T, true)>());
          else run(Number<rows_at_once<V>(T, false)>());
        });
      };
      const int together = tokens > 1 ? V::lanes : rows_at_once<V>(1, w.k > kLong);
      for (int r = 0; r < V::lanes; r += together)
        for (int segment = 0; segment < w.k; segment += kSegment) add(segment, r, r + together);
      write_paired<V, Bits>(w, n, stride, apart, x, first, tokens, lanes, out, column + n - begin);
    }
  });
}

}  // namespace
}  // namespace headrace
