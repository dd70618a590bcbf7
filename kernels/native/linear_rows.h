// Linears of fine activations for weights with one scale a row, for any vector V: rows of packed codes are read once, straight
// from the file's pages, and multiplied with the high and the low bytes of int16 activations.
//
//   4 bits: a step is 2 * V::bytes columns; the low halves of a load's bytes are the even ones, the high halves the odd ones,
//           so the step's activations are the even columns and then the odd ones.
//   8 bits: a step is V::bytes columns, as they come.
//
// Sums of a row stay spread over lanes; those of V::lanes rows are added up together.
#pragma once
#include "elementwise.h"

namespace headrace {
namespace {

// A sum of products is 256 * high + low: an int32 for so many columns, whatever the codes, and a float beyond.
template <int Bits>
constexpr bool fits(int columns) { return columns <= (Bits == 4 ? 8192 : 512); }

template <class V, int Bits>
struct Steps {
  static constexpr int columns = Bits == 4 ? 2 * V::bytes : V::bytes;
  static constexpr int vectors = Bits == 4 ? 2 : 1;
  static const int8_t* high(const Fine& x) { return Bits == 4 ? x.high4 : x.high8; }
  static const int8_t* low(const Fine& x) { return Bits == 4 ? x.low4 : x.low8; }
  static const int32_t* starts(const Fine& x) { return Bits == 4 ? x.starts4 : x.starts8; }
  static int start(const Fine& x) { return Bits == 4 ? x.start4 : x.start8; }  // of all lanes together
};

// From natural order to high and low bytes in the order of the steps, and what the zero point takes from each lane; gives what
// it takes from all together.
template <class V, int Bits>
inline int arrange_row(const int16_t* natural, int k, int8_t* high, int8_t* low, int32_t* starts) {
  using S = Steps<V, Bits>;
  const auto zero_point = V::set8(Bits == 4 ? 8 : -128);  // 128 as an unsigned byte
  auto of_high = V::zero(), of_low = V::zero();
  for (int from = 0; from < k; from += S::columns) {
    V::template split<S::vectors>(natural + from, high + from, low + from);
    for (int v = 0; v < S::vectors; v++) {
      of_high = V::template dot8<8>(of_high, zero_point, V::load(high + from + v * V::bytes));
      of_low = V::template dot8<8>(of_low, zero_point, V::load(low + from + v * V::bytes));
    }
  }
  const auto high_start = V::sub32(V::zero(), of_high), low_start = V::sub32(V::zero(), of_low);
  V::store(starts, high_start), V::store(starts + V::lanes, low_start);
  return V::sum32(V::add32(V::times256(high_start), low_start));
}

constexpr int kLong = 4096;      // columns beyond which one token's activations do not stay in the first level
constexpr int kVisit = 2048;     // columns of several tokens' activations that do
constexpr int kTokensKept = 8;   // whose sums are kept from visit to visit; half as many where one visit is enough

// Rows that share loads of activations. Memory is read fastest in two streams, but long rows wait for activations instead.
template <class V>
constexpr int rows_at_once(int tokens, bool long_rows) {
  if (V::bytes < 64 || tokens > 3) return 2;
  if (tokens == 3) return 3;
  return long_rows ? 8 / tokens : 2;
}

// Sums of up to V::lanes rows by some tokens, spread over lanes: [token][row][lane]. Between visits high and low ones are apart
// unless they fit together; in the end all is in `low`, as integers where they fit, else as floats.
template <class V>
struct RowSums {
  static constexpr int of_token = V::lanes * V::lanes;
  alignas(64) int32_t high[kTokensKept * of_token], low[kTokensKept * of_token];
};

// R rows from row n on by T tokens over the steps from … to, added to what there is unless `from` is 0. With a single sum,
// products of even and of odd columns go different ways, so that they do not wait for each other.
template <class V, int Bits, int R, int T>
HEADRACE_APART void add_rows(const Weight& w, int n, const Fine* x, int from, int to, size_t ahead, int32_t* to_high,
                             int32_t* to_low) {
  using S = Steps<V, Bits>;
  using I = typename V::I;
  constexpr int ways = R * T == 1 ? S::vectors : 1;
  constexpr int of_token = RowSums<V>::of_token;
  const size_t row_bytes = w.row_bytes();
  const uint8_t* rows = w.packed + n * row_bytes;
  const int whole = w.k / S::columns < to ? w.k / S::columns : to;
  I high[R][T][ways], low[R][T][ways];
  HEADRACE_UNROLL for (int r = 0; r < R; r++) HEADRACE_UNROLL for (int t = 0; t < T; t++) {
    HEADRACE_UNROLL for (int i = 0; i < ways; i++) high[r][t][i] = low[r][t][i] = V::zero();
    if (from && !fits<Bits>(w.k)) high[r][t][0] = V::load(to_high + t * of_token + r * V::lanes);
    if (from) low[r][t][0] = V::load(to_low + t * of_token + r * V::lanes);
  }
  const auto step = [&](int s, const I* codes) {
    I even[R], odd[R];
    HEADRACE_UNROLL for (int r = 0; r < R; r++) {
      even[r] = Bits == 4 ? V::kept(V::low_nibbles(codes[r])) : codes[r];
      if constexpr (Bits == 4) odd[r] = V::kept(V::high_nibbles(codes[r]));
    }
    HEADRACE_UNROLL for (int t = 0; t < T; t++) HEADRACE_UNROLL for (int v = 0; v < S::vectors; v++) {
      const int at = s * S::columns + v * V::bytes;
      const I of_high = V::load(S::high(x[t]) + at), of_low = V::load(S::low(x[t]) + at);
      HEADRACE_UNROLL for (int r = 0; r < R; r++) {
        I &h = high[r][t][v % ways], &l = low[r][t][v % ways];
        h = V::template dot8<Bits>(h, v ? odd[r] : even[r], of_high);
        l = V::template dot8<Bits>(l, v ? odd[r] : even[r], of_low);
      }
    }
  };
  I codes[R];
  for (int s = from; s < whole; s++) {
    HEADRACE_UNROLL for (int r = 0; r < R; r++) {
      const uint8_t* p = rows + r * row_bytes + size_t(s) * V::bytes;
      codes[r] = V::kept(V::load(p));
      __builtin_prefetch(p + ahead, 0, 2);
    }
    step(s, codes);
  }
  if (whole < to) {  // what is less than a load
    HEADRACE_UNROLL for (int r = 0; r < R; r++) {
      const uint8_t* p = rows + r * row_bytes + size_t(whole) * V::bytes;
      codes[r] = V::load_part(p, int(row_bytes) - whole * V::bytes);
      __builtin_prefetch(p + ahead, 0, 2);
    }
    step(whole, codes);
  }
  const auto each = [&](const auto& finish) {
    HEADRACE_UNROLL for (int t = 0; t < T; t++) HEADRACE_UNROLL for (int r = 0; r < R; r++) {
      I h = high[r][t][0], l = low[r][t][0];
      if constexpr (ways == 2) h = V::add32(h, high[r][t][1]), l = V::add32(l, low[r][t][1]);
      finish(t, t * of_token + r * V::lanes, h, l);
    }
  };
  if (fits<Bits>(w.k)) {
    each([&](int, int at, I h, I l) { V::store(to_low + at, V::add32(V::times256(h), l)); });
  } else if (to * S::columns < w.k) {
    each([&](int, int at, I h, I l) { V::store(to_high + at, h), V::store(to_low + at, l); });
  } else {
    each([&](int t, int at, I h, I l) {
      h = V::add32(h, V::load(S::starts(x[t]))), l = V::add32(l, V::load(S::starts(x[t]) + V::lanes));
      V::storef(reinterpret_cast<float*>(to_low + at), V::fma(V::to_float(h), V::setf(256), V::to_float(l)));
    });
  }
}

// The same for up to V::lanes rows, a few at a time.
template <class V, int Bits, int T, bool Long>
inline void add_all_rows(const Weight& w, int n, int count, const Fine* x, int from, int to, int32_t* high, int32_t* low) {
  constexpr int R = rows_at_once<V>(T, Long);
  const size_t ahead = round_up(kAhead, (T == 1 ? R : V::lanes) * w.row_bytes());  // the same place of rows that come later
  int r = 0;
  for (; r + R <= count; r += R) add_rows<V, Bits, R, T>(w, n + r, x, from, to, ahead, high + r * V::lanes, low + r * V::lanes);
  for (; r < count; r++) add_rows<V, Bits, 1, T>(w, n + r, x, from, to, ahead, high + r * V::lanes, low + r * V::lanes);
}

// `all` to y, of which only `count` are there.
template <class V>
inline void write_part(float* y, typename V::F all, int count) {
  if (count == V::lanes) return V::storef(y, all);
  float part[V::lanes];
  V::storef(part, all);
  for (int i = 0; i < count; i++) y[i] = part[i];
}
template <class V>
inline typename V::F biases(const Weight& w, int n, int count) {
  float part[V::lanes] = {};
  if (w.bias)
    for (int i = 0; i < count; i++) part[i] = w.bias[n + i];
  return V::loadf(part);
}

// One token reads each row from end to end. Several go over a stretch of some rows one after the other, so that the rows'
// codes and the tokens' activations stay in the first level of the cache.
template <class V, int Bits>
void decode_rows(const Weight& w, const Fine* x, int m, int begin, int end, const Out& out, int column) {
  using S = Steps<V, Bits>;
  constexpr int of_token = RowSums<V>::of_token;
  RowSums<V> sums;
  const int steps = (w.k + S::columns - 1) / S::columns, visit = m == 1 ? steps : kVisit / S::columns;
  const int kept = steps > visit ? kTokensKept : kTokensKept / 2;
  for (int n = begin; n < end; n += V::lanes) {
    const int count = end - n < V::lanes ? end - n : V::lanes;
    const auto scales = V::halves(w.scale + n, count), bias = biases<V>(w, n, count);
    for (int first = 0; first < m; first += kept) {
      const int tokens = m - first < kept ? m - first : kept;
      for (int from = 0; from < steps; from += visit) {
        const int to = steps - from < visit ? steps : from + visit;
        int t = 0;
        const auto add = [&](auto number) {
          constexpr int T = decltype(number)::value;
          const auto run = w.k > kLong ? add_all_rows<V, Bits, T, true> : add_all_rows<V, Bits, T, false>;
          for (; tokens - t >= T; t += T)
            run(w, n, count, x + first + t, from, to, sums.high + t * of_token, sums.low + t * of_token);
        };
        add(Number<4>()), add(Number<3>()), add(Number<2>()), add(Number<1>());
      }
      for (int t = 0; t < tokens; t++) {
        const Fine& f = x[first + t];
        const int32_t* own = sums.low + t * of_token;
        const auto total = fits<Bits>(w.k) ? V::to_float(V::add32(V::sums(own), V::set32(S::start(f))))
                                           : V::sums(reinterpret_cast<const float*>(own));
        write_part<V>(out.y + out.rows[first + t] * out.stride + column + n - begin,
                      V::fma(V::mul(total, scales), V::setf(f.scale), bias), count);
      }
    }
  }
}

}  // namespace
}  // namespace headrace
