// Linears of many tokens, for any vector V: a panel of channels by kColumns columns is unpacked once into scratch memory,
// four columns of a channel to a lane, and every token runs over it with int8 activations. Sums are int32 within a group of
// columns that shares a scale, float from group to group. A variant without products of four bytes multiplies pairs to int16, and adds as
// many of them as fit. Where scales of blocks are factors, codes are multiplied by them as they are unpacked and the panel is one of bytes
// with one scale a row, unless bytes take longer by more than blocks do: then factors of 5 and 6 bits multiply sums of 16 columns.
#pragma once
#include "rows.h"

namespace headrace {
namespace {

constexpr int group_of(int part) { return part < 32 ? 32 : part; }

// Codes of kMostGroup columns, in every eight the even ones first, and their sums; one or two groups have a scale each. Where products are
// added in pairs, a sum of 16 codes is two of int16: of the first and of the second two of every four.
template <class V, int Groups>
inline void coarse_groups(const float* x, int8_t* codes, float* scales, int32_t* sums16) {
  constexpr int vectors = kMostGroup / V::lanes, loads = kMostGroup / V::bytes;
  const auto magnitude = V::set32(0x7fffffff);
  typename V::F values[vectors], inverse[Groups];
  HEADRACE_UNROLL for (int g = 0; g < Groups; g++) {
    auto tops = V::zero();
    HEADRACE_UNROLL for (int i = g * vectors / Groups; i < (g + 1) * vectors / Groups; i++) {
      values[i] = V::loadf(x + i * V::lanes);
      tops = V::max_unsigned(tops, V::and_bits(V::bits(values[i]), magnitude));
    }
    const uint32_t bits = V::top_unsigned(tops);
    float top;
    __builtin_memcpy(&top, &bits, 4);
    inverse[g] = V::setf(top > 0 ? 127 / top : 0);
    scales[g] = top / 127;
  }
  alignas(64) int32_t fours[kMostGroup / 4];  // sums of four codes
  HEADRACE_UNROLL for (int j = 0; j < loads; j++) {
    typename V::I four[4];
    HEADRACE_UNROLL for (int i = 0; i < 4; i++)
      four[i] = V::to_int(V::mul(values[4 * j + i], inverse[(4 * j + i) * Groups / vectors]));
    const auto ordered = V::evens_first(V::pack8(four));
    V::store(codes + j * V::bytes, ordered);
    if constexpr (V::pairs) {
      const auto add = [](typename V::I a, typename V::I b) { return V::add16(a, b); };
      V::store(fours + j * V::lanes, V::template neighbours<4>(V::pair_products(V::set8(1), ordered), add));
    } else {
      V::store(fours + j * V::lanes, V::dot8(V::zero(), V::set8(1), ordered));
    }
  }
  HEADRACE_UNROLL for (int s = 0; s < 4; s++)
    sums16[s] = V::pairs ? fours[4 * s] : fours[4 * s] + fours[4 * s + 1] + fours[4 * s + 2] + fours[4 * s + 3];
}

// The sum of N * 16 codes.
template <class V, int N>
inline int whole_sum(const int32_t* sums16) {
  int total = 0;
  HEADRACE_UNROLL for (int s = 0; s < N; s++) total += V::pairs ? int16_t(sums16[s]) + (sums16[s] >> 16) : sums16[s];
  return total;
}
// Its two of int16 where products are added in pairs, times `factor`, for every channel.
template <class V, int N>
inline typename V::I pair_sums(const int32_t* sums16, int factor) {
  auto total = V::broadcast32(sums16);
  HEADRACE_UNROLL for (int s = 1; s < N; s++) total = V::add16(total, V::broadcast32(sums16 + s));
  return V::mul16(total, V::set16(factor));
}

template <class V>
void coarse(const float* x, int row, bool, bool, const Coarse& out) {
  for (int from = 0, padded = int(round_up(out.k, kColumns)); from < padded; from += kMostGroup) {
    int8_t* codes = out.codes + size_t(from / kColumns) * out.m * kColumns + size_t(row) * kColumns + from % kColumns;
    const float* values = x + from;
    float part[kMostGroup] = {};
    if (from + kMostGroup > out.k) {  // what the row does not have is zero
      for (int i = 0; from + i < out.k; i++) part[i] = x[from + i];
      values = part;
    }
    const auto run = out.group == kMostGroup ? coarse_groups<V, 1> : coarse_groups<V, 2>;
    run(values, codes, out.scales + row * out.groups() + from / out.group, out.sums16 + (size_t(row) * padded + from) / 16);
  }
}

// What folds the factors of up to V::lanes channels from n on into codes of `columns` columns from `from` on, eight at a time.
template <class V>
struct Folds {
  const int block, from, first;
  const RowFactors<V> factors;

