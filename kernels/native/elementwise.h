// Norms, sums, silu, rotation and quantization of single rows, for any vector V.
#pragma once
#include "kernels.h"

#if defined(HEADRACE_ROLLED)  // instrumented, unrolled loops become functions that compilers take many minutes for
#define HEADRACE_UNROLL
#elif defined(__clang__)
#define HEADRACE_UNROLL _Pragma("unroll")
#else
#define HEADRACE_UNROLL _Pragma("GCC unroll 16")
#endif

// A function of its own: inside a large one, gcc 12 moves its sums to memory and back.
#define HEADRACE_APART __attribute__((noinline))

namespace headrace {
namespace {

constexpr size_t kAhead = 8192;  // bytes, at least, that are on their way from memory to the second level of the cache

template <int N> struct Number { static constexpr int value = N; };

// Whether factors of blocks stay apart from codes of 5 and 6 bits: where products of bytes are made in steps, whole bytes take more of them.
template <class V> constexpr bool factors_apart = V::pairs;

// Whether rows of 4 bits are summed apart, so that factors multiply pairs of products, and bytes widen to be multiplied with int16: where
// products of four bytes take three instructions. Elsewhere sums of two rows of 4 bits are one vector, and int16 are two bytes.
template <class V> constexpr bool rows_apart = V::pairs;
template <class V> constexpr int wide_vectors = rows_apart<V> ? 1 : 2;  // of a row's sums by a token, of 8 bits

// 2^x: the whole part by the exponent, the rest by a polynomial (Taylor of 2^r on -0.5 … 0.5, error below 2e-7).
template <class V>
inline typename V::F exp2(typename V::F x) {
  x = V::max(V::min(x, V::setf(127)), V::setf(-127));
  const auto whole = V::round(x), r = V::sub(x, whole);
  auto y = V::setf(1.540353e-4f);
  y = V::fma(y, r, V::setf(1.3333558e-3f));
  y = V::fma(y, r, V::setf(9.6181291e-3f));
  y = V::fma(y, r, V::setf(5.5504109e-2f));
  y = V::fma(y, r, V::setf(2.4022651e-1f));
  y = V::fma(y, r, V::setf(6.9314718e-1f));
  y = V::fma(y, r, V::setf(1.0f));
  return V::scalef(y, whole);
}

// The same for x of 0 and below, good enough for int16 (minimax on -0.5 … 0.5, error 4e-6).
template <class V>
inline typename V::F exp2_below_0(typename V::F x) {
  x = V::max(x, V::setf(-127));
  const auto whole = V::round(x), r = V::sub(x, whole);
  auto y = V::setf(9.66637e-3f);
  y = V::fma(y, r, V::setf(5.592198e-2f));
  y = V::fma(y, r, V::setf(2.4022349e-1f));
  y = V::fma(y, r, V::setf(6.9312105e-1f));
  y = V::fma(y, r, V::setf(1.0f));
  return V::scalef(y, whole);
}

// The largest magnitude. Magnitudes are compared as bits, where infinity and then NaN are above all numbers.
template <class V>
inline float largest(const float* x, int k) {
  const auto magnitude = V::set32(0x7fffffff);
  auto tops = V::zero();
  int i = 0;
  for (; i + V::lanes <= k; i += V::lanes) tops = V::max_unsigned(tops, V::and_bits(V::bits(V::loadf(x + i)), magnitude));
  uint32_t top = V::top_unsigned(tops);
  for (; i < k; i++) {
    uint32_t one;
    __builtin_memcpy(&one, x + i, 4);
    one &= 0x7fffffff;
    top = one > top ? one : top;
  }
  float value;
  __builtin_memcpy(&value, &top, 4);
  return value;
}

inline int rounded(float x, int limit) {  // NaN gives 0: the scale carries it
  const float r = __builtin_nearbyintf(x);
  return r >= float(limit) ? limit : r <= float(-limit) ? -limit : r == r ? int(r) : 0;
}

template <class V>
float quantize(const float* x, int k, int16_t* codes) {
  const float top = largest<V>(x, k), inverse = top > 0 ? kTop / top : 0;
  int i = 0;
  for (; i + V::lanes <= k; i += V::lanes) V::store16(codes + i, V::to_int(V::mul(V::loadf(x + i), V::setf(inverse))));
  for (; i < k; i++) codes[i] = int16_t(rounded(x[i] * inverse, kTop));
  return top / kTop;
}

template <class V>
void cache_codes(const float* x, float scale, int k, int8_t* codes) {
  int i = 0;
  for (; i + V::lanes <= k; i += V::lanes) V::store8(codes + i, V::to_int(V::div(V::loadf(x + i), V::setf(scale))));
  for (; i < k; i++) {
    const float c = __builtin_nearbyintf(x[i] / scale);
    codes[i] = int8_t(c >= 127 ? 127 : c > -128 ? c : -128);
  }
}

template <class V>
void rms_norm(const float* x, const float* weight, float eps, int k, float* y) {
  auto a = V::zerof(), b = V::zerof();
  int i = 0;
  for (; i + 2 * V::lanes <= k; i += 2 * V::lanes) {
    const auto u = V::loadf(x + i), v = V::loadf(x + i + V::lanes);
    a = V::fma(u, u, a), b = V::fma(v, v, b);
  }
  float squares = V::sum(V::add(a, b));
  for (; i < k; i++) squares += x[i] * x[i];
  const float factor = 1 / __builtin_sqrtf(squares / float(k) + eps);
  for (i = 0; i + V::lanes <= k; i += V::lanes)
    V::storef(y + i, V::mul(V::mul(V::loadf(x + i), V::setf(factor)), V::loadf(weight + i)));
  for (; i < k; i++) y[i] = x[i] * factor * weight[i];
}

template <class V>
void add(const float* a, const float* b, int k, float* y) {
  int i = 0;
  for (; i + V::lanes <= k; i += V::lanes) V::storef(y + i, V::add(V::loadf(a + i), V::loadf(b + i)));
  for (; i < k; i++) y[i] = a[i] + b[i];
}

template <class V>
void silu_mul(const float* gate, const float* up, int k, float* y) {
  constexpr float log2e = 1.44269504088896340736f;
  for (int i = 0; i < k; i += V::lanes) {
    const int n = k - i < V::lanes ? k - i : V::lanes;
    float g[V::lanes] = {}, u[V::lanes] = {}, part[V::lanes];
    const float *from = gate + i, *with = up + i;
    if (n < V::lanes) {
      for (int j = 0; j < n; j++) g[j] = from[j], u[j] = with[j];
      from = g, with = u;
    }
    const auto x = V::loadf(from);
    const auto e = exp2<V>(V::mul(x, V::setf(-log2e)));
    const auto r = V::mul(V::div(x, V::add(V::setf(1), e)), V::loadf(with));
    if (n == V::lanes) {
      V::storef(y + i, r);
    } else {
      V::storef(part, r);
      for (int j = 0; j < n; j++) y[i + j] = part[j];
    }
  }
}

template <class V>
void rope(float* x, const float* cos, const float* sin, int half) {
  int i = 0;
  for (; i + V::lanes <= half; i += V::lanes) {
    const auto low = V::loadf(x + i), high = V::loadf(x + i + half), c = V::loadf(cos + i), s = V::loadf(sin + i);
    V::storef(x + i, V::sub(V::mul(low, c), V::mul(high, s)));
    V::storef(x + i + half, V::fma(high, c, V::mul(low, s)));
  }
  for (; i < half; i++) {
    const float low = x[i], high = x[i + half];
    x[i] = low * cos[i] - high * sin[i];
    x[i + half] = high * cos[i] + low * sin[i];
  }
}

}  // namespace
}  // namespace headrace
