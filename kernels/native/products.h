// What linear_rows.h and linear_blocks.h are made of: products of a step of some rows by some tokens, scaled, merged and written.
#pragma once
#include <algorithm>

#include "fine.h"
#include "rows.h"

namespace headrace {
namespace {

constexpr int log2_of(int n) { return n > 1 ? 1 + log2_of(n / 2) : 0; }

// How many rows are read ahead, some multiple of `together`.
inline int rows_ahead(const Weight& w, int together = 1) { return int(round_up(kAhead, together * w.code_bytes()) / w.code_bytes()); }

// The same in columns.
inline size_t columns_ahead(const Weight& w, int together) { return size_t(rows_ahead(w, together)) * w.k; }

// Codes of a step of R rows from one on; Whole: all of it exists.
template <class V, int Bits, int R, bool Whole>
struct Columns {
  using S = Steps<V, Bits>;
  using I = typename V::I;
  I codes[R][S::vectors];

  template <class Rows>
  __attribute__((always_inline)) Columns(const Rows& rows, size_t row, int step) {
    HEADRACE_UNROLL for (int r = 0; r < R; r++) {
      if constexpr (is_split(Bits)) {
        rows.load(row + r, step, codes[r][0], codes[r][1]);
      } else {
        const I loaded = rows.template load<Whole>(row + r, step);
        codes[r][0] = Bits == 4 ? V::kept(V::low_nibbles(loaded)) : loaded;
        if constexpr (Bits == 4) codes[r][1] = V::kept(V::high_nibbles(loaded));
      }
    }
  }
  // Adds products with a token's codes of that step.
  __attribute__((always_inline)) void dot(const int8_t* own, I (&product)[R]) const {
    HEADRACE_UNROLL for (int v = 0; v < S::vectors; v += Bits == 4 ? 2 : 1) {
      const I first = V::load(own + v * V::bytes);
      if constexpr (Bits != 4) {
        HEADRACE_UNROLL for (int r = 0; r < R; r++) product[r] = V::dot_bytes(product[r], codes[r][v], first);
      } else {
        const I second = V::load(own + V::bytes);
        HEADRACE_UNROLL for (int r = 0; r < R; r++)
            product[r] = V::dot_nibbles(product[r], codes[r][0], first, codes[r][1], second);
      }
    }
  }
  // The same of 4 bits, of pairs to int16.
  __attribute__((always_inline)) void dot_pairs(const int8_t* own, I (&product)[R]) const {
    HEADRACE_UNROLL for (int v = 0; v < S::vectors; v++) {
      const I codes_of_token = V::load(own + v * V::bytes);
      HEADRACE_UNROLL for (int r = 0; r < R; r++) product[r] = V::add16(product[r], V::pair_products(codes[r][v], codes_of_token));
    }
  }
};

// Sums of rows, still spread over lanes: of 4 bits int32, two rows to a vector; of bytes float, one.
template <class V, int Bits> struct SumOf { using type = typename V::F; };
template <class V> struct SumOf<V, 4> { using type = typename V::I; };
template <class V, int Bits> using Sum = typename SumOf<V, Bits>::type;
template <class V, int Bits>
constexpr int vectors_of(int rows) { return Bits == 4 ? rows / 2 : rows; }

// Products of R rows with their scale, added to sums. Those of 4 bits fit an int16, so that those of two rows can be multiplied with
// their factors and merged at once.
template <class V, int Bits, int R>
__attribute__((always_inline)) inline void add_scaled(const Fine& x, int step, const typename V::I (&product)[R],
                                                      Sum<V, Bits> (&sum)[vectors_of<V, Bits>(R)]) {
  if constexpr (Bits == 4) {
    auto factors = V::load(FactorStep<V>::of(x)[size_t(step) * x.together].factors);
    if constexpr (rows_apart<V>) factors = V::fours_twice(factors);
    HEADRACE_UNROLL for (int r = 0; r < R; r += 2) sum[r / 2] = V::dot16(sum[r / 2], V::pack16(product[r], product[r + 1]), factors);
  } else {
    const auto scales = V::loadf(Steps<V, Bits>::scales(x, step));
    HEADRACE_UNROLL for (int r = 0; r < R; r++) sum[r] = V::fma(V::to_float(product[r]), scales, sum[r]);
  }
}

// One vector of N that are merged up to Level.
template <class V, int Level, class T, int N>
__attribute__((always_inline)) inline T all_merged(const T (&v)[N]) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    T half[N / 2];
    HEADRACE_UNROLL for (int i = 0; i < N / 2; i++) half[i] = V::template merge<Level>(v[2 * i], v[2 * i + 1]);
    return all_merged<V, Level + 1>(half);
  }
}

// `run` for `tokens` tokens, up to Most at a time: run(number of them, first). Five and six are shared out evenly.
template <int Most, class Run>
inline void few_at_a_time(int tokens, const Run& run) {
  for (int t = 0, some; t < tokens; t += some) {
    const int left = tokens - t;
    some = Most == kFew && left >= kFew ? kFew : std::min(Most, left == 5 || left == 6 ? 3 : std::min(left, 4));
    const auto run_if = [&](auto number) {
      constexpr int T = decltype(number)::value;
      if constexpr (T <= Most)
        if (some == T) run(number, t);
    };
    run_if(Number<1>()), run_if(Number<2>()), run_if(Number<3>()), run_if(Number<4>()), run_if(Number<kFew>());
  }
}

// Scales of rows from n on that have one each; of row n alone where `stride` of rows is 0.
template <class V>
inline typename V::F row_scales(const Weight& w, int n, int stride) {
  return stride ? V::halves(w.scale + n) : V::setf(V::half(w.scale[n]));
}

// Results of `count` rows from n on for a token, one or V::lanes, whose sums are `total`, times the token's scale.
template <class V>
inline void write_rows(const Weight& w, int n, int count, typename V::F total, float scale, float* y) {
  const auto scaled = V::mul(total, V::setf(scale));
  if (count == V::lanes) return V::storef(y, w.bias ? V::add(scaled, V::loadf(w.bias + n)) : scaled);
  float part[V::lanes];
  V::storef(part, scaled);
  *y = part[0] + (w.bias ? w.bias[n] : 0);
}

// Rows begin … end - 1 in vectors of them, run(first, stride of rows); what is not a whole vector goes one by one, each with stride 0 as
// if it were all of the vector's.
template <class V, class Run>
inline void vectors_of_rows(int begin, int end, const Run& run) {
  int n = begin;
  for (; n + V::lanes <= end; n += V::lanes) run(n, 1);
  for (; n < end; n++) run(n, 0);
}

// The same with half of each vector's rows from the first half of begin … end - 1 and half from the second, `apart` rows further on:
// run(first, stride, apart, how many rows further what is asked for beforehand lies: `ahead` rows of each half).
template <class V, class Run>
inline void halves_of_rows(int begin, int end, int ahead, const Run& run) {
  constexpr int each = V::lanes / 2;
  const int apart = (end - begin) / V::lanes * each;
  int next = ahead;  // the row of a half, or of the next halves, that is asked for with its first row
  for (int n = 0; n < apart; n += each, next += each) run(begin + n, 1, apart, ahead + next / apart * apart);
  for (int n = begin + 2 * apart; n < end; n++) run(n, 0, 0, ahead);
}

}  // namespace
}  // namespace headrace