  Folds(const Weight& w, int n, int end, int from, int columns)
      : block(w.block), from(from), first(from / w.block),
        factors(w.factors + n * w.factor_bytes() + first / 2, w.factor_bytes(), end - n < V::lanes ? end - n : V::lanes,
                ((from + columns < w.k ? from + columns : w.k) - 1) / w.block / 2 - first / 2 + 1) {}
  Fold<V> at(int column) const {
    const auto whole = V::to_int(factors.of((from + column) / block - first + first % 2));
    return Fold<V>(V::mul32(whole, V::set32(0x10001)));
  }
};

// Codes of up to panels * lanes channels from n on, columns from `from` on: scratch[4 columns][panel][lane][4]; `Folded`: times their
// factors, as bytes.
template <class V, int Bits, bool Folded, class Rows>
HEADRACE_APART void unpack_rows(const Weight& w, const Rows& rows, int n, int end, int from, int columns, uint8_t* scratch) {
  using I = typename V::I;
  constexpr int width = Bits == 4 ? 2 * V::bytes : V::bytes;  // columns of a load
  constexpr size_t step = V::panels * V::bytes;
  const int last = w.k - from < columns ? w.k - from : columns;
  for (int p = 0; p < V::panels; p++)
    for (int c = 0; c < last; c += width) {
      I codes[V::lanes];
      for (int r = 0; r < V::lanes; r++) {
        const int row = p * V::lanes + r, at = (from + c) / width;
        codes[r] = n + row >= end ? V::zero() : last - c >= width ? rows.template load<true>(row, at) : rows.template load<false>(row, at);
        if constexpr (Bits != 4) codes[r] = V::evens_first(codes[r]);
      }
      V::transpose(codes);
      uint8_t* to = scratch + size_t(c / 4) * step + p * V::bytes;
      if constexpr (Bits == 4 && Folded) {
        if (n + p * V::lanes >= end) continue;
        const Folds<V> folds(w, n + p * V::lanes, end, from + c, width);
        const int each = w.block / 8;
        for (int first = 0; first < V::lanes && c + 8 * first < last; first += each) {
          const Fold<V> fold = folds.at(8 * first);
          for (int i = first; i < V::lanes && i < first + each; i++) {
            V::store(to + size_t(2 * i) * step, fold(V::low_nibbles(codes[i])));
            V::store(to + size_t(2 * i + 1) * step, fold(V::high_nibbles(codes[i])));
          }
        }
        continue;
      }
      for (int i = 0; i < V::lanes; i++) {
        if constexpr (Bits == 4) {  // four bytes are the even and the odd ones of eight columns
          V::store(to + size_t(2 * i) * step, V::low_nibbles(codes[i]));
          V::store(to + size_t(2 * i + 1) * step, V::high_nibbles(codes[i]));
        } else {
          V::store(to + size_t(i) * step, codes[i]);
        }
      }
    }
}

// The same of split rows; a copy of them stays in registers.
template <class V, class Rows>
HEADRACE_APART void unpack_split(const Weight& w, const Rows& given, int n, int end, int from, int columns, uint8_t* scratch) {
  const Rows rows = given;
  constexpr int width = 2 * V::bytes;
  constexpr size_t step = V::panels * V::bytes;
  const int last = w.k - from < columns ? w.k - from : columns;
  for (int p = 0; p < V::panels; p++)
    for (int c = 0; c < last; c += width) {
      typename V::I even[V::lanes], odd[V::lanes];
      for (int r = 0; r < V::lanes; r++) {
        const int row = p * V::lanes + r, at = (from + c) / width;
        if (n + row >= end) even[r] = odd[r] = V::zero();
        else rows.load(row, at, even[r], odd[r]);
      }
      V::transpose(even), V::transpose(odd);
      uint8_t* to = scratch + size_t(c / 4) * step + p * V::bytes;
      for (int i = 0; i < V::lanes; i++)
        V::store(to + size_t(2 * i) * step, even[i]), V::store(to + size_t(2 * i + 1) * step, odd[i]);
    }
}

template <class V, int Bits, bool Folded>
inline void unpack(const Weight& w, int n, int end, int from, int columns, uint8_t* scratch) {
  with_block<Bits, Folded>(w, [&](auto block) {
    const auto rows = rows_of<V, Bits, decltype(block)::value>(w, n, 1, kColumns);  // ahead to the second level: rows share sets
    if constexpr (is_split(Bits)) unpack_split<V>(w, rows, n, end, from, columns, scratch);
    else unpack_rows<V, Bits, Folded>(w, rows, n, end, from, columns, scratch);
  });
}

// Products of Part columns, added to the sums of T tokens by a panel.
template <class V, int Bits, int Part, int T>
inline void add_products(const uint8_t* scratch, const int8_t* codes, typename V::I (&sum)[T][V::panels]) {
  using I = typename V::I;
  constexpr int P = V::panels;
  for (int s = 0; s < Part / 4; s++) {
    I columns[P];
    HEADRACE_UNROLL for (int p = 0; p < P; p++) columns[p] = V::kept(V::load(scratch + (s * P + p) * V::bytes));
    HEADRACE_UNROLL for (int t = 0; t < T; t++) {
      const I one = V::broadcast32(codes + t * kColumns + 4 * s);
      HEADRACE_UNROLL for (int p = 0; p < P; p++) sum[t][p] = Bits == 4 ? V::dot8(sum[t][p], columns[p], one) : V::dot_bytes(sum[t][p], columns[p], one);
    }
  }
}

// The same of Steps vectors of columns, in pairs to int16. gcc may not know what sums are: it would multiply all columns before
// it adds, with twice as many products as there are registers.
template <class V, int Steps, int T, class Columns>
inline void multiply_pairs(const uint8_t* scratch, const int8_t* codes, const Columns& columns_of, typename V::I (&pairs)[T][V::panels]) {
  using I = typename V::I;
  constexpr int P = V::panels;
  HEADRACE_UNROLL for (int s = 0; s < Steps; s++) {
    I columns[P];
    HEADRACE_UNROLL for (int p = 0; p < P; p++) columns[p] = columns_of(V::load(scratch + (s * P + p) * V::bytes));
    HEADRACE_UNROLL for (int t = 0; t < T; t++) {
      const I one = V::broadcast32(codes + t * kColumns + 4 * s);
      HEADRACE_UNROLL for (int p = 0; p < P; p++) pairs[t][p] = V::kept_there(V::add16(pairs[t][p], V::pair_products(columns[p], one)));
    }
  }
}

// Products of Part columns of codes of less than 8 bits, in pairs: as many as fit an int16 once the zero point is taken off, whatever
// passes its end before. Factors of 5 and 6 bits, if any, are block_factors'; sums16: of the tokens' codes, `stride` from token to token.
template <class V, int Bits, int Part, int T>
inline void add_in_pairs(const uint8_t* scratch, const int8_t* codes, const int32_t* sums16, size_t stride, const float* factors,
                         typename V::I (&sum)[T][V::panels]) {
  constexpr int P = V::panels, columns = is_split(Bits) ? 16 : Part;
  static_assert(columns / 2 * (1 << (Bits - 1)) * 127 <= 0x7fff);
  for (int c = 0; c < Part; c += columns) {
    typename V::I pairs[T][P];
    HEADRACE_UNROLL for (int t = 0; t < T; t++) {
      const auto start = pair_sums<V, columns / 16>(sums16 + t * stride + c / 16, -(1 << (Bits - 1)));
      HEADRACE_UNROLL for (int p = 0; p < P; p++) pairs[t][p] = start;
    }
    multiply_pairs<V, columns / 4, T>(scratch + c / 4 * P * V::bytes, codes + c, [](auto whole) { return whole; }, pairs);
    HEADRACE_UNROLL for (int t = 0; t < T; t++) HEADRACE_UNROLL for (int p = 0; p < P; p++)
        sum[t][p] = is_split(Bits) ? V::dot16(sum[t][p], pairs[t][p], V::load(factors + (c / 16 * P + p) * V::lanes))
                                   : V::add_pairs(sum[t][p], pairs[t][p], 1);
  }
}

// The same of bytes, as twice four bits.
template <class V, int Part, int T>
inline void add_halves_in_pairs(const uint8_t* scratch, const int8_t* codes, typename V::I (&sum)[T][V::panels]) {
  constexpr int P = V::panels, steps = Part / 4 < 8 ? Part / 4 : 8;
  static_assert(steps * 2 * 15 * 127 <= 0x7fff);
  const auto add = [&](int first, const auto& half, int factor) {
    typename V::I pairs[T][P];
    HEADRACE_UNROLL for (int t = 0; t < T; t++) HEADRACE_UNROLL for (int p = 0; p < P; p++) pairs[t][p] = V::zero();
    multiply_pairs<V, steps, T>(scratch + first * P * V::bytes, codes + 4 * first, half, pairs);
    HEADRACE_UNROLL for (int t = 0; t < T; t++) HEADRACE_UNROLL for (int p = 0; p < P; p++)
        sum[t][p] = V::add_pairs(sum[t][p], pairs[t][p], factor);
  };
  for (int first = 0; first < Part / 4; first += steps) {
    add(first, [](auto whole) { return V::low_nibbles(whole); }, 1);
    add(first, [](auto whole) { return V::high_nibbles(whole); }, 16);
  }
}

// T tokens by a panel, one piece of kColumns. Part: columns of an int32 sum; scales: [part][channel], with blocks; sums:
// [token][channel]. With codes of 5 or 6 bits scales are factors for add_in_pairs.
template <class V, int Bits, bool Blocks, int Part, int T>
HEADRACE_APART void multiply(const Coarse& x, int from, int parts, int token, const uint8_t* scratch, const float* scales,
                             float* sums) {
  using I = typename V::I;
  using F = typename V::F;
  constexpr int P = V::panels, zero_point = Bits == 4 ? 8 : V::signed_bytes && !V::pairs ? 0 : 128, group = group_of(Part);
  const size_t padded = round_up(x.k, kColumns);
  const int8_t* codes = x.codes + size_t(from / kColumns) * x.m * kColumns + size_t(token) * kColumns;
  const int32_t* sums16 = x.sums16 + (token * padded + from) / 16;
  const float* ones = x.scales + (token * padded + from) / group;
  F f[T][P];
  HEADRACE_UNROLL for (int t = 0; t < T; t++) HEADRACE_UNROLL for (int p = 0; p < P; p++)
      f[t][p] = from ? V::loadf(sums + (t * P + p) * V::lanes) : V::zerof();
  for (int part = 0; part < parts; part++) {
    I sum[T][P];
    constexpr bool in_pairs = V::pairs && Bits < 8;  // which take the zero point off by themselves
    HEADRACE_UNROLL for (int t = 0; t < T; t++) {
      const auto start = in_pairs ? V::zero() : V::set32(-zero_point * whole_sum<V, Part / 16>(sums16 + t * (padded / 16)));
      HEADRACE_UNROLL for (int p = 0; p < P; p++) sum[t][p] = start;
    }
    if constexpr (in_pairs) add_in_pairs<V, Bits, Part, T>(scratch, codes, sums16, padded / 16, scales, sum);
    else if constexpr (V::pairs) add_halves_in_pairs<V, Part, T>(scratch, codes, sum);
    else add_products<V, Bits, Part, T>(scratch, codes, sum);
    scratch += Part / 4 * P * V::bytes, codes += Part;
    HEADRACE_UNROLL for (int p = 0; p < P; p++) {
      F scale;
      if constexpr (Blocks) scale = V::loadf(scales + p * V::lanes);
      HEADRACE_UNROLL for (int t = 0; t < T; t++) {
        const F one = V::setf(ones[t * (padded / group)]), total = V::to_float(sum[t][p]);
        f[t][p] = V::fma(Blocks ? V::mul(total, scale) : total, one, f[t][p]);
      }
    }
    scales += P * V::lanes * (is_split(Bits) ? Part / 16 : 1), sums16 += Part / 16;
    ones += Part == group || part % 2 == 1;
  }
  HEADRACE_UNROLL for (int t = 0; t < T; t++) HEADRACE_UNROLL for (int p = 0; p < P; p++)
      V::storef(sums + (t * P + p) * V::lanes, f[t][p]);
}

// Scales of parts of channels n … end - 1 from column `from` on, [part][channel]; of factors, those alone. Other channels have any.
template <class V, int Part>
HEADRACE_APART void part_scales(const Weight& w, int n, int end, int from, int parts, float* scales) {
  constexpr int width = V::panels * V::lanes;
  const int first = from / w.block, count = end - n < width ? end - n : width;
  if (!w.factors) {
    const size_t stride = w.blocks();
    for (int part = 0; part < parts; part++) {
      const uint16_t* own = w.scale + n * stride + (from + part * Part) / w.block;
      for (int c = 0; c < count; c++) scales[part * width + c] = V::half(own[c * stride]);
    }
    return;
  }
  const int skipped = first % 2, last = skipped + (parts - 1) * Part / w.block;
  for (int c = 0; c < count; c += V::lanes) {
    const uint8_t* own = w.factors + (n + c) * w.factor_bytes() + first / 2;
    const RowFactors<V> factors(own, w.factor_bytes(), count - c < V::lanes ? count - c : V::lanes, last / 2 + 1);
    for (int part = 0; part < parts; part++)
      V::storef(scales + part * width + c, factors.of(skipped + part * Part / w.block));
  }
}

// Factors of such channels for every 16 columns, twice, for both of two numbers of 16 bits: [16 columns][channel]. Columns behind a row
// have any.
template <class V>
HEADRACE_APART void block_factors(const Weight& w, int n, int end, int from, int columns, float* factors) {
  constexpr int width = V::panels * V::lanes;
  const int first = from / w.block, count = end - n < width ? end - n : width;
  const int last = ((from + columns < w.k ? from + columns : w.k) - 1) / w.block;
  for (int c = 0; c < count; c += V::lanes) {
    const uint8_t* own = w.factors + (n + c) * w.factor_bytes() + first / 2;
    const RowFactors<V> of(own, w.factor_bytes(), count - c < V::lanes ? count - c : V::lanes, last / 2 - first / 2 + 1);
    for (int b = 0; b < columns / 16; b++)
      V::store(factors + b * width + c, V::mul32(V::to_int(of.of(first % 2 + b * 16 / w.block)), V::set32(0x10001)));
  }
}

template <class V, int Stored, int Bits, bool Blocks, int Part>
HEADRACE_APART void prompt_panel(const Weight& w, const Coarse& x, int n, int end, int first, int last, const Out& out,
                                 int column, uint8_t* scratch) {
  constexpr int width = V::panels * V::lanes;
  float* scales = reinterpret_cast<float*>(scratch + size_t(kColumns / 4) * V::panels * V::bytes);
  float* sums = scales + (kColumns / 16) * width;
  for (int from = 0; from < w.k; from += kColumns) {
    const int columns = w.k - from < kColumns ? w.k - from : kColumns, parts = (columns + Part - 1) / Part;
    unpack<V, Stored, (Stored < Bits && !Blocks) || is_split(Bits)>(w, n, end, from, parts * Part, scratch);
    if constexpr (is_split(Bits)) block_factors<V>(w, n, end, from, parts * Part, scales);
    else if constexpr (Blocks) part_scales<V, Part>(w, n, end, from, parts, scales);
    const auto run = [&](auto number, int t) {
      multiply<V, Bits, Blocks, Part, decltype(number)::value>(x, from, parts, t, scratch, scales, sums + (t - first) * width);
    };
    int t = first;
    for (; t + V::tokens <= last; t += V::tokens) run(Number<V::tokens>(), t);
    if (V::tokens > 2 && last - t == 2) run(Number<2>(), t), t += 2;
    for (; t < last; t++) run(Number<1>(), t);
  }
  float factor[width], bias[width];
  for (int c = 0; c < width; c++) {
    factor[c] = Blocks && !w.factors ? 1 : n + c < end ? V::half(w.scale[n + c]) : 0;
    bias[c] = w.bias && n + c < end ? w.bias[n + c] : 0;
  }
  const int count = end - n < width ? end - n : width;
  for (int t = first; t < last; t++) {
    float *y = out.y + out.rows[t] * out.stride + column, *sum = sums + (t - first) * width;
    int c = 0;
    for (; c + V::lanes <= count; c += V::lanes)
      V::storef(y + c, V::fma(V::loadf(sum + c), V::loadf(factor + c), V::loadf(bias + c)));
    for (; c < count; c++) y[c] = sum[c] * factor[c] + bias[c];
  }
}

template <class V, int Stored>
inline auto panel_for(const Weight& w, const Coarse& x) {
  constexpr bool split = is_split(Stored);
  constexpr int Bits = split ? 8 : Stored;
  if constexpr (split && factors_apart<V>)
    if (w.factors) return x.group == 32 ? prompt_panel<V, Stored, Stored, false, 32> : prompt_panel<V, Stored, Stored, false, 64>;
  if constexpr ((split && !factors_apart<V>) || (Stored == 4 && !V::pairs))
    if (w.factors) return x.group == 32 ? prompt_panel<V, Stored, 8, false, 32> : prompt_panel<V, Stored, 8, false, 64>;
  if constexpr (!split)
    if (!w.block) return x.group == 32 ? prompt_panel<V, Stored, Bits, false, 32> : prompt_panel<V, Stored, Bits, false, 64>;
  if (w.block == 16) return prompt_panel<V, Stored, Bits, true, 16>;
  return x.group == 32 ? prompt_panel<V, Stored, Bits, true, 32> : prompt_panel<V, Stored, Bits, true, 64>;
}

template <class V>
void prompt(const Weight& w, const Coarse& x, int begin, int end, int first, int last, const Out& out, int column,
            void* scratch) {
  const auto run = w.bits == 4   ? panel_for<V, 4>(w, x)
                   : w.bits == 5 ? panel_for<V, 5>(w, x)
                   : w.bits == 6 ? panel_for<V, 6>(w, x)
                                 : panel_for<V, 8>(w, x);
  for (int n = begin; n < end; n += V::panels * V::lanes)
    run(w, x, n, end, first, last, out, column + n - begin, static_cast<uint8_t*>(scratch));
}

template <class V>
size_t prompt_scratch(int m) {
  return size_t(kColumns / 4) * V::panels * V::bytes + (size_t(kColumns / 16) + m) * V::panels * V::lanes * sizeof(float);
}

}  // namespace
}  // namespace headrace
