// Attention over the int8 cache, for any vector V. Scores and weighted values are the same product: rows of int16 (queries;
// probabilities) by int8 columns that lie in pairs along what is summed (head dimension; positions).
#pragma once
#include "elementwise.h"

namespace headrace {
namespace {

// Σ over steps of pairs a[r][2s, 2s + 1] · b[step s][vector n][lane][2] for R rows and N vectors; finish(r, n, sum) takes
// each result. Few rows wait for memory, which is asked beforehand, for what lies `ahead`.
template <class V, int R, int N, class Finish>
inline void pairs(const int16_t* a, size_t a_stride, const int8_t* b, size_t vector_bytes, size_t step_bytes, int steps,
                  ptrdiff_t ahead, int row, const Finish& finish) {
  typename V::I sum[R][N];
  HEADRACE_UNROLL for (int r = 0; r < R; r++) HEADRACE_UNROLL for (int n = 0; n < N; n++) sum[r][n] = V::zero();
  a += row * a_stride;
  for (int s = 0; s < steps; s++) {
    typename V::I columns[N];
    HEADRACE_UNROLL for (int n = 0; n < N; n++) {
      const int8_t* p = b + s * step_bytes + n * vector_bytes;
      columns[n] = V::kept(V::widen(p));
      if (R < V::attend_rows) __builtin_prefetch(p + ahead, 0, 2);
    }
    HEADRACE_UNROLL for (int r = 0; r < R; r++) {
      const auto pair = V::broadcast32(a + r * a_stride + 2 * s);
      HEADRACE_UNROLL for (int n = 0; n < N; n++) sum[r][n] = V::dot16(sum[r][n], columns[n], pair);
    }
  }
  HEADRACE_UNROLL for (int r = 0; r < R; r++) HEADRACE_UNROLL for (int n = 0; n < N; n++) finish(row + r, n, sum[r][n]);
}

template <class V, int N, class Finish>
inline void rows_of_pairs(int rows, const int16_t* a, size_t a_stride, const int8_t* b, size_t vector_bytes,
                          size_t step_bytes, int steps, ptrdiff_t ahead, const Finish& finish) {
  constexpr int R = V::attend_rows;
  int r = 0;
  for (; r + R <= rows; r += R) pairs<V, R, N>(a, a_stride, b, vector_bytes, step_bytes, steps, ahead, r, finish);
  if (rows - r >= 3) pairs<V, 3, N>(a, a_stride, b, vector_bytes, step_bytes, steps, ahead, r, finish), r += 3;
  if (rows - r == 2) pairs<V, 2, N>(a, a_stride, b, vector_bytes, step_bytes, steps, ahead, r, finish), r += 2;
  if (rows - r == 1) pairs<V, 1, N>(a, a_stride, b, vector_bytes, step_bytes, steps, ahead, r, finish);
}

// What a block does to some rows: sums become old * sum + unit * sum over codes.
template <class V>
struct Block {
  float top[V::most_rows], total[V::most_rows], old[V::most_rows], unit[V::most_rows];
};

// Scores of a row over a block's first n positions (products of codes) to int16 probabilities, relative to their maximum.
template <class V>
inline void probabilities(const int32_t* dots, float scale, int n, int16_t* p, float& top, float& total) {
  constexpr int vectors = kBlock / V::lanes;
  typename V::F scores[vectors];
  HEADRACE_UNROLL for (int i = 0; i < vectors; i++)
      scores[i] = V::mul(V::to_float(V::load(dots + i * V::lanes)), V::setf(scale));
  if (n < kBlock) {
    float all[kBlock];
    for (int i = 0; i < vectors; i++) V::storef(all + i * V::lanes, scores[i]);
    for (int j = n; j < kBlock; j++) all[j] = -__builtin_inff();
    for (int i = 0; i < vectors; i++) scores[i] = V::loadf(all + i * V::lanes);
  }
  auto tops = scores[0];
  HEADRACE_UNROLL for (int i = 1; i < vectors; i++) tops = V::max(tops, scores[i]);
  top = V::top(tops);
  auto sum = V::zero();
  HEADRACE_UNROLL for (int i = 0; i < vectors; i++) {
    const auto codes = V::to_int(V::mul(exp2_below_0<V>(V::sub(scores[i], V::setf(top))), V::setf(32767)));
    sum = V::add32(sum, codes);
    V::store16(p + i * V::lanes, codes);
  }
  total = float(V::sum32(sum));
}

// Moves the rows' maxima and sums on. A scale that is no number makes the row so.
template <class V>
inline void move_on(const float* scale, int rows, float* m, float* l, Block<V>& block) {
  for (int r = 0; r < rows; r += V::lanes) {
    const int n = rows - r < V::lanes ? rows - r : V::lanes;
    float was[V::lanes] = {}, sum[V::lanes] = {}, scales[V::lanes] = {};
    for (int i = 0; i < n; i++) was[i] = m[r + i], sum[i] = l[r + i], scales[i] = scale[r + i];
    const auto top = V::loadf(block.top + r), before = V::loadf(was), next = V::max(top, before);
    const auto old = exp2<V>(V::sub(before, next));
    const auto unit = V::fma(V::loadf(scales), V::zerof(), V::mul(exp2<V>(V::sub(top, next)), V::setf(1.0f / 32767)));
    V::storef(block.old + r, old);
    V::storef(block.unit + r, unit);
    V::storef(was, next);
    V::storef(sum, V::fma(V::loadf(block.total + r), unit, V::mul(V::loadf(sum), old)));
    for (int i = 0; i < n; i++) m[r + i] = was[i], l[r + i] = sum[i];
  }
}

// How far ahead of `at` memory is asked for where `left` bytes are to be read from there on: what comes after them is `next`.
inline ptrdiff_t reading_ahead(const int8_t* at, size_t left, const int8_t* next) {
  return left > kAhead || !next ? ptrdiff_t(kAhead) : next - at + ptrdiff_t(kAhead - left);
}

template <class V>
void attend(const Attend& a) {
  constexpr int lanes = V::lanes;
  for (int r = 0; r < a.rows; r++) {
    a.m[r] = -__builtin_inff(), a.l[r] = 0;
    for (int d = 0; d < a.padded; d++) a.sum[size_t(r) * a.padded + d] = 0;
  }
  for (int from = a.begin; from < a.end; from += kBlock) {
    // Rows look at more positions from first to last; those that see nothing of the block are skipped.
    int first = 0;
    while (first < a.rows && a.limit[first] <= from) first++;
    const int rows = a.rows - first;
    const int16_t* q = a.q + size_t(first) * a.head_dim;
    const int8_t* keys = a.keys + size_t(from) * a.head_dim;
    const size_t left = size_t(a.end - from);
    const ptrdiff_t keys_ahead = reading_ahead(keys, left * a.head_dim, a.next_keys);
    constexpr int at_once = 4;  // vectors
    const auto to_scores = [&](int position) {
      return [=](int r, int n, typename V::I sum) { V::store(a.s + size_t(r) * kBlock + position + n * lanes, sum); };
    };
    for (int p = 0; p < kBlock; p += at_once * lanes) {
      // A vector is `lanes` positions; a tile has kTile.
      if constexpr (lanes == kTile) {
        rows_of_pairs<V, at_once>(rows, q, a.head_dim, keys + size_t(p) * a.head_dim, size_t(kTile) * a.head_dim, 2 * kTile,
                                  a.head_dim / 2, keys_ahead, to_scores(p));
      } else {
        constexpr int halves = kTile / lanes;
        for (int v = 0; v < at_once; v += halves)
          rows_of_pairs<V, halves>(rows, q, a.head_dim, keys + size_t(p + v * lanes) * a.head_dim, 2 * lanes, 2 * kTile,
                                   a.head_dim / 2, keys_ahead, to_scores(p + v * lanes));
      }
    }
    for (int r0 = 0; r0 < rows; r0 += V::most_rows) {
      const int count = rows - r0 < V::most_rows ? rows - r0 : V::most_rows;
      Block<V> block{};
      for (int i = 0; i < count; i++) {
        const int r = first + r0 + i, seen = a.limit[r] - from;
        probabilities<V>(a.s + size_t(r0 + i) * kBlock, a.q_scale[r], seen < kBlock ? seen : kBlock,
                         a.p + size_t(r0 + i) * kBlock, block.top[i], block.total[i]);
      }
      move_on<V>(a.q_scale + first + r0, count, a.m + first + r0, a.l + first + r0, block);
      const int16_t* p = a.p + size_t(r0) * kBlock;
      const int8_t* values = a.values + size_t(from) * a.padded;
      const ptrdiff_t values_ahead = reading_ahead(values, left * a.padded, a.next_values);
      float* sums = a.sum + size_t(first + r0) * a.padded;
      const int there = a.end - from < kBlock ? a.end - from : kBlock, steps = (there + 1) / 2;
      const auto to_sums = [&](int d) {
        return [=, &block](int r, int n, typename V::I codes) {
          float* sum = sums + size_t(r) * a.padded + d + n * lanes;
          V::storef(sum, V::fma(V::to_float(codes), V::setf(block.unit[r]), V::mul(V::loadf(sum), V::setf(block.old[r]))));
        };
      };
      int d = 0;
      for (; d + 4 * lanes <= a.padded; d += 4 * lanes)
        rows_of_pairs<V, 4>(count, p, kBlock, values + 2 * d, 2 * lanes, 2 * a.padded, steps, values_ahead, to_sums(d));
      for (; d + 2 * lanes <= a.padded; d += 2 * lanes)
        rows_of_pairs<V, 2>(count, p, kBlock, values + 2 * d, 2 * lanes, 2 * a.padded, steps, values_ahead, to_sums(d));
      for (; d < a.padded; d += lanes)
        rows_of_pairs<V, 1>(count, p, kBlock, values + 2 * d, 2 * lanes, 2 * a.padded, steps, values_ahead, to_sums(d));
    }
  }
}

}  // namespace
}  // namespace headrace
