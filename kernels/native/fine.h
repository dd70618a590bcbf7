// Fine activations, for any vector V, in the order in which linear_rows.h and linear_blocks.h multiply them.
//
//   4 bits: a step is 2 * V::bytes columns; the low halves of a load's bytes are the even ones, the high halves the odd ones,
//           so the step's activations are the even columns and then the odd ones.
//   5 and 6 bits: the same.
//   8 bits: a step is V::bytes columns, as they come.
//
// Either way lane l of a step's products covers neighbouring columns, eight of them or four, so that scales of activations and of
// small blocks of weights are vectors over lanes.
#pragma once
#include "elementwise.h"

namespace headrace {
namespace {

// A step of the activations for 5 and 6 bits.
template <class V>
struct SplitStep {
  int8_t codes[2 * V::bytes];  // even columns, odd columns
  float scales[V::lanes];      // of 8 columns
  int32_t start[V::lanes];     // of a variant that keeps factors apart, int16: of two even columns and two odd ones together

  static const SplitStep* of(const Fine& x, int bits) { return reinterpret_cast<const SplitStep*>(x.split[bits - 5]); }
};

template <class V, int Bits>
struct Steps {
  static constexpr int vectors = Bits == 8 ? 1 : 2;
  static constexpr int columns = vectors * V::bytes;
  static constexpr int per_lane = columns / V::lanes;
  static constexpr int apart = unit_of(Bits) / 2 / columns;  // steps between two that share scales, of 4 and 8 bits
  static const int8_t* codes(const Fine& x, size_t step) {
    if constexpr (Bits == 4) return x.four.codes + step * columns;
    else if constexpr (Bits == 8) return x.eight.codes + step * columns;
    else return SplitStep<V>::of(x, Bits)[step].codes;
  }
  static const float* scales(const Fine& x, size_t step) {
    if constexpr (Bits == 8) return x.eight.scales + step * V::lanes;
    else return SplitStep<V>::of(x, Bits)[step].scales;
  }
  // What sums of a step begin with.
  static typename V::I start(const Fine& x, size_t step) {
    if constexpr (Bits == 4) return V::load(x.four.steps + step * V::lanes);
    else if constexpr (V::signed_bytes) return V::zero();
    else if constexpr (Bits == 8) return V::load(x.eight.steps + step * V::lanes);
    else return V::load(SplitStep<V>::of(x, Bits)[step].start);
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

// Shared: columns half a unit apart have one factor.
template <class V, bool Shared>
inline void factor_codes(const float* x, int k, FactorCodes& out) {
  using S = Steps<V, 4>;
  using I = typename V::I;
  using F = typename V::F;
  constexpr int unit = unit_of(4), half = unit / 2, N = S::per_lane > V::lanes ? S::per_lane / V::lanes : 1;
  const float top = largest<V>(x, k), least = top > kLeastTop ? top : kLeastTop;
  const F up = V::setf(kMostFactor / least), inverse = V::setf(127 * kMostFactor / least);
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
    for (int c = 0; c < unit && from + c < k; c += S::columns, s++) {
      alignas(64) int32_t factor[V::lanes];
      int16_t* pairs = out.factors + s * 2 * V::lanes;
      for (int l = 0; l < V::lanes; l++) {
        factor[l] = factors[c + l * S::per_lane];
        pairs[l / 4 * 8 + l % 4] = pairs[l / 4 * 8 + l % 4 + 4] = int16_t(factor[l]);
      }
      V::store_apart(out.codes + from + c, V::load(codes + c), V::load(codes + c + V::bytes));
      const I start = start_of<V, 4>(out.codes + from + c);
      V::store(out.steps + s * V::lanes, start);
      segment = V::add32(segment, V::mul32(start, V::load(factor)));
      if ((s + 1) % (kSegment / S::columns) == 0 || from + c + S::columns >= k) {
        V::store(out.segments + from / kSegment * V::lanes, V::template merge<0>(segment, segment));
        segment = V::zero();
      }
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
      V::store(out.steps + s * V::lanes, start), V::store(out.steps + other * V::lanes, second);
      V::store(out.pairs + s * V::lanes, V::add32(start, second));
      for (int l = 0; l < V::lanes; l++)
        out.scales[s * V::lanes + l] = out.scales[other * V::lanes + l] = scales[c + l * S::per_lane];
    }
  }
}

template <class V, int Bits>
inline void split_codes(const float* x, int k, SplitStep<V>* out) {
  using S = Steps<V, Bits>;
  static_assert(sizeof(SplitStep<V>) <= kSplitBytes * S::columns);
  constexpr int columns = S::columns, N = S::per_lane > V::lanes ? S::per_lane / V::lanes : 1;
  for (int from = 0; from < k; from += columns, out++) {
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
  if (kinds & kRowsOf4) factor_codes<V, true>(x, k, out.four);
  else if (kinds & kBlocksOf4) factor_codes<V, false>(x, k, out.four);
  if (kinds & kAllOf5) split_codes<V, 5>(x, k, reinterpret_cast<SplitStep<V>*>(out.split[0]));
  if (kinds & kAllOf6) split_codes<V, 6>(x, k, reinterpret_cast<SplitStep<V>*>(out.split[1]));
  if (kinds & kAllOf8) scaled_codes<V>(x, k, out.eight);
}

}  // namespace
}  // namespace headrace
