// Linears of few tokens, for any vector V: rows of packed codes are read once, straight from the file's pages, and
// multiplied with the high and the low bytes of int16 activations.
//
//   4 bits: a step is 2 * V::bytes columns; the low halves of a load's bytes are the even ones, the high halves the odd ones,
//           so the step's activations are the even columns and then the odd ones.
//   8 bits: a step is V::bytes columns, as they come.
//
// Either way lane l of the sums covers neighbouring columns (eight or four of them), so that scales of small blocks are
// vectors over lanes. Sums of a row stay spread over lanes; those of V::lanes rows are added up together.
#pragma once
#include "elementwise.h"

#include <algorithm>

namespace headrace {
namespace {

template <class V, int Bits>
struct Steps {
  static constexpr int columns = Bits == 4 ? 2 * V::bytes : V::bytes;
  static constexpr int vectors = Bits == 4 ? 2 : 1;
  static constexpr int per_segment = kSegment / columns;
  static const int8_t* high(const Fine& x) { return Bits == 4 ? x.high4 : x.high8; }
  static const int8_t* low(const Fine& x) { return Bits == 4 ? x.low4 : x.low8; }
  static const int32_t* steps(const Fine& x) { return Bits == 4 ? x.steps4 : x.steps8; }
  static const int32_t* segments(const Fine& x) { return Bits == 4 ? x.segments4 : x.segments8; }
};

// From natural order to high and low bytes in the order of the steps, and the starts of the sums.
template <class V, int Bits>
inline void arrange(const int16_t* natural, int k, int8_t* high, int8_t* low, int32_t* steps, int32_t* segments) {
  using S = Steps<V, Bits>;
  const int padded = int(round_up(k, S::columns));
  const auto zero_point = V::set8(Bits == 4 ? 8 : -128);  // 128 as an unsigned byte
  auto segment = V::zero();
  for (int from = 0, s = 0; from < padded; from += S::columns, s++) {
    auto sum = V::zero();
    V::template split<S::vectors>(natural + from, high + from, low + from);
    for (int v = 0; v < S::vectors; v++) {
      const int at = from + v * V::bytes;
      const auto of_high = V::template dot8<8>(V::zero(), zero_point, V::load(high + at));
      sum = V::sub32(sum, V::add32(V::times256(of_high), V::template dot8<8>(V::zero(), zero_point, V::load(low + at))));
    }
    V::store(steps + s * V::lanes, sum);
    segment = V::add32(segment, sum);
    if ((s + 1) % S::per_segment == 0 || from + S::columns >= padded) {
      V::store(segments + s / S::per_segment * V::lanes, segment);
      segment = V::zero();
    }
  }
}

template <class V>
void fine(const float* x, int k, bool four, bool eight, Fine& out) {
  out.scale = quantize<V>(x, k, out.natural);
  for (int i = k; i < int(round_up(k, kPad)); i++) out.natural[i] = 0;
  if (four) arrange<V, 4>(out.natural, k, out.high4, out.low4, out.steps4, out.segments4);
  if (eight) arrange<V, 8>(out.natural, k, out.high8, out.low8, out.steps8, out.segments8);
}

constexpr int kLong = 4096;  // columns beyond which one token's activations do not stay in the first level

// Rows that share loads of activations. Memory is read fastest in two streams, but long rows wait for activations instead.
template <class V>
constexpr int rows_at_once(int tokens, bool long_rows) {
  if (V::bytes < 64 || tokens > 3) return 2;
  if (tokens == 3) return 3;
  return long_rows ? 8 / tokens : 2;
}

// How often a row has a scale is a template parameter, Parts: 0 one a row; 1 blocks of whole steps; more: blocks of less than
// a step, so many in each.
template <class V, int Bits>
inline int parts_of(const Weight& w) {
  const int columns = Steps<V, Bits>::columns;
  return !w.block ? 0 : w.block >= columns ? 1 : columns / w.block;
}

// Sums of R rows by T tokens. With a single sum, products of even and of odd columns go different ways, so that they do
// not wait for each other.
template <class V, int Bits, int R, int T>
struct Sums {
  using S = Steps<V, Bits>;
  using I = typename V::I;
  static constexpr int ways = R * T == 1 ? S::vectors : 1;
  I high[R][T][ways], low[R][T][ways];

