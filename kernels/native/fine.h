// Fine activations, for any vector V, in the order in which linear_rows.h, linear_split.h and linear_blocks.h multiply them.
//
//   4 bits: a step is 2 * V::bytes columns; the low halves of a load's bytes are the even ones, the high halves the odd ones,
//           so the step's activations are the even columns and then the odd ones.
//   5 and 6 bits: the same.
//   8 bits: a step is V::bytes columns, as they come; of int16 in two vectors, as bytes widen, or the high bytes and then the low ones.
//
// Of int8 codes lane l of a step's products covers neighbouring columns, eight of them or four, so that scales of activations and of
// small blocks of weights are vectors over lanes.
#pragma once
#include "elementwise.h"

namespace headrace {
namespace {

// Steps of the activations for 4 bits, for 5 and 6, and for rows of 8.
template <class V>
struct FactorStep {
  int8_t codes[2 * V::bytes];     // even columns, odd columns
  int16_t factors[2 * V::lanes];  // each lane's twice: of four lanes and then of the same four again, or, where rows are apart, one by one

  static FactorStep* of(const Fine& x) { return reinterpret_cast<FactorStep*>(x.four.steps) + x.number; }
};

template <class V>
struct SplitStep {
  int8_t codes[2 * V::bytes];  // even columns, odd columns
  float scales[V::lanes];      // of 8 columns
  int32_t start[V::lanes];     // of a variant that keeps factors apart, int16: of two even columns and two odd ones together

  static SplitStep* of(const Fine& x, int bits) { return reinterpret_cast<SplitStep*>(x.split[bits - 5]) + x.number; }
};

template <class V>
struct WideStep {
  int16_t codes[V::bytes];

