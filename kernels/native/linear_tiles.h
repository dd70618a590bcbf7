// Linears of many tokens with AMX tiles (or their emulation), for weights with one scale a row, into which factors of blocks are
// folded. Weights are tiles of 16 channels by 64 columns as their rows unpack, activations tiles of 64 columns by 16 tokens.
//
// A tile reaches vectors only through memory, so sums must not be scaled group by group: activations are int16
// with one scale a token, as a high and a low byte that are multiplied apart. Twice the products, nothing else in between,
// and prompts are more exact than decoding. Other weights with blocks go the way of linear_prompt.h.
#pragma once
#include "rows.h"
#include "tiles.h"

namespace headrace {
namespace {

constexpr int kTokens = 16;         // of a tile
constexpr int kDepth = 1024;        // columns between two visits of the sums
constexpr size_t kTileBytes = 1024;
constexpr int kMostColumns = 65536;  // whose products of bytes fit an int32 sum

// Where tile `column` (64 columns) of the tokens' group lies: the high bytes' tile, then the low bytes'.
inline size_t tile_at(int k, int token, int column) {
  return (size_t(token / kTokens) * (round_up(k, kPad) / 64) + column) * 2 * kTileBytes;
}

// A token's bytes into the tiles [4 columns][token][4]; its scale, and the sum of its codes.
template <class V>
void tile_row(const float* x, int row, const Coarse& out) {
  constexpr int at_once = 2 * V::bytes;
  int16_t natural[at_once];
  int8_t high[at_once], low[at_once];
  const float top = largest<V>(x, out.k), inverse = top > 0 ? kTop / top : 0;
  int32_t sum = 0;
  for (int from = 0; from < out.k; from += at_once) {
    const int n = out.k - from < at_once ? out.k - from : at_once;
    int i = 0;
    for (; i + V::lanes <= n; i += V::lanes)
      V::store16(natural + i, V::to_int(V::mul(V::loadf(x + from + i), V::setf(inverse))));
    for (; i < n; i++) natural[i] = int16_t(rounded(x[from + i] * inverse, kTop));
    for (; i < at_once; i++) natural[i] = 0;
    for (int j = 0; j < at_once; j++) sum += natural[j];
    V::split(natural, high, low);
    for (int part = 0; part < 2; part++) {
      int8_t* tile = out.tiles + tile_at(out.k, row, from / 64 + part) + row % kTokens * 4;
      for (int j = 0; j < 16; j++) {
        __builtin_memcpy(tile + 64 * j, high + 64 * part + 4 * j, 4);
        __builtin_memcpy(tile + kTileBytes + 64 * j, low + 64 * part + 4 * j, 4);
      }
    }
  }
  out.tile_scales[row] = top / kTop;
  out.tile_sums[row] = sum;
}

template <class V>
void coarse_or_tiles(const float* x, int row, bool rows, bool blocks, const Coarse& out) {
  const bool tiles = out.k <= kMostColumns;
  if (rows && tiles) tile_row<V>(x, row, out);
  if (blocks || !tiles) avx512vnni_kernels.coarse(x, row, rows, blocks, out);
}

// What folds a row's factors into codes of 128 columns from `from` on, of which both nibbles of a load's bytes have the same.
template <class V>
inline Fold<V> fold_of_row(const Weight& w, int row, int from) {
  alignas(64) uint16_t factors[V::bytes / 2];
  for (int c = 0; c < 128; c += 16) {  // sixteen columns are eight bytes
    const uint64_t factor = from + c < w.k ? uint64_t(w.factor(row, (from + c) / w.block)) : 1, four = factor * 0x0001000100010001;
    __builtin_memcpy(factors + c / 4, &four, 8);
  }
  return Fold<V>(V::load(factors));
}

// Codes of 32 channels, columns from … from + kDepth, as tiles [64 columns][2][16 channels][64]; `Folded`: times their factors, as bytes.
template <class V, int Bits, bool Folded, class Rows>
inline void unpack_tiles(const Weight& w, const Rows& rows, int n, int end, int from, int columns, uint8_t* scratch) {
  for (int c = 0; c < columns; c += 128)
    for (int r = 0; r < 32; r++) {
      uint8_t* to = scratch + size_t(c / 64) * 2 * kTileBytes + r / 16 * kTileBytes + r % 16 * 64;
      const int left = w.k - from - c;
      if (n + r >= end) {
        V::store(to, V::zero()), V::store(to + 2 * kTileBytes, V::zero());
        continue;
      }
      if constexpr (is_split(Bits)) {
        auto even = V::zero(), odd = V::zero();
        if (left > 0) rows.load(r, (from + c) / 128, even, odd);
        V::store(to, even), V::store(to + 2 * kTileBytes, odd);
      } else {
        constexpr int width = Bits == 4 ? 2 * V::bytes : V::bytes;  // columns of a load
        const auto load = [&](int i) {
          const int there = left - i * width, step = (from + c) / width + i;
          return there >= width ? rows.template load<true>(r, step) : there > 0 ? rows.template load<false>(r, step) : V::zero();
        };
        if constexpr (Bits == 4) {
          const auto codes = load(0);
          auto even = V::low_nibbles(codes), odd = V::high_nibbles(codes);
          if constexpr (Folded) {
            const auto fold = fold_of_row<V>(w, n + r, from + c);
            even = fold(even), odd = fold(odd);
          }
          V::store(to, even), V::store(to + 2 * kTileBytes, odd);
        } else {
          alignas(64) int8_t apart[128];
          V::store_apart(apart, load(0), load(1));
          V::store(to, V::load(apart)), V::store(to + 2 * kTileBytes, V::load(apart + 64));
        }
      }
    }
}

// 32 channels by all of a range of tokens; sums lie as [token tile][high, low][32 channels][16 tokens].
template <class V, class Tiles, int Stored, int Bits>
inline void tiles_panel(const Weight& w, const Coarse& x, int n, int end, int first, int last, const Out& out, int column,
                        uint8_t* scratch) {
  int32_t* sums = reinterpret_cast<int32_t*>(scratch + size_t(kDepth / 64) * 2 * kTileBytes);
  constexpr size_t half = 32 * kTokens;  // sums of the high bytes, then those of the low ones
  const int from_tile = first / kTokens, to_tile = (last + kTokens - 1) / kTokens;
  for (int from = 0; from < w.k; from += kDepth) {
    const int columns = int(round_up(w.k - from < kDepth ? w.k - from : kDepth, kPad));
    with_block<Stored, (Stored < Bits)>(w, [&](auto block) {
      unpack_tiles<V, Stored, (Stored < Bits)>(w, rows_of<V, Stored, decltype(block)::value>(w, n, 1, kDepth), n, end, from, columns, scratch);
    });
    for (int t = from_tile; t < to_tile; t++) {
      int32_t *high = sums + (t - from_tile) * 2 * half, *low = high + half;
      if (from) {
        Tiles::template load<0>(high, 64), Tiles::template load<1>(high + half / 2, 64);
        Tiles::template load<2>(low, 64), Tiles::template load<3>(low + half / 2, 64);
      } else {
        Tiles::template zero<0>(), Tiles::template zero<1>(), Tiles::template zero<2>(), Tiles::template zero<3>();
      }
      for (int c = 0; c < columns / 64; c++) {
        const int8_t* b = x.tiles + tile_at(w.k, t * kTokens, from / 64 + c);
        Tiles::template load<4>(scratch + size_t(c) * 2 * kTileBytes, 64);
        Tiles::template load<6>(b, 64);
        Tiles::template dot<0, 4, 6>();
        Tiles::template load<7>(b + kTileBytes, 64);
        Tiles::template dot<2, 4, 7>();
        Tiles::template load<5>(scratch + size_t(c) * 2 * kTileBytes + kTileBytes, 64);
        Tiles::template dot<1, 5, 6>();
        Tiles::template dot<3, 5, 7>();
      }
      Tiles::template store<0>(high, 64), Tiles::template store<1>(high + half / 2, 64);
      Tiles::template store<2>(low, 64), Tiles::template store<3>(low + half / 2, 64);
    }
  }
  const int count = end - n < 32 ? end - n : 32;
  float factor[32], bias[32];
  for (int c = 0; c < count; c++) factor[c] = V::half(w.scale[n + c]), bias[c] = w.bias ? w.bias[n + c] : 0;
  for (int t = first; t < last; t++) {
    const int32_t* high = sums + (t / kTokens - from_tile) * 2 * half + t % kTokens;
    float* y = out.y + out.rows[t] * out.stride + column;
    const int64_t zero_point = int64_t(Bits == 4 ? 8 : 128) * x.tile_sums[t];
    for (int c = 0; c < count; c++) {
      const int64_t sum = int64_t(high[c * kTokens]) * 256 + high[half + c * kTokens] - zero_point;
      y[c] = float(sum) * x.tile_scales[t] * factor[c] + bias[c];
    }
  }
}

template <class V, class Tiles>
void prompt_tiles(const Weight& w, const Coarse& x, int begin, int end, int first, int last, const Out& out, int column,
                  void* scratch) {
  if ((w.block && !w.factors) || w.k > kMostColumns) return avx512vnni_kernels.prompt(w, x, begin, end, first, last, out, column, scratch);
  Tiles::begin();
  for (int n = begin; n < end; n += 32) {
    const auto panel = w.bits == 5             ? tiles_panel<V, Tiles, 5, 8>
                       : w.bits == 6           ? tiles_panel<V, Tiles, 6, 8>
                       : w.bits == 8           ? tiles_panel<V, Tiles, 8, 8>
                       : w.factors != nullptr ? tiles_panel<V, Tiles, 4, 8>
                                               : tiles_panel<V, Tiles, 4, 4>;
    panel(w, x, n, end, first, last, out, column + n - begin, static_cast<uint8_t*>(scratch));
  }
  Tiles::end();
}

template <class V>
size_t tiles_scratch(int m) {
  const size_t tiles = size_t(kDepth / 64) * 2 * kTileBytes + round_up(m + kTokens, kTokens) * 64 * sizeof(int32_t);
  const size_t panels = avx512vnni_kernels.prompt_scratch(m);
  return tiles > panels ? tiles : panels;
}

template <class V, class Tiles>
constexpr TileKernels tile_kernels(const char* name) {
  return {name, coarse_or_tiles<V>, prompt_tiles<V, Tiles>, tiles_scratch<V>, kTokens};
}

}  // namespace
}  // namespace headrace
