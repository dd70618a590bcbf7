// Attention over the int8 cache, for any vector V. Scores and weighted values are the same product: rows of int16 (queries;
// probabilities) by int8 columns that lie in pairs along what is summed (head dimension; positions).
#pragma once
#include "elementwise.h"

namespace headrace {
namespace {

// out[r][n][lane] = Σ over steps: pairs a[r][2s, 2s + 1] · b[step s][vector n][lane][2]; R rows, N vectors.
template <class V, int R, int N>
inline void pairs(const int16_t* a, size_t a_stride, const int8_t* b, size_t vector_bytes, size_t step_bytes, int steps,
                  int32_t* out, size_t out_stride) {
  typename V::I sum[R][N];
  HEADRACE_UNROLL for (int r = 0; r < R; r++) HEADRACE_UNROLL for (int n = 0; n < N; n++) sum[r][n] = V::zero();
  for (int s = 0; s < steps; s++) {
    typename V::I columns[N];
    HEADRACE_UNROLL for (int n = 0; n < N; n++) columns[n] = V::kept(V::widen(b + s * step_bytes + n * vector_bytes));
    HEADRACE_UNROLL for (int r = 0; r < R; r++) {
      const auto pair = V::broadcast32(a + r * a_stride + 2 * s);
      HEADRACE_UNROLL for (int n = 0; n < N; n++) sum[r][n] = V::dot16(sum[r][n], columns[n], pair);
    }
  }
  HEADRACE_UNROLL for (int r = 0; r < R; r++) HEADRACE_UNROLL for (int n = 0; n < N; n++)
      V::store(out + r * out_stride + n * V::lanes, sum[r][n]);
}

template <class V, int N>
inline void rows_of_pairs(int rows, const int16_t* a, size_t a_stride, const int8_t* b, size_t vector_bytes,
                          size_t step_bytes, int steps, int32_t* out, size_t out_stride) {
  constexpr int R = V::attend_rows;
  int r = 0;
  for (; r + R <= rows; r += R)
    pairs<V, R, N>(a + r * a_stride, a_stride, b, vector_bytes, step_bytes, steps, out + r * out_stride, out_stride);
  if (rows - r >= 3) {
    pairs<V, 3, N>(a + r * a_stride, a_stride, b, vector_bytes, step_bytes, steps, out + r * out_stride, out_stride);
    r += 3;
  }
  for (; r < rows; r++)
    pairs<V, 1, N>(a + r * a_stride, a_stride, b, vector_bytes, step_bytes, steps, out + r * out_stride, out_stride);
}

// A block's scores of one row to probabilities; n positions count. Gives the factor of sums over the codes.
template <class V>
inline float softmax_block(const int32_t* dots, float scale, int n, int16_t* p, float& m, float& l, float& old) {
  constexpr int vectors = kBlock / V::lanes;
  const float lowest = -__builtin_inff();
  float scores[kBlock];
  auto tops = V::setf(lowest);
  for (int i = 0; i < vectors; i++) {
    const auto s = V::mul(V::to_float(V::load(dots + i * V::lanes)), V::setf(scale));
    V::storef(scores + i * V::lanes, s);
  }
  for (int j = n; j < kBlock; j++) scores[j] = lowest;
  for (int i = 0; i < vectors; i++) tops = V::max(tops, V::loadf(scores + i * V::lanes));
  const float top = V::top(tops);
  auto total = V::zero();
  for (int i = 0; i < vectors; i++) {
    const auto e = exp2<V>(V::sub(V::loadf(scores + i * V::lanes), V::setf(top)));
    const auto codes = V::to_int(V::mul(e, V::setf(32767)));
    total = V::add32(total, codes);
    V::store16(p + i * V::lanes, codes);
  }
  const float next = top > m ? top : m;
  old = __builtin_exp2f(m - next);
  const float unit = __builtin_exp2f(top - next) / 32767;
  l = l * old + float(V::sum32(total)) * unit;
  m = scale == scale ? next : scale;
  return unit;
}

template <class V>
void attend(const Attend& a) {
  constexpr int lanes = V::lanes;
  for (int r = 0; r < a.rows; r++) {
    a.m[r] = -__builtin_inff(), a.l[r] = 0;
    for (int d = 0; d < a.padded; d++) a.sum[size_t(r) * a.padded + d] = 0;
  }
  const int stride = a.padded > kBlock ? a.padded : kBlock;
  for (int from = a.begin; from < a.end; from += kBlock) {
    // Rows look at more positions from first to last; those that see nothing of the block are skipped.
    int first = 0;
    while (first < a.rows && a.limit[first] <= from) first++;
    const int rows = a.rows - first;
    const int16_t* q = a.q + size_t(first) * a.head_dim;
    const int8_t* keys = a.keys + size_t(from) * a.head_dim;
    constexpr int at_once = 4;  // vectors
    for (int p = 0; p < kBlock; p += at_once * lanes) {
      // A vector is `lanes` positions; a tile has kTile.
      if constexpr (lanes == kTile) {
        rows_of_pairs<V, at_once>(rows, q, a.head_dim, keys + size_t(p) * a.head_dim, size_t(kTile) * a.head_dim, 2 * kTile,
                                  a.head_dim / 2, a.s + p, stride);
      } else {
        constexpr int halves = kTile / lanes;
        for (int v = 0; v < at_once; v += halves)
          rows_of_pairs<V, halves>(rows, q, a.head_dim, keys + size_t(p + v * lanes) * a.head_dim, 2 * lanes, 2 * kTile,
                                   a.head_dim / 2, a.s + p + v * lanes, stride);
      }
    }
    float unit[V::most_rows], old[V::most_rows];
    for (int r0 = 0; r0 < rows; r0 += V::most_rows) {
      const int count = rows - r0 < V::most_rows ? rows - r0 : V::most_rows;
      for (int i = 0; i < count; i++) {
        const int r = first + r0 + i, seen = a.limit[r] - from;
        unit[i] = softmax_block<V>(a.s + size_t(r0 + i) * stride, a.q_scale[r], seen < kBlock ? seen : kBlock,
                                   a.p + size_t(r0 + i) * kBlock, a.m[r], a.l[r], old[i]);
      }
      const int16_t* p = a.p + size_t(r0) * kBlock;
      const int8_t* values = a.values + size_t(from) * a.padded;
      int32_t* s = a.s + size_t(r0) * stride;
      const int there = a.end - from < kBlock ? a.end - from : kBlock, steps = (there + 1) / 2;
      int d = 0;
      for (; d + 4 * lanes <= a.padded; d += 4 * lanes)
        rows_of_pairs<V, 4>(count, p, kBlock, values + 2 * d, 2 * lanes, 2 * a.padded, steps, s + d, stride);
      for (; d + 2 * lanes <= a.padded; d += 2 * lanes)
        rows_of_pairs<V, 2>(count, p, kBlock, values + 2 * d, 2 * lanes, 2 * a.padded, steps, s + d, stride);
      for (; d < a.padded; d += lanes)
        rows_of_pairs<V, 1>(count, p, kBlock, values + 2 * d, 2 * lanes, 2 * a.padded, steps, s + d, stride);
      for (int i = 0; i < count; i++) {
        float* sum = a.sum + size_t(first + r0 + i) * a.padded;
        for (int e = 0; e < a.padded; e += lanes)
          V::storef(sum + e, V::fma(V::to_float(V::load(s + size_t(i) * stride + e)), V::setf(unit[i]),
                                    V::mul(V::loadf(sum + e), V::setf(old[i]))));
      }
    }
  }
}

}  // namespace
}  // namespace headrace
