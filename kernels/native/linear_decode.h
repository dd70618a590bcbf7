// Linears of few tokens, for any vector V: rows of packed codes are read once, straight from the file's pages, and
// multiplied with int16 activations that are laid out in the order in which a load of codes unpacks.
//
//   4 bits: a step is 2 * V::bytes columns. 16 bits of a row are columns 4w … 4w + 3, one in each nibble, so the step's
//           activations are four vectors; vector j holds columns 4w + j.
//   8 bits: a step is V::bytes columns; two vectors, the even and the odd columns.
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
  static constexpr int vectors = Bits == 4 ? 4 : 2;
  static constexpr int halves = V::bytes / 2;            // int16 of a vector
  static constexpr int per_lane = columns / V::lanes;    // columns of a lane
  static constexpr int per_segment = kSegment / columns;

  template <int J> static typename V::I part(typename V::I w) {
    if constexpr (Bits == 4) return V::template nibble<J>(w);
    else if constexpr (J == 0) return V::even_bytes(w);
    else return V::odd_bytes(w);
  }
};

// From natural order to that of the steps, and the starts of the sums.
template <class V, int Bits>
inline void arrange(const int16_t* natural, int k, int16_t* codes, int32_t* steps, int32_t* segments) {
  using S = Steps<V, Bits>;
  const int padded = int(round_up(k, S::columns));
  const auto zero_point = V::set16(Bits == 4 ? -8 : -128);
  auto segment = V::zero();
  for (int from = 0, s = 0; from < padded; from += S::columns, s++) {
    int16_t* to = codes + from;
    for (int j = 0; j < S::vectors; j++)
      for (int w = 0; w < S::halves; w++) to[j * S::halves + w] = natural[from + w * S::vectors + j];
    auto sum = V::zero();
    for (int j = 0; j < S::vectors; j++) sum = V::dot16(sum, V::load(to + j * S::halves), zero_point);
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
  if (four) arrange<V, 4>(out.natural, k, out.codes4, out.steps4, out.segments4);
  if (eight) arrange<V, 8>(out.natural, k, out.codes8, out.steps8, out.segments8);
}

enum class Scales { kRow, kBlocks, kLanes };  // one a row; blocks of whole steps; blocks of less than a step

// R rows by T tokens: sums over columns, still spread over lanes, to out[t][row][lane].
template <class V, int Bits, Scales Mode, int R, int T>
inline void spread_sums(const Weight& w, int n, const Fine* x, float* out) {
  using S = Steps<V, Bits>;
  using I = typename V::I;
  using F = typename V::F;
  constexpr int chains = R * T > 2 ? 1 : 2;  // sums that do not wait for each other
  const size_t row_bytes = w.row_bytes();
  const uint8_t* rows = w.packed + n * row_bytes;
  const uint16_t* scales = w.scale + size_t(n) * w.blocks();
  const int whole = w.k / S::columns, steps = (w.k + S::columns - 1) / S::columns;
  const int rest = int(row_bytes) - whole * V::bytes;
  const int per_flush = Mode == Scales::kRow ? S::per_segment : Mode == Scales::kBlocks ? w.block / S::columns : 1;
  F f[R][T];
  HEADRACE_UNROLL for (int r = 0; r < R; r++) HEADRACE_UNROLL for (int t = 0; t < T; t++) f[r][t] = V::zerof();
  for (int from = 0, flush = 0; from < steps; from += per_flush, flush++) {
    I sum[R][T][chains];
    HEADRACE_UNROLL for (int t = 0; t < T; t++) {
      const int32_t* starts = Mode == Scales::kRow ? (Bits == 4 ? x[t].segments4 : x[t].segments8) + flush * V::lanes
                                                   : (Bits == 4 ? x[t].steps4 : x[t].steps8) + from * V::lanes;
      HEADRACE_UNROLL for (int r = 0; r < R; r++) HEADRACE_UNROLL for (int c = 0; c < chains; c++)
          sum[r][t][c] = c ? V::zero() : V::load(starts);
    }
    const int to = from + per_flush < steps ? from + per_flush : steps;
    for (int s = from; s < to; s++) {
      I codes[R];
      HEADRACE_UNROLL for (int r = 0; r < R; r++) {
        const uint8_t* p = rows + r * row_bytes + size_t(s) * V::bytes;
        codes[r] = s < whole ? V::load(p) : V::load_part(p, rest);
        __builtin_prefetch(p + 2048);
      }
      if (Mode == Scales::kBlocks && s > from)
        HEADRACE_UNROLL for (int t = 0; t < T; t++) HEADRACE_UNROLL for (int r = 0; r < R; r++)
            sum[r][t][0] = V::add32(sum[r][t][0], V::load((Bits == 4 ? x[t].steps4 : x[t].steps8) + s * V::lanes));
      const auto part = [&](auto number) {
        constexpr int j = decltype(number)::value;
        HEADRACE_UNROLL for (int r = 0; r < R; r++) {
          const I numbers = S::template part<j>(codes[r]);
          HEADRACE_UNROLL for (int t = 0; t < T; t++)
              sum[r][t][j % chains] = V::dot16(sum[r][t][j % chains], numbers,
                                               V::load((Bits == 4 ? x[t].codes4 : x[t].codes8) + s * S::columns + j * S::halves));
        }
      };
      part(Number<0>()), part(Number<1>());
      if constexpr (S::vectors == 4) part(Number<2>()), part(Number<3>());
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
        const F total = V::to_float(chains == 2 ? V::add32(sum[r][t][0], sum[r][t][chains - 1]) : sum[r][t][0]);
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
  constexpr int R = T == 1 ? 1 : 2;
  alignas(64) float lanes[T * V::lanes * V::lanes];
  if (count < V::lanes)
    for (float& one : lanes) one = 0;
  int r = 0;
  for (; r + R <= count; r += R) spread_sums<V, Bits, Mode, R, T>(w, n + r, x, lanes + r * V::lanes);
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
