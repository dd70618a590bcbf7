// Linears of few tokens whose weights have blocks. As many rows as a block has lanes share a vector, so that a block's sum, all
// of it one integer for 4-bit weights, is converted and scaled once.
#pragma once
#include <algorithm>

#include "factors.h"
#include "products.h"

namespace headrace {
namespace {

// Where a vector merged up to `Level` takes its scales from, when rows' scales lie one after the other: Parts of each. Of
// nibbles: in which four bytes, and from which bit on.
template <class V, int Level>
struct Order {
  alignas(64) int from[V::lanes], word[V::lanes], bit[V::lanes];
  alignas(64) int first[(V::lanes >> Level) + 1][V::lanes];  // for every number of parts: all bits of a lane of one of the first parts
  constexpr Order() : from(), word(), bit(), first() {
    constexpr int rows = 1 << Level, parts = V::lanes / rows;
    for (int lane = 0; lane < V::lanes; lane++) {
      const int four = lane / 4, place = lane % 4;
      int row = lane, part = 0;
      if (Level == 1) row = place / 2, part = 2 * four + place % 2;
      if (Level > 1) row = four / parts * 4 + place, part = four % parts;
      from[lane] = row * parts + part;
      word[lane] = from[lane] / 8, bit[lane] = from[lane] % 8 * 4;
      for (int i = 0; i <= parts; i++) first[i][lane] = part < i ? -1 : 0;
    }
  }
};

// Scales of V::lanes / Parts rows, `stride` apart, as their merged sums lie; only `there` of each row's Parts exist, but all may be
// read when `more` rows follow.
template <class V, int Parts>
inline typename V::F block_scales(const uint16_t* p, size_t stride, int there, bool more) {
  constexpr int rows = V::lanes / Parts;
  static constexpr Order<V, log2_of(rows)> order;
  if (there >= Parts || more) {
    const auto scales = V::permuted(V::template halves_of<Parts>(p, stride), order.from);
    return there >= Parts ? scales : V::floats(V::and_bits(V::bits(scales), V::load(order.first[there])));
  }
  alignas(64) uint16_t halves[V::lanes] = {};
  for (int i = 0; i < there; i++)
    for (int r = 0; r < rows; r++) halves[r * Parts + i] = p[r * stride + i];
  return V::permuted(V::halves(halves), order.from);
}

// The first bytes of rows, `stride` apart, each row's `bits` above the last one's.
HEADRACE_APART inline uint64_t few_bytes(const uint8_t* p, size_t stride, int bytes, int rows, int bits) {
  uint64_t all = 0;
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < bytes; i++) all |= uint64_t(p[r * stride + i]) << (bits * r + 8 * i);
  return all;
}

// The same of scales that are factors; those that do not exist are anything.
template <class V, int Parts>
inline typename V::F block_scales(const uint8_t* p, size_t stride, int there, bool more) {
  constexpr int rows = V::lanes / Parts;
  static constexpr Order<V, log2_of(rows)> order;
  uint64_t nibbles = 0;
  if (there >= Parts || more) {
    HEADRACE_UNROLL for (int r = 0; r < rows; r++) {
      uint64_t row = 0;
      __builtin_memcpy(&row, p + r * stride, Parts / 2);
      nibbles |= row << 4 * Parts * r;
    }
  } else {
    nibbles = few_bytes(p, stride, (there + 1) / 2, rows, 4 * Parts);
  }
  return V::factors(V::spread(nibbles, order.word), V::load(order.bit));
}

// The same where blocks are of whole steps: of V::lanes blocks, [block][row]; only `there` blocks exist.
template <class V>
HEADRACE_APART void many_block_scales(const uint16_t* p, size_t stride, int there, float* out) {
  typename V::I scales[V::lanes];
  for (int r = 0; r < V::lanes; r++) {
    const uint16_t* at = p + r * stride;
    uint16_t halves[V::lanes] = {};
    const bool all = there >= V::lanes;
    for (int i = 0; !all && i < there; i++) halves[i] = at[i];
    scales[r] = V::bits(V::halves(all ? at : halves));
  }
  V::transpose(scales);
  for (int b = 0; b < V::lanes; b++) V::store(out + b * V::lanes, scales[b]);
}

template <class V>
HEADRACE_APART void many_block_scales(const uint8_t* p, size_t stride, int there, float* out) {
  const RowFactors<V> factors(p, stride, V::lanes, (std::min(there, V::lanes) + 1) / 2);
  for (int b = 0; b < V::lanes; b++) V::storef(out + b * V::lanes, factors.of(b));
}

// Scaled products of step s of G times 2^Level rows from `row` on by T tokens, merged: G vectors of sums over 2^Level lanes of each row.
template <class V, int Bits, int T, int G, bool Whole, int Level, class Rows>
__attribute__((always_inline)) inline void merged_products(const Fine* x, int s, const Rows& rows, size_t row,
                                                           Sum<V, Bits> (&sum)[T][G]) {
  using S = Steps<V, Bits>;
  using I = typename V::I;
  if constexpr (Level <= V::together) {
    constexpr int R = G << Level, N = vectors_of<V, Bits>(R), each = N / G;
    const Columns<V, Bits, R, Whole> columns(rows, row, s);
    HEADRACE_UNROLL for (int t = 0; t < T; t++) {
      const I start = S::start(x[t], s);
      I product[R];
      HEADRACE_UNROLL for (int r = 0; r < R; r++) product[r] = start;
      columns.dot(S::codes(x[t], s), product);
      Sum<V, Bits> scaled[N] = {};
      add_scaled<V, Bits, R>(x[t], s, product, scaled);
      HEADRACE_UNROLL for (int g = 0; g < G; g++) {
        Sum<V, Bits> own[each];
        HEADRACE_UNROLL for (int i = 0; i < each; i++) own[i] = scaled[g * each + i];
        sum[t][g] = all_merged<V, Level - log2_of(each)>(own);
      }
    }
  } else {
    static_assert(G == 1);
    Sum<V, Bits> first[T][1], second[T][1];
    merged_products<V, Bits, T, 1, Whole, Level - 1>(x, s, rows, row, first);
    merged_products<V, Bits, T, 1, Whole, Level - 1>(x, s, rows, row + (1 << (Level - 1)), second);
    HEADRACE_UNROLL for (int t = 0; t < T; t++) sum[t][0] = V::template merge<Level - 1>(first[t][0], second[t][0]);
  }
}

template <class V> inline typename V::F as_float(typename V::I v) { return V::to_float(v); }
template <class V> inline typename V::F as_float(typename V::F v) { return v; }
template <class V> inline typename V::I added(typename V::I a, typename V::I b) { return V::add32(a, b); }
template <class V> inline typename V::F added(typename V::F a, typename V::F b) { return V::add(a, b); }

// V::lanes rows with blocks by T tokens: total[t][row]. Scales of blocks are halves or bytes of two factors, `per_row` of them.
template <class V, int Bits, int Parts, int T, class Scale>
HEADRACE_APART void block_rows(const Weight& w, const Scale* all, size_t per_row, int n, int row_stride, const Fine* x,
                               typename V::F* total) {
  using S = Steps<V, Bits>;
  constexpr int N = V::lanes / Parts, level = log2_of(N);
  constexpr bool factors = sizeof(Scale) == 1;
  constexpr int each = factors ? 2 : 1;  // blocks
  const size_t stride = row_stride * per_row;
  const size_t behind = w.n - 1 - (n + row_stride * (V::lanes - 1));
  const auto rows = rows_of<V, Bits, 0>(w, n, row_stride, columns_ahead(w, V::lanes));
  const Scale* scales = all + n * per_row;
  // What a last step lacks can be read as well, being the next rows', where it is multiplied with zeros; so can its scales.
  const bool more = behind * w.row_bytes() >= V::bytes;
  const int blocks = w.blocks(), whole = w.k / S::columns, per_flush = Parts == 1 ? w.block / S::columns : 1;
  const int flushes = int(round_up(w.k, Parts == 1 ? w.block : S::columns)) / (per_flush * S::columns);
  constexpr int G = V::together > level && Parts > 1 ? 2 : 1;  // vectors of rows at a time, which share loads of activations
  typename V::F sums[T][Parts];
  alignas(64) float many[V::lanes * V::lanes];
  for (int g = 0; g < Parts; g += G) {
    typename V::F f[T][G];
    HEADRACE_UNROLL for (int t = 0; t < T; t++) HEADRACE_UNROLL for (int i = 0; i < G; i++) f[t][i] = V::zerof();
    const auto add = [&](auto is_whole, int flush) __attribute__((always_inline)) {
      if (Parts == 1 && flush % V::lanes == 0) many_block_scales<V>(scales + flush / each, stride, blocks - flush, many);
      const auto products = [&](int s, Sum<V, Bits>(&of)[T][G]) __attribute__((always_inline)) {
        merged_products<V, Bits, T, G, decltype(is_whole)::value, level>(x, s, rows, g * N, of);
      };
      Sum<V, Bits> sum[T][G];
      products(flush * per_flush, sum);
      for (int s = flush * per_flush + 1; s < (flush + 1) * per_flush; s++) {
        Sum<V, Bits> one[T][G];
        products(s, one);
        HEADRACE_UNROLL for (int t = 0; t < T; t++)
            HEADRACE_UNROLL for (int i = 0; i < G; i++) sum[t][i] = added<V>(sum[t][i], one[t][i]);
      }
      HEADRACE_UNROLL for (int i = 0; i < G; i++) {
        const Scale* own = scales + (g + i) * N * stride + size_t(flush) * Parts / each;
        typename V::F scale;
        if constexpr (Parts == 1) scale = V::loadf(many + flush % V::lanes * V::lanes);
        else scale = block_scales<V, Parts>(own, stride, blocks - flush * Parts, more);
        HEADRACE_UNROLL for (int t = 0; t < T; t++) f[t][i] = V::fma(as_float<V>(sum[t][i]), scale, f[t][i]);
      }
    };
    int flush = 0;
    for (const int some = whole / per_flush; flush < some; flush++) add(Number<1>(), flush);
    if (flush < flushes && more) add(Number<1>(), flush);
    else if (flush < flushes) add(Number<0>(), flush);
    HEADRACE_UNROLL for (int t = 0; t < T; t++) HEADRACE_UNROLL for (int i = 0; i < G; i++) sums[t][g + i] = f[t][i];
  }
  HEADRACE_UNROLL for (int t = 0; t < T; t++) total[t] = all_merged<V, level>(sums[t]);
  if constexpr (factors)
    HEADRACE_UNROLL for (int t = 0; t < T; t++) total[t] = V::mul(total[t], row_scales<V>(w, n, row_stride));
}

template <class V, int Bits, int Parts>
inline void decode_blocks(const Weight& w, const Fine* x, int m, int begin, int end, const Out& out, int column) {
  constexpr int most = V::bytes < 64 ? 1 : Parts == 1 ? 2 : 4;  // tokens at a time, whose sums are in registers
  const auto run = [&](const auto* scales, size_t per_row) {
    vectors_of_rows<V>(begin, end, [&](int n, int stride) {
      few_at_a_time<most>(m, [&](auto number, int t) {
        constexpr int T = decltype(number)::value;
        typename V::F total[T];
        block_rows<V, Bits, Parts, T>(w, scales, per_row, n, stride, x + t, total);
        for (int i = 0; i < T; i++)
          write_rows<V>(w, n, stride ? V::lanes : 1, total[i], Bits == 4 ? x[t + i].four.scale : 1,
                        out.y + out.rows[t + i] * out.stride + column + n - begin);
      });
    });
  };
  if constexpr (Bits == 4)
    if (w.factors) return run(w.factors, w.factor_bytes());
  run(w.scale, w.blocks());
}

}  // namespace
}  // namespace headrace
