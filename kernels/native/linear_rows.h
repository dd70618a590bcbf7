// Linears of few tokens whose weights have one scale a row. Sums stay integers, spread over lanes, until a segment ends.
#pragma once
#include <algorithm>
#include <cstring>

#include "products.h"

namespace headrace {
namespace {

constexpr int kLong = 4096;           // columns beyond which one token's activations, beside eight rows, do not stay in the first level
constexpr int kTogetherLong = 16384;  // columns of all tokens beyond which several do not, beside a row or two

// Rows that are written together. A vector is loaded in the time of a product of four bytes, so few rows that share it wait for loads; a
// single token waits for memory, which is read fastest in two streams, but with long rows for activations instead.
template <class V>
constexpr int rows_at_once(int tokens, bool long_rows) {
  if (V::bytes < 64) return 2;
  if (tokens == 1) return long_rows ? 8 : 2;
  return 4;
}

// Of these R rows, how many share loads of T tokens' activations: those whose sums and codes are in registers. Where rows are apart one,
// since an instruction that loads what it multiplies takes no longer than one that does not; but one or two tokens wait for memory.
template <class V, int Bits>
constexpr int rows_together(int R, int T) {
  if (rows_apart<V>) return T > 2 ? 1 : R;
  if (Bits == 4) return R;
  while (R > 1 && R * (2 * T + 1) + 2 > V::registers) R /= 2;
  return R;
}

// Most tokens at a time.
template <class V>
constexpr int tokens_at_once = rows_apart<V> ? kFew : 4;

// Vectors that R rows' sums by a token are.
template <class V, int Bits>
constexpr int sums_of(int R) { return Bits == 8 ? wide_vectors<V> * R : rows_apart<V> ? R : vectors_of<V, Bits>(R); }

// Steps of 4 bits, `from` to `to` - 1 of a row's whole `steps`, of G rows by T tokens. Products of two steps that share factors are added
// first: they fit an int16, so that those of two rows, or of pairs, can be multiplied with factors and merged at once.
template <class V, int G, int T, class Rows, int N>
__attribute__((always_inline)) inline void add_nibbles(const Rows& rows, int row, const Fine* x, int from, int to, int steps,
                                                       typename V::I (&sum)[T][N]) {
  using S = Steps<V, 4>;
  using I = typename V::I;
  const int whole = std::min(to, steps);
  const size_t further = x->together;
  const FactorStep<V>* const own = FactorStep<V>::of(*x);
  const auto add = [&](int s, const auto& first, auto has_second, const auto& second) __attribute__((always_inline)) {
    const FactorStep<V>*one = own + s * further, *other = own + (s + S::apart) * further;
    HEADRACE_UNROLL for (int t = 0; t < T; t++) {
      I product[G];
      HEADRACE_UNROLL for (int r = 0; r < G; r++) product[r] = V::zero();
      if constexpr (rows_apart<V>) {
        first.dot_pairs(one[t].codes, product);
        if constexpr (decltype(has_second)::value) second.dot_pairs(other[t].codes, product);
      } else {
        first.dot(one[t].codes, product);
        if constexpr (decltype(has_second)::value) second.dot(other[t].codes, product);
      }
      const I factors = V::load(one[t].factors);
      HEADRACE_UNROLL for (int i = 0; i < N; i++) {
        if constexpr (rows_apart<V>) sum[t][i] = V::dot16(sum[t][i], product[i], factors);
        else sum[t][i] = V::dot16(sum[t][i], V::pack16(product[2 * i], product[2 * i + 1]), factors);
      }
    }
  };
  using Whole = Columns<V, 4, G, true>;
  const auto with_columns = [&](int s, auto&& use) __attribute__((always_inline)) {
    if (s < whole) use(Whole(rows, row, s));
    else use(Columns<V, 4, G, false>(rows, row, s));
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
}

// The same of 8 bits by int16: bytes widen, or both bytes of the int16 are multiplied, each with its own sum.
template <class V, int G, int T, class Rows, int N>
__attribute__((always_inline)) inline void add_bytes(const Rows& rows, int row, const Fine* x, int from, int to, int steps,
                                                     typename V::I (&sum)[T][N]) {
  using I = typename V::I;
  const int whole = std::min(to, steps);
  const size_t further = x->together;
  const WideStep<V>* const own = WideStep<V>::of(*x);
  const auto add = [&](int s, const I(&codes)[G]) __attribute__((always_inline)) {
    const WideStep<V>* one = own + s * further;
    if constexpr (rows_apart<V>) {
      HEADRACE_UNROLL for (int half = 0; half < 2; half++) {
        I wide[G];
        HEADRACE_UNROLL for (int r = 0; r < G; r++) wide[r] = V::widened(codes[r], half);
        HEADRACE_UNROLL for (int t = 0; t < T; t++) {
          const I own = V::load(one[t].codes + half * V::bytes / 2);
          // gcc may not know what sums are: it would multiply more before it adds than there are registers.
          HEADRACE_UNROLL for (int r = 0; r < G; r++) sum[t][r] = V::kept_there(V::dot16(sum[t][r], wide[r], own));
        }
      }
    } else {
      HEADRACE_UNROLL for (int t = 0; t < T; t++) HEADRACE_UNROLL for (int part = 0; part < 2; part++) {
        const I bytes = V::load(one[t].codes + part * V::bytes / 2);
        HEADRACE_UNROLL for (int r = 0; r < G; r++) sum[t][2 * r + part] = V::dot_bytes(sum[t][2 * r + part], codes[r], bytes);
      }
    }
  };
  const auto load = [&](int s, auto is_whole) __attribute__((always_inline)) {
    I codes[G];
    HEADRACE_UNROLL for (int r = 0; r < G; r++) codes[r] = rows.template load<decltype(is_whole)::value>(row + r, s);
    add(s, codes);
  };
  int s = from;
  for (; s + 2 <= whole; s += 2) load(s, Number<1>()), load(s + 1, Number<1>());
  for (; s < whole; s++) load(s, Number<1>());
  if (whole < to) load(whole, Number<0>());
}

// R rows from `row` on by T tokens over the columns of a segment; sums, those of two rows to a vector, lie in out[t][vector][lane] and begin
// anew with the first.
template <class V, int Bits, int R, int T, class Rows>
HEADRACE_APART void add_segment(const Rows& rows, int row, const Weight& w, const Fine* x, int segment, float* out) {
  using I = typename V::I;
  using F = typename V::F;
  constexpr int columns = Steps<V, Bits>::columns, G = rows_together<V, Bits>(R, T), N = sums_of<V, Bits>(G), all = R / G * N;
  const int from = segment / columns, to = int(round_up(std::min(segment + segment_of(Bits), w.k), columns)) / columns;
  I sums[T][all];
  HEADRACE_UNROLL for (int g = 0; g < R / G; g++) {
    I sum[T][N];
    HEADRACE_UNROLL for (int t = 0; t < T; t++) HEADRACE_UNROLL for (int i = 0; i < N; i++) {
      if constexpr (Bits == 4) sum[t][i] = V::load(x[t].four.segments + segment / segment_of(Bits) * V::lanes);
      else sum[t][i] = V::load(x[t].wide.segments + (segment / segment_of(Bits) * wide_vectors<V> + i % wide_vectors<V>) * V::lanes);
    }
    if constexpr (Bits == 4) add_nibbles<V, G, T>(rows, row + g * G, x, from, to, w.k / columns, sum);
    else add_bytes<V, G, T>(rows, row + g * G, x, from, to, w.k / columns, sum);
    HEADRACE_UNROLL for (int t = 0; t < T; t++) HEADRACE_UNROLL for (int i = 0; i < N; i++) sums[t][g * N + i] = sum[t][i];
  }
  HEADRACE_UNROLL for (int t = 0; t < T; t++) HEADRACE_UNROLL for (int i = 0; i < R / 2; i++) {
    const auto row_sum = [&](int r) {
      if constexpr (wide_vectors<V> == 1) return V::to_float(sums[t][r]);
      else return V::to_float(V::add32(V::mul32(sums[t][2 * r], V::set32(256)), sums[t][2 * r + 1]));
    };
    F two;
    if constexpr (Bits == 8) two = V::template merge<0>(row_sum(2 * i), row_sum(2 * i + 1));
    else if constexpr (rows_apart<V>) two = V::to_float(V::template merge<0>(sums[t][2 * i], sums[t][2 * i + 1]));
    else two = V::to_float(sums[t][i]);
    float* at = out + (t * V::lanes + i) * V::lanes;
    V::storef(at, segment ? V::add(V::loadf(at), two) : two);
  }
}

// Sums over the lanes of rows, of which N vectors hold two each.
template <class V, int N>
inline typename V::F row_sums(const float* p) {
  typename V::F two[N];
  HEADRACE_UNROLL for (int i = 0; i < N; i++) two[i] = V::loadf(p + i * V::lanes);
  return all_merged<V, 1>(two);
}

// Results of V::lanes rows from n on for some tokens, from `first` on, whose sums are `lanes`; scale_of: a token's.
template <class V, class ScaleOf>
inline void write_sums(const Weight& w, int n, int stride, int first, int tokens, const float* lanes, const ScaleOf& scale_of, const Out& out,
                       int column) {
  const auto scales = row_scales<V>(w, n, stride);
  for (int t = 0; t < tokens; t++) {
    const auto total = V::mul(row_sums<V, V::lanes / 2>(lanes + t * V::lanes * V::lanes), scales);
    write_rows<V>(w, n, stride ? V::lanes : 1, total, scale_of(first + t), out.y + out.rows[first + t] * out.stride + column);
  }
}

// The same of rows in two places, `apart` rows from each other, of which sums lie in turn; of row n alone where `stride` of rows is 0.
template <class V, class ScaleOf>
inline void write_paired(const Weight& w, int n, int stride, int apart, int first, int tokens, const float* lanes, const ScaleOf& scale_of,
                         const Out& out, int column) {
  if (!stride) return write_sums<V>(w, n, 0, first, tokens, lanes, scale_of, out, column);
  constexpr int each = V::lanes / 2;
  const auto scales = V::template halves_of<each>(w.scale + n, apart);
  float both[V::lanes], bias[V::lanes] = {};
  if (w.bias) std::memcpy(bias, w.bias + n, sizeof both / 2), std::memcpy(bias + each, w.bias + n + apart, sizeof both / 2);
  for (int t = 0; t < tokens; t++) {
    const auto sums = V::mul(V::evens_first(row_sums<V, each>(lanes + t * V::lanes * V::lanes)), scales);
    const auto total = V::mul(sums, V::setf(scale_of(first + t)));
    V::storef(both, w.bias ? V::add(total, V::loadf(bias)) : total);
    float* y = out.y + out.rows[first + t] * out.stride + column;
    std::memcpy(y, both, sizeof both / 2), std::memcpy(y + apart, both + each, sizeof both / 2);
  }
}

// Where they are long together, tokens go over a segment of some rows one after the other, so that the rows' codes and the tokens'
// activations stay in the first level of the cache; else over some rows from end to end, which memory gives sooner. Rows are read in two streams far from each other, since a
// processor's prefetchers follow one in a page.
template <class V, int Bits>
inline void decode_rows(const Weight& w, const Fine* x, int m, int begin, int end, const Out& out, int column) {
  constexpr int size = V::lanes * V::lanes;
  alignas(64) float lanes[kFew * size];
  halves_of_rows<V>(begin, end, rows_ahead(w), [&](int n, int stride, int apart, int ahead) {
    const PairedRows<V> rows(w, n, stride, apart, size_t(ahead) * w.k);
    for (int first = 0; first < m; first += kFew) {
      const int tokens = std::min(m - first, kFew);
      // Rows from … to - 1 over one segment.
      const auto add = [&](int segment, int from, int to) {
        few_at_a_time<tokens_at_once<V>>(tokens, [&](auto number, int t) {
          constexpr int T = decltype(number)::value;
          const auto run = [&](auto at_once) {
            constexpr int R = decltype(at_once)::value;
            for (int r = from; r < to; r += R)
              add_segment<V, Bits, R, T>(rows, r, w, x + first + t, segment, lanes + t * size + r / 2 * V::lanes);
          };
          if (w.k > kLong) run(Number<rows_at_once<V>(T, true)>());
          else run(Number<rows_at_once<V>(T, false)>());
        });
      };
      const int together = tokens > 1 && tokens * w.k > kTogetherLong ? V::lanes : rows_at_once<V>(tokens, w.k > kLong);
      for (int r = 0; r < V::lanes; r += together)
        for (int segment = 0; segment < w.k; segment += segment_of(Bits)) add(segment, r, r + together);
      const auto scale_of = [&](int t) { return Bits == 4 ? x[t].four.scale : x[t].wide.scale; };
      write_paired<V>(w, n, stride, apart, first, tokens, lanes, scale_of, out, column + n - begin);
    }
  });
}

}  // namespace
}  // namespace headrace
