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

enum class Scales { kRow, kBlocks, kLanes };  // one a row; blocks of whole steps; blocks of less than a step

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
  // One load of each row: `codes`.
  void step(const Fine* x, int number, const I* codes) {
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

// R rows by T tokens: sums over columns, still spread over lanes, to out[t][row][lane].
template <class V, int Bits, Scales Mode, int R, int T>
inline void spread_sums(const Weight& w, int n, const Fine* x, float* out) {
  using S = Steps<V, Bits>;
  using I = typename V::I;
  using F = typename V::F;
  const size_t row_bytes = w.row_bytes(), ahead = 2048;
  const uint8_t* rows = w.packed + n * row_bytes;
  const uint16_t* scales = w.scale + size_t(n) * w.blocks();
  const int whole = w.k / S::columns, steps = (w.k + S::columns - 1) / S::columns;
  const int rest = int(row_bytes) - whole * V::bytes;
  const int per_flush = Mode == Scales::kRow ? S::per_segment : Mode == Scales::kBlocks ? w.block / S::columns : 1;
  F f[R][T];
  HEADRACE_UNROLL for (int r = 0; r < R; r++) HEADRACE_UNROLL for (int t = 0; t < T; t++) f[r][t] = V::zerof();
  for (int from = 0, flush = 0; from < steps; from += per_flush, flush++) {
    Sums<V, Bits, R, T> sums;
    if (Mode == Scales::kRow) sums.start(x, S::segments, flush);
    else sums.start(x, S::steps, from);
    const int to = from + per_flush < whole ? from + per_flush : whole;
    I codes[R];
    for (int s = from; s < to; s++) {
      HEADRACE_UNROLL for (int r = 0; r < R; r++) {
        const uint8_t* p = rows + r * row_bytes + size_t(s) * V::bytes;
        codes[r] = V::load(p);
        __builtin_prefetch(p + ahead);
      }
      if (Mode == Scales::kBlocks && s > from) sums.add_start(x, s);
      sums.step(x, s, codes);
    }
    if (to < steps && to < from + per_flush) {  // what is less than a load
      HEADRACE_UNROLL for (int r = 0; r < R; r++) codes[r] = V::load_part(rows + r * row_bytes + size_t(to) * V::bytes, rest);
      if (Mode == Scales::kBlocks && to > from) sums.add_start(x, to);
      sums.step(x, to, codes);
    }
    HEADRACE_UNROLL for (int r = 0; r < R; r++) {
      const uint16_t* own = scales + size_t(r) * w.blocks();
      F scale;
      if constexpr (Mode == Scales::kBlocks) scale = V::setf(V::half(own[flush]));
      if constexpr (Mode == Scales::kLanes) {
        const int first = from * (S::columns / w.block);
        scale = V::spread(own + first, S::columns / w.block, w.blocks() - first);
      }
      HEADRACE_UNROLL for (int t = 0; t < T; t++) {
        const F total = V::to_float(sums.total(r, t));
        if constexpr (Mode == Scales::kRow) f[r][t] = V::add(f[r][t], total);
        else f[r][t] = V::fma(total, scale, f[r][t]);
      }
    }
  }
  HEADRACE_UNROLL for (int r = 0; r < R; r++) HEADRACE_UNROLL for (int t = 0; t < T; t++)
      V::storef(out + (t * V::lanes + r) * V::lanes, f[r][t]);
}

template <class V, int Bits, Scales Mode, int T>
inline void decode_tokens(const Weight& w, const Fine* x, int n, int count, const Out& out, const int* rows, int column) {
  alignas(64) float lanes[T * V::lanes * V::lanes];
  if (count < V::lanes)
    for (float& one : lanes) one = 0;
  // Short rows of one token go in pairs. Long ones do not: memory is read fastest as a single stream.
  int r = 0;
  if (T > 1 || (Bits == 4 && w.row_bytes() <= 1024))
    for (; r + 2 <= count; r += 2) spread_sums<V, Bits, Mode, 2, T>(w, n + r, x, lanes + r * V::lanes);
  for (; r < count; r++) spread_sums<V, Bits, Mode, 1, T>(w, n + r, x, lanes + r * V::lanes);
  float scales[V::lanes], bias[V::lanes] = {};
  for (int i = 0; i < V::lanes; i++) scales[i] = Mode == Scales::kRow && i < count ? V::half(w.scale[n + i]) : 1;
  if (w.bias)
    for (int i = 0; i < count; i++) bias[i] = w.bias[n + i];
  for (int t = 0; t < T; t++) {
    const auto total = V::mul(V::sums(lanes + t * V::lanes * V::lanes), V::loadf(scales));
    const auto y = V::fma(total, V::setf(x[t].scale), V::loadf(bias));
    float* to = out.y + rows[t] * out.stride + column;
    if (count == V::lanes) {
      V::storef(to, y);
    } else {
      float part[V::lanes];
      V::storef(part, y);
      for (int i = 0; i < count; i++) to[i] = part[i];
    }
  }
}

template <class V, int Bits, Scales Mode>
inline void decode_rows(const Weight& w, const Fine* x, int m, int begin, int end, const Out& out, int column) {
  for (int n = begin; n < end; n += V::lanes) {
    const int count = end - n < V::lanes ? end - n : V::lanes, at = column + n - begin;
    int i = 0;
    for (; i + 4 <= m; i += 4) decode_tokens<V, Bits, Mode, 4>(w, x + i, n, count, out, out.rows + i, at);
    if (m - i == 3) decode_tokens<V, Bits, Mode, 3>(w, x + i, n, count, out, out.rows + i, at);
    if (m - i == 2) decode_tokens<V, Bits, Mode, 2>(w, x + i, n, count, out, out.rows + i, at);
    if (m - i == 1) decode_tokens<V, Bits, Mode, 1>(w, x + i, n, count, out, out.rows + i, at);
  }
}

template <class V, int Bits>
inline void decode_bits(const Weight& w, const Fine* x, int m, int begin, int end, const Out& out, int column) {
  if (!w.block) decode_rows<V, Bits, Scales::kRow>(w, x, m, begin, end, out, column);
  else if (w.block >= Steps<V, Bits>::columns) decode_rows<V, Bits, Scales::kBlocks>(w, x, m, begin, end, out, column);
  else decode_rows<V, Bits, Scales::kLanes>(w, x, m, begin, end, out, column);
}

template <class V>
void decode(const Weight& w, const Fine* x, int m, int begin, int end, const Out& out, int column) {
  if (w.bits == 4) decode_bits<V, 4>(w, x, m, begin, end, out, column);
  else decode_bits<V, 8>(w, x, m, begin, end, out, column);
}

}  // namespace
}  // namespace headrace