  void start(const Fine* x, const int32_t* (*starts)(const Fine&), int at) {
    HEADRACE_UNROLL for (int t = 0; t < T; t++) {
      const I first = V::load(starts(x[t]) + at * V::lanes);
      HEADRACE_UNROLL for (int r = 0; r < R; r++) HEADRACE_UNROLL for (int w = 0; w < ways; w++) {
        high[r][t][w] = V::zero();
        low[r][t][w] = w ? V::zero() : first;
      }
    }
  }
  void add_start(const Fine* x, int step) {
    HEADRACE_UNROLL for (int t = 0; t < T; t++) HEADRACE_UNROLL for (int r = 0; r < R; r++)
        low[r][t][0] = V::add32(low[r][t][0], V::load(S::steps(x[t]) + step * V::lanes));
  }
  // A step of R rows, of which the first lies at p; `there` bytes of it exist, when it is not whole.
  template <bool Whole>
  void step(const Fine* x, int number, const uint8_t* p, size_t row_bytes, size_t ahead, int there) {
    I codes[R];
    HEADRACE_UNROLL for (int r = 0; r < R; r++) {
      codes[r] = Whole ? V::kept(V::load(p + r * row_bytes)) : V::load_part(p + r * row_bytes, there);
      __builtin_prefetch(p + r * row_bytes + ahead, 0, 2);
    }
    I even[R], odd[R];
    HEADRACE_UNROLL for (int r = 0; r < R; r++) {
      even[r] = Bits == 4 ? V::kept(V::low_nibbles(codes[r])) : codes[r];
      if constexpr (Bits == 4) odd[r] = V::kept(V::high_nibbles(codes[r]));
    }
    HEADRACE_UNROLL for (int t = 0; t < T; t++) HEADRACE_UNROLL for (int v = 0; v < S::vectors; v++) {
      const int at = number * S::columns + v * V::bytes;
      const I of_high = V::load(S::high(x[t]) + at), of_low = V::load(S::low(x[t]) + at);
      HEADRACE_UNROLL for (int r = 0; r < R; r++) {
        I &h = high[r][t][v % ways], &l = low[r][t][v % ways];
        h = V::template dot8<Bits>(h, v ? odd[r] : even[r], of_high);
        l = V::template dot8<Bits>(l, v ? odd[r] : even[r], of_low);
      }
    }
  }
  I total(int r, int t) const {
    I h = high[r][t][0], l = low[r][t][0];
    if constexpr (ways == 2) h = V::add32(h, high[r][t][1]), l = V::add32(l, low[r][t][1]);
    return V::add32(V::times256(h), l);
  }
};

template <class V, int Bits, int Parts>
inline int steps_per_flush(const Weight& w) {  // after so many steps of a row its int32 sums become float
  using S = Steps<V, Bits>;
  return Parts == 0 ? S::per_segment : Parts == 1 ? w.block / S::columns : 1;
}

// R rows by T tokens over the flushes from `flush` on, `flushes` of them: sums over columns, still spread over lanes, are
// added to out[t][row][lane], which the first flush begins.
template <class V, int Bits, int Parts, int R, int T>
HEADRACE_APART void add_spread_sums(const Weight& w, int n, const Fine* x, int flush, int flushes, size_t ahead, float* out) {
  using S = Steps<V, Bits>;
  using F = typename V::F;
  const size_t row_bytes = w.row_bytes(), blocks = w.blocks();
  const uint8_t* rows = w.packed + n * row_bytes;
  const uint16_t* scales = w.scale + size_t(n) * blocks;
  const int whole = w.k / S::columns, rest = int(row_bytes) - whole * V::bytes;  // steps, and bytes of what is less than one
  const int per_flush = steps_per_flush<V, Bits, Parts>(w);
  F f[R][T];
  HEADRACE_UNROLL for (int r = 0; r < R; r++) HEADRACE_UNROLL for (int t = 0; t < T; t++)
      f[r][t] = flush ? V::loadf(out + (t * V::lanes + r) * V::lanes) : V::zerof();
  const int last = flush + flushes;
  if constexpr (Parts > 1) {
    for (; flush < last; flush++) {
      const bool is_whole = flush < whole;
      Sums<V, Bits, R, T> sums;
      sums.start(x, S::steps, flush);
      const uint8_t* p = rows + size_t(flush) * V::bytes;
      if (is_whole) sums.template step<true>(x, flush, p, row_bytes, ahead, 0);
      else sums.template step<false>(x, flush, p, row_bytes, ahead, rest);
      HEADRACE_UNROLL for (int r = 0; r < R; r++) {
        const uint16_t* own = scales + r * blocks + size_t(flush) * Parts;
        const F scale = is_whole ? V::template spread<Parts>(own) : V::template spread<Parts>(own, int(blocks) - flush * Parts);
        HEADRACE_UNROLL for (int t = 0; t < T; t++) f[r][t] = V::fma(V::to_float(sums.total(r, t)), scale, f[r][t]);
      }
    }
  } else {
    for (; flush < last; flush++) {
      const int from = flush * per_flush, to = from + per_flush < whole ? from + per_flush : whole;
      Sums<V, Bits, R, T> sums;
      sums.start(x, Parts ? S::steps : S::segments, Parts ? from : flush);
      for (int s = from; s < to; s++) {
        if (Parts && s > from) sums.add_start(x, s);
        sums.template step<true>(x, s, rows + size_t(s) * V::bytes, row_bytes, ahead, 0);
      }
      if (rest && to < from + per_flush) {
        if (Parts && to > from) sums.add_start(x, to);
        sums.template step<false>(x, to, rows + size_t(to) * V::bytes, row_bytes, ahead, rest);
      }
      HEADRACE_UNROLL for (int r = 0; r < R; r++) {
        F scale;
        if constexpr (Parts == 1) scale = V::setf(V::half(scales[r * blocks + flush]));
        HEADRACE_UNROLL for (int t = 0; t < T; t++) {
          const F total = V::to_float(sums.total(r, t));
          if constexpr (Parts == 0) f[r][t] = V::add(f[r][t], total);
          else f[r][t] = V::fma(total, scale, f[r][t]);
        }
      }
    }
  }
  HEADRACE_UNROLL for (int r = 0; r < R; r++) HEADRACE_UNROLL for (int t = 0; t < T; t++)
      V::storef(out + (t * V::lanes + r) * V::lanes, f[r][t]);
}

// The same for up to V::lanes rows, a few at a time.
template <class V, int Bits, int Parts, int T, bool Long>
inline void add_rows(const Weight& w, int n, int count, const Fine* x, int flush, int flushes, float* out) {
  constexpr int R = rows_at_once<V>(T, Long);
  const size_t ahead = round_up(kAhead, (T == 1 ? R : V::lanes) * w.row_bytes());  // the same place of rows that come later
  int r = 0;
  for (; r + R <= count; r += R) add_spread_sums<V, Bits, Parts, R, T>(w, n + r, x, flush, flushes, ahead, out + r * V::lanes);
  for (; r < count; r++) add_spread_sums<V, Bits, Parts, 1, T>(w, n + r, x, flush, flushes, ahead, out + r * V::lanes);
}

// The results of up to V::lanes rows for some tokens: sums are added up over the lanes.
template <class V, int Parts>
inline void write_rows(const Weight& w, int n, int count, const float* lanes, const Fine* x, const Out& out,
                       const int* rows, int tokens, int column) {
  const auto scales = Parts ? V::setf(1) : V::template spread<V::lanes>(w.scale + n, count);
  float part[V::lanes] = {};
  if (w.bias)
    for (int i = 0; i < count; i++) part[i] = w.bias[n + i];
  const auto bias = V::loadf(part);
  for (int t = 0; t < tokens; t++) {
    float* y = out.y + rows[t] * out.stride + column;
    const auto total = V::mul(V::sums(lanes + t * V::lanes * V::lanes), scales);
    const auto all = V::fma(total, V::setf(x[t].scale), bias);
    if (count == V::lanes) {
      V::storef(y, all);
      continue;
    }
    V::storef(part, all);
    for (int i = 0; i < count; i++) y[i] = part[i];
  }
}

// One token reads each row from end to end. Several go over a stretch of some rows one after the other, so that the rows'
// codes and the tokens' activations stay in the first level of the cache.
template <class V, int Bits, int Parts>
inline void decode_rows(const Weight& w, const Fine* x, int m, int begin, int end, const Out& out, int column) {
  constexpr int most = 8;  // tokens whose sums are kept
  constexpr int size = V::lanes * V::lanes;
  alignas(64) float lanes[most * size];
  const int per_flush = steps_per_flush<V, Bits, Parts>(w);
  const int flushes = (int(round_up(w.k, Steps<V, Bits>::columns)) / Steps<V, Bits>::columns + per_flush - 1) / per_flush;
  const int stretch = m == 1 ? flushes : std::max(1, Steps<V, Bits>::per_segment / per_flush);
  for (int n = begin; n < end; n += V::lanes) {
    const int count = end - n < V::lanes ? end - n : V::lanes;
    for (int first = 0; first < m; first += most) {
      const int tokens = m - first < most ? m - first : most;
      if (count < V::lanes)
        for (int i = 0; i < tokens * size; i++) lanes[i] = 0;
      for (int flush = 0; flush < flushes; flush += stretch) {
        const int here = flushes - flush < stretch ? flushes - flush : stretch;
        int t = 0;
        const auto add = [&](auto number) {
          constexpr int T = decltype(number)::value;
          const auto run = w.k > kLong ? add_rows<V, Bits, Parts, T, true> : add_rows<V, Bits, Parts, T, false>;
          run(w, n, count, x + first + t, flush, here, lanes + t * size);
          t += T;
        };
        while (t + 4 <= tokens) add(Number<4>());
        if (tokens - t == 3) add(Number<3>());
        if (tokens - t == 2) add(Number<2>());
        if (tokens - t == 1) add(Number<1>());
      }
      write_rows<V, Parts>(w, n, count, lanes, x + first, out, out.rows + first, tokens, column + n - begin);
    }
  }
}

template <class V, int Bits>
inline void decode_bits(const Weight& w, const Fine* x, int m, int begin, int end, const Out& out, int column) {
  constexpr int most = Steps<V, Bits>::columns / 16;  // blocks of a step
  const auto run = [&](auto parts) {
    constexpr int Parts = decltype(parts)::value;
    if constexpr (Parts <= most) decode_rows<V, Bits, Parts>(w, x, m, begin, end, out, column);
  };
  switch (parts_of<V, Bits>(w)) {
    case 0: return run(Number<0>());
    case 1: return run(Number<1>());
    case 2: return run(Number<2>());
    case 4: return run(Number<4>());
    case 8: return run(Number<8>());
  }
}

template <class V>
void decode(const Weight& w, const Fine* x, int m, int begin, int end, const Out& out, int column) {
  if (w.bits == 4) decode_bits<V, 4>(w, x, m, begin, end, out, column);
  else decode_bits<V, 8>(w, x, m, begin, end, out, column);
}

}  // namespace
}  // namespace headrace
