// The reference: every kernel in the plainest C++ that says what it computes. The variants are checked against it.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.h"
#include "kernels.h"

namespace headrace {
namespace {

float largest(const float* x, int k) {  // NaN when there is one
  float top = 0;
  for (int i = 0; i < k; i++) top = std::isnan(x[i]) || std::fabs(x[i]) > top ? std::fabs(x[i]) : top;
  for (int i = 0; i < k; i++)
    if (std::isnan(x[i])) return x[i];
  return top;
}

int rounded(float x, int limit) {  // NaN gives 0: the scale carries it
  if (!(x > float(-limit))) return x <= float(-limit) ? -limit : 0;
  return x > float(limit) ? limit : int(std::nearbyintf(x));
}

float quantize(const float* x, int k, int16_t* codes) {
  const float top = largest(x, k), inverse = top > 0 ? kTop / top : 0;
  for (int i = 0; i < k; i++) codes[i] = int16_t(rounded(x[i] * inverse, kTop));
  return top / kTop;
}

// The steps of such tokens as lie together.
template <class Step>
Step& step_of(uint8_t* steps, const Fine& x, size_t step) {
  return reinterpret_cast<Step*>(steps)[step * x.together + x.number];
}

// Codes in their own order, a factor for every eight of them.
struct Factored {
  int16_t factor;
  int8_t codes[8];
};

void factor_codes(const float* x, int k, bool shared, Fine& out) {
  static_assert(sizeof(Factored) <= 8 * kStepBytes);
  const float top = largest(x, k), least = std::max(top, kLeastTop), up = kMostFactor / least, inverse = 127 * kMostFactor / least;
  out.four.scale = top / (127 * kMostFactor);
  const auto factor = [&](int from) {
    int most = 1;
    for (int i = from; i < std::min(from + 8, k); i++) most = std::max(most, rounded(std::fabs(x[i]) * up + 0.5f, kMostFactor));
    return most;
  };
  for (int from = 0; from < k; from += 8) {
    const int own = factor(from), other = shared ? factor(from ^ unit_of(4) / 2) : 1;
    Factored& step = step_of<Factored>(out.four.steps, out, from / 8);
    step.factor = int16_t(std::max(own, other));
    for (int i = from; i < std::min(from + 8, k); i++) step.codes[i % 8] = int8_t(rounded(x[i] * (inverse / float(step.factor)), 127));
  }
}

// int16 codes.
void wide_codes(const float* x, int k, Fine& out) {
  const float top = largest(x, k), inverse = kTop / std::max(top, kLeastTop);
  out.wide.scale = top / kTop;
  for (int i = 0; i < k; i++) step_of<int16_t>(out.wide.steps, out, i) = int16_t(rounded(x[i] * inverse, kTop));
}

// Bytes with a scale for every four of them and for four half a unit further.
void scaled_codes(const float* x, int k, ScaledCodes& out) {
  for (int from = 0; from < k; from += 4) {
    const int other = from ^ unit_of(8) / 2;
    float top = largest(x + from, std::min(4, k - from));
    if (other < k) top = std::max(top, largest(x + other, std::min(4, k - other)));
    out.scales[from / 4] = top / 127;
    for (int i = from; i < std::min(from + 4, k); i++) out.codes[i] = int8_t(rounded(x[i] * (127 / std::max(top, kLeastTop)), 127));
  }
}

// The same with a scale for every eight neighbours.
struct Neighbours {
  float scale;
  int8_t codes[8];
};

void split_codes(const float* x, int k, int bits, const Fine& out) {
  static_assert(sizeof(Neighbours) <= 8 * kStepBytes);
  for (int from = 0; from < k; from += 8) {
    const int n = std::min(8, k - from);
    const float top = largest(x + from, n);
    Neighbours& step = step_of<Neighbours>(out.split[bits - 5], out, from / 8);
    step.scale = top / 127;
    for (int i = 0; i < n; i++) step.codes[i] = int8_t(rounded(x[from + i] * (127 / std::max(top, kLeastTop)), 127));
  }
}

void fine(const float* x, int k, unsigned kinds, Fine& out) {
  if (kinds & (kRowsOf4 | kBlocksOf4)) factor_codes(x, k, kinds & kRowsOf4, out);
  if (kinds & kAllOf5) split_codes(x, k, 5, out);
  if (kinds & kAllOf6) split_codes(x, k, 6, out);
  if (kinds & kRowsOf8) wide_codes(x, k, out);
  if (kinds & kBlocksOf8) scaled_codes(x, k, out.eight);
}

double value(const Fine& x, int k, const Weight& w) {
  if (w.bits == 4) {
    const Factored& own = step_of<Factored>(x.four.steps, x, k / 8);
    return double(own.codes[k % 8]) * own.factor * x.four.scale;
  }
  if (w.bits != 8) {
    const Neighbours& own = step_of<Neighbours>(x.split[w.bits - 5], x, k / 8);
    return double(own.codes[k % 8]) * own.scale;
  }
  if (!w.block) return double(step_of<int16_t>(x.wide.steps, x, k)) * x.wide.scale;
  return double(x.eight.codes[k]) * x.eight.scales[k / 4];
}

void decode(const Weight& w, const Fine* x, int m, int begin, int end, const Out& out, int column) {
  const int block = w.block ? w.block : w.k;
  for (int n = begin; n < end; n++)
    for (int i = 0; i < m; i++) {
      double total = 0;
      for (int b = 0; b < w.blocks(); b++) {
        double sum = 0;
        for (int k = b * block; k < (b + 1) * block; k++) sum += code_of(w, n, k) * value(x[i], k, w);
        total += sum * scale_of(w, n, b);
      }
      out.y[out.rows[i] * out.stride + column + n - begin] = float(total) + (w.bias ? w.bias[n] : 0);
    }
}

int place(int k) { return k / 8 * 8 + k % 2 * 4 + k % 8 / 2; }  // in every eight columns the even ones first

void coarse(const float* x, int row, bool, bool, const Coarse& out) {
  for (int c = 0; c < out.k; c += kColumns) std::memset(out.codes + (size_t(c) * out.m + size_t(row) * kColumns), 0, kColumns);
  for (int from = 0; from < out.k; from += out.group) {
    const int n = std::min(out.group, out.k - from);
    const float top = largest(x + from, n), inverse = top > 0 ? 127 / top : 0;
    out.scales[row * out.groups() + from / out.group] = top / 127;
    for (int k = from; k < from + n; k++) {
      int8_t* codes = out.codes + size_t(k / kColumns) * out.m * kColumns + size_t(row) * kColumns;
      codes[place(k % kColumns)] = int8_t(rounded(x[k] * inverse, 127));
    }
  }
}

void prompt(const Weight& w, const Coarse& x, int begin, int end, int first, int last, const Out& out, int column, void*) {
  const int block = w.block ? w.block : w.k, group = std::min(block, x.group);
  for (int n = begin; n < end; n++)
    for (int i = first; i < last; i++) {
      double total = 0;
      for (int from = 0; from < w.k; from += group) {
        const int8_t* codes = x.codes + size_t(from / kColumns) * x.m * kColumns + size_t(i) * kColumns;
        int sum = 0;
        for (int k = from; k < from + group && k < w.k; k++) sum += code_of(w, n, k) * codes[place(k % kColumns)];
        total += double(sum) * x.scales[i * x.groups() + from / x.group] * scale_of(w, n, from / block);
      }
      out.y[out.rows[i] * out.stride + column + n - begin] = float(total) + (w.bias ? w.bias[n] : 0);
    }
}

size_t prompt_scratch(int) { return 0; }

void rms_norm(const float* x, const float* weight, float eps, int k, float* y) {
  double squares = 0;
  for (int i = 0; i < k; i++) squares += double(x[i]) * x[i];
  const float factor = float(1 / std::sqrt(squares / k + eps));
  for (int i = 0; i < k; i++) y[i] = x[i] * factor * weight[i];
}

void add(const float* a, const float* b, int k, float* y) {
  for (int i = 0; i < k; i++) y[i] = a[i] + b[i];
}

void silu_mul(const float* gate, const float* up, int k, float* y) {
  for (int i = 0; i < k; i++) y[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
}

void rope(float* x, const float* cos, const float* sin, int half) {
  for (int i = 0; i < half; i++) {
    const float low = x[i], high = x[i + half];
    x[i] = low * cos[i] - high * sin[i];
    x[i + half] = high * cos[i] + low * sin[i];
  }
}

void cache_codes(const float* x, float scale, int k, int8_t* codes) {
  for (int i = 0; i < k; i++) {
    const float c = std::nearbyintf(x[i] / scale);
    codes[i] = int8_t(c >= 127 ? 127 : c > -128 ? c : -128);
  }
}

// One block of the online softmax of a row: scores (base 2 logarithms) become int16 probabilities; the row's maximum and
// sum move on. Gives the factor that turns sums over the codes into sums on the row's new scale.
float softmax_block(float* scores, int n, int16_t* p, float& m, float& l, float* sum, int width) {
  float top = scores[0];
  for (int j = 1; j < n; j++) top = scores[j] > top || std::isnan(scores[j]) ? scores[j] : top;
  int total = 0;
  for (int j = 0; j < n; j++) total += p[j] = int16_t(rounded(std::exp2(scores[j] - top) * 32767, 32767));
  for (int j = n; j < kBlock; j++) p[j] = 0;
  const float next = top > m || std::isnan(top) ? top : m;
  const float old = std::exp2(m - next), unit = std::exp2(top - next) / 32767;
  for (int d = 0; d < width; d++) sum[d] *= old;
  l = l * old + float(total) * unit;
  m = next;
  return unit;
}

void attend(const Attend& a) {
  for (int r = 0; r < a.rows; r++) {
    const int16_t* q = a.q + size_t(r) * a.head_dim;
    float* sum = a.sum + size_t(r) * a.padded;
    a.m[r] = -INFINITY, a.l[r] = 0;
    std::memset(sum, 0, sizeof(float) * a.padded);
    const int end = a.limit[r] < a.end ? a.limit[r] : a.end;
    for (int from = a.begin; from < end; from += kBlock) {
      const int n = end - from < kBlock ? end - from : kBlock;
      float scores[kBlock];
      for (int j = 0; j < n; j++) {
        const int8_t* tile = a.keys + size_t((from + j) / kTile) * kTile * a.head_dim + (from + j) % kTile * 2;
        int dot = 0;
        for (int d = 0; d < a.head_dim; d++) dot += q[d] * tile[d / 2 * kTile * 2 + d % 2];
        scores[j] = float(dot) * a.q_scale[r];
      }
      const float unit = softmax_block(scores, n, a.p, a.m[r], a.l[r], sum, a.padded);
      for (int d = 0; d < a.padded; d++) {
        int dot = 0;
        for (int j = 0; j < n; j++) dot += a.p[j] * a.values[size_t((from + j) / 2) * a.padded * 2 + d * 2 + j % 2];
        sum[d] += float(dot) * unit;
      }
    }
  }
}

#include "attend_float.h"

}  // namespace

constexpr Kernels plain_kernels = {"plain", quantize, fine,     decode, coarse,   prompt, prompt_scratch, 16, 1,
                               rms_norm, add,     silu_mul, rope,   cache_codes, attend, attend_float};

}  // namespace headrace