  static WideStep* of(const Fine& x) { return reinterpret_cast<WideStep*>(x.wide.steps) + x.number; }
};

template <class V, int Bits>
struct Steps {
  static constexpr int vectors = Bits == 8 ? 1 : 2;
  static constexpr int columns = vectors * V::bytes;
  static constexpr int per_lane = columns / V::lanes;
  static constexpr int apart = unit_of(Bits) / 2 / columns;  // steps between two that share scales, of 4 and 8 bits
  static const int8_t* codes(const Fine& x, size_t step) {
    if constexpr (Bits == 4) return FactorStep<V>::of(x)[step * x.together].codes;
    else if constexpr (Bits == 8) return x.eight.codes + step * columns;
    else return SplitStep<V>::of(x, Bits)[step * x.together].codes;
  }
  static const float* scales(const Fine& x, size_t step) {
    if constexpr (Bits == 8) return x.eight.scales + step * V::lanes;
    else return SplitStep<V>::of(x, Bits)[step * x.together].scales;
  }
  // What sums of a step begin with.
  static typename V::I start(const Fine& x, size_t step) {
    if constexpr (Bits == 4) return V::load(x.four.starts + step * V::lanes);
    else if constexpr (V::signed_bytes) return V::zero();
    else if constexpr (Bits == 8) return V::load(x.eight.starts + step * V::lanes);
    else return V::load(SplitStep<V>::of(x, Bits)[step * x.together].start);
  }
};

// A unit of a row that may end within it.
template <int Unit>
inline const float* whole_unit(const float* x, int there, float (&copy)[Unit]) {
  if (there >= Unit) return x;
  for (int i = 0; i < Unit; i++) copy[i] = i < there ? x[i] : 0;
  return copy;
}

// The largest magnitude of every PerLane neighbours of N vectors, in all lanes that they fill. NaN is above all numbers.
template <class V, int PerLane, int N>
inline typename V::I largest_of_neighbours(const typename V::F (&x)[N]) {
  const auto larger = [](auto a, auto b) { return V::max_unsigned(a, b); };
  auto tops = V::zero();
  HEADRACE_UNROLL for (int i = 0; i < N; i++) tops = larger(tops, V::and_bits(V::bits(x[i]), V::set32(0x7fffffff)));
  return V::template neighbours<PerLane / N>(tops, larger);
}

template <class V, int Bits>
inline typename V::I start_of(const int8_t* codes) {
  auto sum = V::zero();
  if constexpr (Bits == 4) {
    HEADRACE_UNROLL for (int v = 0; v < Steps<V, 4>::vectors; v++) sum = V::dot8(sum, V::set8(8), V::load(codes + v * V::bytes));
  } else if constexpr (!V::signed_bytes) {
    HEADRACE_UNROLL for (int v = 0; v < Steps<V, Bits>::vectors; v++)
        sum = V::dot_bytes(sum, V::set8(-128), V::load(codes + v * V::bytes));  // 128 as an unsigned byte
  }
  return V::sub32(V::zero(), sum);
}

// Shared: columns half a unit apart have one factor, for rows of one scale.
template <class V, bool Shared>
inline void factor_codes(const float* x, int k, Fine& of) {
  using S = Steps<V, 4>;
  using I = typename V::I;
  using F = typename V::F;
  constexpr int unit = unit_of(4), half = unit / 2, N = S::per_lane > V::lanes ? S::per_lane / V::lanes : 1;
  const float top = largest<V>(x, k), least = top > kLeastTop ? top : kLeastTop;
  const F up = V::setf(kMostFactor / least), inverse = V::setf(127 * kMostFactor / least);
  FactorCodes& out = of.four;
  FactorStep<V>* step = FactorStep<V>::of(of);
  out.scale = top / (127 * kMostFactor);
  I segment = V::zero();
  for (int from = 0, s = 0; from < k; from += unit) {
    alignas(64) float copy[unit];
    const float* at = whole_unit(x + from, k - from, copy);
    alignas(64) int8_t codes[unit];
    alignas(64) int32_t factors[unit];
    HEADRACE_UNROLL for (int c = 0; c < half; c += N * V::lanes) {
      F values[2][N];
      I tops[2];
      HEADRACE_UNROLL for (int h = 0; h < 2; h++) {
        HEADRACE_UNROLL for (int i = 0; i < N; i++) values[h][i] = V::loadf(at + h * half + c + i * V::lanes);
        tops[h] = largest_of_neighbours<V, S::per_lane>(values[h]);
      }
      if (Shared) tops[0] = tops[1] = V::max_unsigned(tops[0], tops[1]);
      HEADRACE_UNROLL for (int h = 0; h < 2; h++) {
        const F whole = V::round(V::add(V::mul(V::floats(tops[h]), up), V::setf(0.5f)));
        const F factor = V::max(V::min(whole, V::setf(kMostFactor)), V::setf(1)), own = V::div(inverse, factor);
        HEADRACE_UNROLL for (int i = 0; i < N; i++) {
          V::store(factors + h * half + c + i * V::lanes, V::to_int(factor));
          V::store8(codes + h * half + c + i * V::lanes, V::to_int(V::mul(values[h][i], own)));
        }
      }
    }
    for (int c = 0; c < unit && from + c < k; c += S::columns, s++, step += of.together) {
      alignas(64) int32_t factor[V::lanes];
      for (int l = 0; l < V::lanes; l++) {
        factor[l] = factors[c + l * S::per_lane];
        const int first = rows_apart<V> ? 2 * l : l / 4 * 8 + l % 4;
        step->factors[first] = step->factors[first + (rows_apart<V> ? 1 : 4)] = int16_t(factor[l]);
      }
      V::store_apart(step->codes, V::load(codes + c), V::load(codes + c + V::bytes));
      const I start = start_of<V, 4>(step->codes);
      V::store(out.starts + s * V::lanes, start);
      segment = V::add32(segment, V::mul32(start, V::load(factor)));
      if ((s + 1) % (kSegment / S::columns) == 0 || from + c + S::columns >= k) {
        V::store(out.segments + from / kSegment * V::lanes, rows_apart<V> ? segment : V::template merge<0>(segment, segment));
        segment = V::zero();
      }
    }
  }
}

// int16 codes, one scale for all of them.
template <class V>
inline void wide_codes(const float* x, int k, Fine& of) {
  using I = typename V::I;
  constexpr int columns = V::bytes, vectors = wide_vectors<V>;
  const float top = largest<V>(x, k), inverse = kTop / (top > kLeastTop ? top : kLeastTop);
  of.wide.scale = top / kTop;
  WideStep<V>* step = WideStep<V>::of(of);
  I sums[2] = {V::zero(), V::zero()};
  for (int from = 0; from < k; from += columns, step += of.together) {
    alignas(64) float copy[columns];
    const float* at = whole_unit(x + from, k - from, copy);
    alignas(64) int16_t codes[columns];
    HEADRACE_UNROLL for (int c = 0; c < columns; c += V::lanes) V::store16(codes + c, V::to_int(V::mul(V::loadf(at + c), V::setf(inverse))));
    if constexpr (vectors == 1) {
      V::store_widened(step->codes, codes);
      HEADRACE_UNROLL for (int v = 0; v < 2; v++)
          sums[0] = V::dot16(sums[0], V::load(step->codes + v * columns / 2), V::set32(128 * 0x10001));
    } else {
      int8_t *high = reinterpret_cast<int8_t*>(step->codes), *low = high + columns;
      for (int c = 0; c < columns; c++) high[c] = int8_t((codes[c] + 128) >> 8), low[c] = int8_t(codes[c]);
      if constexpr (!V::signed_bytes)
        HEADRACE_UNROLL for (int v = 0; v < 2; v++)
            sums[v] = V::dot_bytes(sums[v], V::set8(-128), V::load(high + v * columns));  // 128 as an unsigned byte
    }
    if ((from + columns) % segment_of(8) == 0 || from + columns >= k)
      for (int v = 0; v < vectors; v++) {
        V::store(of.wide.segments + (from / segment_of(8) * vectors + v) * V::lanes, V::sub32(V::zero(), sums[v]));
        sums[v] = V::zero();
      }
  }
}

template <class V>
inline void scaled_codes(const float* x, int k, const ScaledCodes& out) {
  using S = Steps<V, 8>;
  constexpr int unit = unit_of(8), half = unit / 2;
  for (int from = 0; from < k; from += unit) {
    alignas(64) float copy[unit], scales[half];
    const float* at = whole_unit(x + from, k - from, copy);
    HEADRACE_UNROLL for (int c = 0; c < half; c += V::lanes) {
      const typename V::F low[1] = {V::loadf(at + c)}, high[1] = {V::loadf(at + half + c)};
      const auto bits = V::max_unsigned(largest_of_neighbours<V, S::per_lane>(low), largest_of_neighbours<V, S::per_lane>(high));
      const auto top = V::floats(bits), inverse = V::div(V::setf(127), V::max(top, V::setf(kLeastTop)));
      V::storef(scales + c, V::div(top, V::setf(127)));
      V::store8(out.codes + from + c, V::to_int(V::mul(low[0], inverse)));
      V::store8(out.codes + from + half + c, V::to_int(V::mul(high[0], inverse)));
    }
    for (int c = 0; c < half; c += S::columns) {
      const int s = (from + c) / S::columns, other = s + S::apart;
      const auto start = start_of<V, 8>(out.codes + from + c), second = start_of<V, 8>(out.codes + from + half + c);
      V::store(out.starts + s * V::lanes, start), V::store(out.starts + other * V::lanes, second);
      for (int l = 0; l < V::lanes; l++)
        out.scales[s * V::lanes + l] = out.scales[other * V::lanes + l] = scales[c + l * S::per_lane];
    }
  }
}

template <class V, int Bits>
inline void split_codes(const float* x, int k, const Fine& of) {
  using S = Steps<V, Bits>;
  SplitStep<V>* out = SplitStep<V>::of(of, Bits);
  constexpr int columns = S::columns, N = S::per_lane > V::lanes ? S::per_lane / V::lanes : 1;
  for (int from = 0; from < k; from += columns, out += of.together) {
    alignas(64) float copy[columns], tops[columns], of_lanes[V::lanes];
    const float* at = whole_unit(x + from, k - from, copy);
    alignas(64) int8_t codes[columns];
    HEADRACE_UNROLL for (int c = 0; c < columns; c += N * V::lanes) {
      typename V::F values[N];
      HEADRACE_UNROLL for (int i = 0; i < N; i++) values[i] = V::loadf(at + c + i * V::lanes);
      const auto top = V::floats(largest_of_neighbours<V, S::per_lane>(values));
      const auto inverse = V::div(V::setf(127), V::max(top, V::setf(kLeastTop)));
      V::storef(tops + c, top);
      HEADRACE_UNROLL for (int i = 0; i < N; i++) V::store8(codes + c + i * V::lanes, V::to_int(V::mul(values[i], inverse)));
    }
    for (int l = 0; l < V::lanes; l++) of_lanes[l] = tops[l * S::per_lane];
    V::storef(out->scales, V::div(V::loadf(of_lanes), V::setf(127)));
    V::store_apart(out->codes, V::load(codes), V::load(codes + V::bytes));
    if constexpr (factors_apart<V>) {
      const auto start = [&](int i) { return V::pair_start(V::load(out->codes + i * V::bytes), 1 << (Bits - 1)); };
      V::store(out->start, V::add16(start(0), start(1)));
    } else {
      V::store(out->start, start_of<V, Bits>(out->codes));
    }
  }
}

template <class V>
void fine(const float* x, int k, unsigned kinds, Fine& out) {
  static_assert(sizeof(FactorStep<V>) <= kStepBytes * 2 * V::bytes && sizeof(SplitStep<V>) <= kStepBytes * 2 * V::bytes);
  static_assert(sizeof(WideStep<V>) <= kStepBytes * V::bytes);
  if (kinds & kRowsOf4) factor_codes<V, true>(x, k, out);
  else if (kinds & kBlocksOf4) factor_codes<V, false>(x, k, out);
  if (kinds & kAllOf5) split_codes<V, 5>(x, k, out);
  if (kinds & kAllOf6) split_codes<V, 6>(x, k, out);
  if (kinds & kRowsOf8) wide_codes<V>(x, k, out);
  if (kinds & kBlocksOf8) scaled_codes<V>(x, k, out.eight);
}

}  // namespace
}  // namespace headrace
