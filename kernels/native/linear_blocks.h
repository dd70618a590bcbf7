// Linears of fine activations for weights with a scale a block, for any vector V. A lane is a channel: codes of V::lanes rows are
// put into scratch memory, four bytes of a row to a lane, and multiplied with four bytes of each token, high and low ones. So
// nothing is added up over lanes, and the scales of a block are a vector.
#pragma once
#include "linear_prompt.h"
#include "linear_rows.h"

namespace headrace {
namespace {

constexpr int kStretch = 640;              // columns that lie in scratch memory at a time, about
constexpr int kLeastBlock = 16, kMostBlock = 256;
constexpr int kMostStretch = kStretch / kMostBlock * kMostBlock + kMostBlock;

// High and low bytes in fours, and sums of the codes before every 16th column, which may pass int32 and come around.
template <class V>
inline void arrange_blocks(int k, Fine& x) {
  constexpr int step = V::bytes / 2, together = step < kLeastBlock ? kLeastBlock : step;  // columns of a vector
  uint32_t sum = 0;
  int number = 0;
  for (int from = 0; from < k; from += together) {
    int32_t sums[together / 2];  // high, low, high, low, … of four columns
    for (int c = 0; c < together; c += step) {
      int8_t* fours = x.fours + 2 * (from + c);
      V::fours(x.natural + from + c, fours);
      V::store(sums + c / 2, V::template dot8<4>(V::zero(), V::set8(1), V::load(fours)));
    }
    for (const int32_t* s = sums; s < sums + together / 2; s += kLeastBlock / 2) {
      x.sums[number++] = sum;
      sum += uint32_t(256 * (s[0] + s[2] + s[4] + s[6]) + s[1] + s[3] + s[5] + s[7]);
    }
  }
  x.sums[number] = sum;
}

// T tokens by so many blocks, which lie in `codes`. starts: what the zero point takes, [token][block]; scales: [block][channel];
// totals: [token][channel], begun where `from` is 0. What comes `next` is asked of memory meanwhile, as many bytes as these codes
// took: asked all at once it would keep loads waiting.
template <class V, int Bits, int T>
HEADRACE_APART void multiply_blocks(const Fine* x, int from, int block, int blocks, const uint8_t* codes, const float* scales,
                                    const int32_t* starts, const uint8_t* next, float* totals) {
  using I = typename V::I;
  constexpr int most = kMostStretch / kLeastBlock;
  const int8_t* fours[T];
  typename V::F total[T];
  HEADRACE_UNROLL for (int t = 0; t < T; t++) {
    fours[t] = x[t].fours + 2 * from;
    total[t] = from ? V::loadf(totals + t * V::lanes) : V::zerof();
  }
  for (int b = 0, c = 0; b < blocks; b++) {
    I high[T], low[T];
    HEADRACE_UNROLL for (int t = 0; t < T; t++) high[t] = V::zero(), low[t] = V::broadcast32(starts + t * most + b);
    for (const int end = c + block; c < end; c += 8, codes += Bits / 4 * V::bytes) {
      HEADRACE_UNROLL for (int i = 0; i < V::lanes * Bits; i += 64) __builtin_prefetch(next + i, 0, 2);
      next += V::lanes * Bits;
      const I packed = V::kept(V::load(codes));
      HEADRACE_UNROLL for (int v = 0; v < 2; v++) {
        I four = Bits == 8 && v ? V::kept(V::load(codes + V::bytes)) : packed;
        if constexpr (Bits == 4) four = V::kept(v ? V::high_nibbles(packed) : V::low_nibbles(packed));
        HEADRACE_UNROLL for (int t = 0; t < T; t++) {
          const int8_t* bytes = fours[t] + 2 * c + 8 * v;
          high[t] = V::template dot8_of_four<Bits>(high[t], four, bytes);
          low[t] = V::template dot8_of_four<Bits>(low[t], four, bytes + 4);
        }
      }
    }
    const auto scale = V::loadf(scales + b * V::lanes);
    HEADRACE_UNROLL for (int t = 0; t < T; t++)
        total[t] = V::fma(V::to_float(V::add32(V::times256(high[t]), low[t])), scale, total[t]);
  }
  HEADRACE_UNROLL for (int t = 0; t < T; t++) V::storef(totals + t * V::lanes, total[t]);
}

// Scales of so many blocks of a panel's channels: [block][channel].
template <class V>
inline void scales_of_panel(const Weight& w, int n, int end, int first, int blocks, float* scales) {
  for (int b = 0; b < blocks; b += V::lanes) {
    const uint16_t* from = w.scale + size_t(n) * w.blocks() + first + b;
    const auto load = [&](int r) {
      return n + r < end ? V::bits(V::halves(from + size_t(r) * w.blocks(), blocks - b)) : V::zero();
    };
    V::transpose(load, [&](int i, typename V::I v) { V::store(scales + (b + i) * V::lanes, v); });
  }
}

template <class V, int Bits>
void decode_blocks(const Weight& w, const Fine* x, int m, int begin, int end, const Out& out, int column) {
  constexpr int most = kMostStretch / kLeastBlock;  // blocks of a stretch
  alignas(64) uint8_t codes[kMostStretch * Bits / 32 * V::bytes];
  alignas(64) float scales[round_up(most, V::lanes) * V::lanes], totals[kTokensKept * V::lanes];
  constexpr int lasting = 4;  // stretches whose starts are kept
  int32_t starts[lasting * kTokensKept * most];
  const int stretches = (w.k + kStretch - 1) / kStretch;
  const int columns = int(round_up((w.k + stretches - 1) / stretches, w.block > 128 ? w.block : 128));
  const int each = w.block / kLeastBlock;
  const size_t ahead = round_up(2 * kAhead, V::lanes * w.row_bytes());  // of channels that come later
  for (int n = begin; n < end; n += V::lanes) {
    const uint8_t* next = w.packed + size_t(n) * w.row_bytes() + ahead;
    for (int from = 0, stretch = 0; from < w.k; from += columns, stretch++) {
      const int blocks = (w.k - from < columns ? w.k - from : columns) / w.block;
      unpack<V, Bits, 1, false>(w, n, end, from, columns, 0, codes);
      scales_of_panel<V>(w, n, end, from / w.block, blocks, scales);
      int32_t* own = starts + (stretches <= lasting ? stretch : 0) * kTokensKept * most;
      for (int t = 0; t < m && (n == begin || stretches > lasting); t++) {
        const uint32_t* sums = x[t].sums + from / kLeastBlock;
        for (int b = 0; b < blocks; b++)
          own[t * most + b] = int32_t((Bits == 4 ? 8 : 128) * (sums[b * each] - sums[(b + 1) * each]));
      }
      int t = 0;
      const auto add = [&](auto number) {
        constexpr int T = decltype(number)::value;
        if constexpr (T <= V::few)
          for (; m - t >= T; t += T)
            multiply_blocks<V, Bits, T>(x + t, from, w.block, blocks, codes, scales, own + t * most, next,
                                        totals + t * V::lanes);
      };
      add(Number<8>()), add(Number<7>()), add(Number<6>()), add(Number<5>());
      add(Number<4>()), add(Number<3>()), add(Number<2>()), add(Number<1>());
      next += size_t(blocks) * w.block / 8 * V::lanes * Bits;
    }
    const int count = end - n < V::lanes ? end - n : V::lanes;
    const auto bias = biases<V>(w, n, count);
    for (int t = 0; t < m; t++)
      write_part<V>(out.y + out.rows[t] * out.stride + column + n - begin,
                    V::fma(V::loadf(totals + t * V::lanes), V::setf(x[t].scale), bias), count);
  }
}

template <class V>
void fine(const float* x, int k, const Layouts& layouts, Fine& out) {
  out.scale = quantize<V>(x, k, out.natural);
  for (int i = k; i < int(round_up(k, kPad)); i++) out.natural[i] = 0;
  if (layouts.rows4) out.start4 = arrange_row<V, 4>(out.natural, k, out.high4, out.low4, out.starts4);
  if (layouts.rows8) out.start8 = arrange_row<V, 8>(out.natural, k, out.high8, out.low8, out.starts8);
  if (layouts.blocks) arrange_blocks<V>(k, out);
}

template <class V>
void decode(const Weight& w, const Fine* x, int m, int begin, int end, const Out& out, int column) {
  const auto run = w.block ? (w.bits == 4 ? decode_blocks<V, 4> : decode_blocks<V, 8>)
                           : (w.bits == 4 ? decode_rows<V, 4> : decode_rows<V, 8>);
  for (int t = 0; t < m; t += kTokensKept)
    run(w, x + t, m - t < kTokensKept ? m - t : kTokensKept, begin, end, Out{out.y, out.stride, out.rows + t}, column);
}

}  // namespace
}  // namespace headrace
