// Vectors of 64 bytes: what the kernels' templates ask of AVX512 (F, BW, DQ, VL) with VNNI.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace headrace {
namespace {

// For factors 1 … 16 of bytes: each in both halves of a lane, and what is left to 128 of a zero point times it in every byte.
template <int Zero>
struct Factors {
  alignas(64) uint32_t words[16] = {}, shifts[16] = {};
  constexpr Factors() {
    for (uint32_t i = 0; i < 16; i++) words[i] = (i + 1) * 0x10001, shifts[i] = ((128 - Zero * (i + 1)) & 255) * 0x1010101;
  }
};

struct Avx512 {
  using I = __m512i;
  using F = __m512;
  static constexpr int bytes = 64, lanes = 16, registers = 32;
  static constexpr int panels = 4;  // vectors of channels that prompt does at a time
  static constexpr int tokens = 3;  // tokens that prompt does at a time
  static constexpr bool pairs = false;  // products of four bytes are one instruction, or as good as
  static constexpr int together = 2;  // so often merged, sums of rows are in registers at once
  static constexpr int attend_rows = 6, most_rows = 32;  // queries in registers, queries of a block together

  static I load(const void* p) { return _mm512_loadu_si512(p); }
  static I load_part(const void* p, int n) { return _mm512_maskz_loadu_epi8(n >= 64 ? ~0ull : (1ull << n) - 1, p); }
  static void store(void* p, I v) { _mm512_storeu_si512(p, v); }
  static I zero() { return _mm512_setzero_si512(); }
  static I set8(int v) { return _mm512_set1_epi8(char(v)); }
  static I set32(int v) { return _mm512_set1_epi32(v); }
  static I add32(I a, I b) { return _mm512_add_epi32(a, b); }
  static I sub32(I a, I b) { return _mm512_sub_epi32(a, b); }
  // int16 of a and b, in turn four lanes of each.
  static I pack16(I a, I b) { return _mm512_packs_epi32(a, b); }
  static I mul16(I a, I b) { return _mm512_mullo_epi16(a, b); }
  static I mul32(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static I broadcast32(const void* p) {
    int v;
    std::memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
  }

  static I low_nibbles(I w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
  static I high_nibbles(I w) { return _mm512_and_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi8(15)); }
  // What adds high bits to codes of two units, even and odd columns: every quarter or half of a unit's columns moves its own bits of the
  // same bytes to their place.
  template <int Bits> struct HighBits {
    I from = Bits == 5 ? _mm512_set_epi64(1, 1, 1, 1, 0, 0, 0, 0) : _mm512_set_epi64(3, 2, 3, 2, 1, 0, 1, 0);
    I left = Bits == 5 ? _mm512_set_epi64(1, 2, 3, 4, 1, 2, 3, 4) : _mm512_set_epi64(2, 2, 4, 4, 2, 2, 4, 4);
    I right = Bits == 5 ? _mm512_set_epi64(3, 2, 1, 0, 3, 2, 1, 0) : _mm512_set_epi64(2, 2, 0, 0, 2, 2, 0, 0);
    I mask = set8(Bits == 5 ? 0x10 : 0x30);
    __attribute__((always_inline)) void add(I& evens, I& odds, const uint8_t* units, int) const {
      I own;
      if constexpr (Bits == 5) own = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(units)));
      else own = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(units)));
      own = _mm512_permutexvar_epi64(from, own);
      evens = _mm512_ternarylogic_epi64(evens, _mm512_sllv_epi64(own, left), mask, 0xf8);  // evens | (… & mask)
      odds = _mm512_ternarylogic_epi64(odds, _mm512_srlv_epi64(own, right), mask, 0xf8);
    }
  };
  // In every eight bytes the even ones first.
  static I evens_first(I w) {
    return _mm512_shuffle_epi8(w, _mm512_broadcast_i32x4(_mm_set_epi8(15, 13, 11, 9, 14, 12, 10, 8, 7, 5, 3, 1, 6, 4, 2, 0)));
  }

  // Codes 256 * high + low of 2 * bytes columns, the even columns first, then the odd ones.
  static void split(const int16_t* codes, int8_t* high, int8_t* low) {
    I h[2], l[2];
    for (int i = 0; i < 2; i++) {
      const I a = load(codes + 64 * i), b = load(codes + 64 * i + 32), half = _mm512_set1_epi16(128);
      const __m256i ha = _mm512_cvtepi16_epi8(_mm512_srai_epi16(_mm512_add_epi16(a, half), 8));
      const __m256i hb = _mm512_cvtepi16_epi8(_mm512_srai_epi16(_mm512_add_epi16(b, half), 8));
      h[i] = _mm512_inserti64x4(_mm512_castsi256_si512(ha), hb, 1);
      l[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(a)), _mm512_cvtepi16_epi8(b), 1);
    }
    store_apart(high, h[0], h[1]);
    store_apart(low, l[0], l[1]);
  }
  // The even bytes of two vectors, then the odd ones.
  static void store_apart(int8_t* p, I a, I b) {
    const I even = _mm512_set1_epi16(255);
    const __m256i ea = _mm512_cvtepi16_epi8(_mm512_and_si512(a, even)), oa = _mm512_cvtepi16_epi8(_mm512_srli_epi16(a, 8));
    const __m256i eb = _mm512_cvtepi16_epi8(_mm512_and_si512(b, even)), ob = _mm512_cvtepi16_epi8(_mm512_srli_epi16(b, 8));
    store(p, _mm512_inserti64x4(_mm512_castsi256_si512(ea), eb, 1));
    store(p + 64, _mm512_inserti64x4(_mm512_castsi256_si512(oa), ob, 1));
  }

  // Sums of products of neighbours: two int16, or four of a byte (unsigned) by a byte (signed), to each int32.
  static constexpr bool signed_bytes = false;
  // In assembly because gcc 12 copies sums to other registers and back around the intrinsics.
  static I dot16(I sum, I a, I b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
  static I dot8(I sum, I a, I b) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
  static I dot_bytes(I sum, I a, I b) { return dot8(sum, a, b); }
  static I dot_nibbles(I sum, I even, I first, I odd, I second) { return dot8(dot8(sum, even, first), odd, second); }
  // Keeps a value in its register: gcc would load it again for every use.
  static I kept(I v) {
    asm("" : "+v"(v));
    return v;
  }
  static I widen(const int8_t* p) {  // as many bytes as there are int16
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }

  static F loadf(const float* p) { return _mm512_loadu_ps(p); }
  static void storef(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F zerof() { return _mm512_setzero_ps(); }
  static F setf(float v) { return _mm512_set1_ps(v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static I to_int(F v) { return _mm512_cvtps_epi32(v); }
  static I bits(F v) { return _mm512_castps_si512(v); }
  static F floats(I v) { return _mm512_castsi512_ps(v); }
  static I and_bits(I a, I b) { return _mm512_and_si512(a, b); }
  static I max_unsigned(I a, I b) { return _mm512_max_epu32(a, b); }
  // Every lane gets what `merge` makes of N neighbours, itself among them; N a power of two.
  template <int N, class Merge> static I neighbours(I v, Merge merge) {
    if constexpr (N > 1) v = merge(v, _mm512_shuffle_epi32(v, _MM_PERM_ENUM(0xb1)));
    if constexpr (N > 2) v = merge(v, _mm512_shuffle_epi32(v, _MM_PERM_ENUM(0x4e)));
    if constexpr (N > 4) v = merge(v, _mm512_permutex_epi64(v, 0x4e));
    if constexpr (N > 8) v = merge(v, _mm512_shuffle_i64x2(v, v, 0x4e));
    return v;
  }
  static uint32_t top_unsigned(I v) { return _mm512_reduce_max_epu32(v); }
  static float sum(F v) { return _mm512_reduce_add_ps(v); }
  static float top(F v) { return _mm512_reduce_max_ps(v); }
  static int sum32(I v) { return _mm512_reduce_add_epi32(v); }
  static F scalef(F a, F whole) { return _mm512_scalef_ps(a, whole); }  // a * 2^whole
  static void store16(int16_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(v)); }
  static void store8(int8_t* p, I v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(v)); }

  static I pack8(const I* v) {  // four vectors of int32 to one of bytes, saturating
    I all = _mm512_castsi128_si512(_mm512_cvtsepi32_epi8(v[0]));
    all = _mm512_inserti32x4(all, _mm512_cvtsepi32_epi8(v[1]), 1);
    all = _mm512_inserti32x4(all, _mm512_cvtsepi32_epi8(v[2]), 2);
    return _mm512_inserti32x4(all, _mm512_cvtsepi32_epi8(v[3]), 3);
  }

  static float half(uint16_t h) { return _cvtsh_ss(h); }
  // Two vectors become one: every sum of two neighbours, on level 0, or of what the level before has left of four, eight and
  // sixteen neighbours. Within four lanes a's sums come before b's, then so do whole fours.
  template <int Level> static F merge(F a, F b) {
    if constexpr (Level < 2) return add(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
    else return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  template <int Level> static I merge(I a, I b) {
    const F x = _mm512_castsi512_ps(a), y = _mm512_castsi512_ps(b);
    if constexpr (Level < 2) return add32(bits(_mm512_shuffle_ps(x, y, 0x88)), bits(_mm512_shuffle_ps(x, y, 0xdd)));
    else return add32(bits(_mm512_shuffle_f32x4(x, y, 0x88)), bits(_mm512_shuffle_f32x4(x, y, 0xdd)));
  }
  static F halves(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  // N halves of each of `lanes / N` rows, `stride` apart.
  template <int N> static F halves_of(const uint16_t* p, size_t stride) {
    const auto eight = [&](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + r * stride)); };
    const auto four = [&](int r) { return part<long long>(p + r * stride); };
    const auto two = [&](int r) { return part<int>(p + r * stride); };
    __m256i all;
    if constexpr (N == 8) all = _mm256_set_m128i(eight(1), eight(0));
    else if constexpr (N == 4) all = _mm256_set_epi64x(four(3), four(2), four(1), four(0));
    else all = _mm256_set_epi32(two(7), two(6), two(5), two(4), two(3), two(2), two(1), two(0));
    return _mm512_cvtph_ps(all);
  }
  template <class T> static T part(const void* p) {
    T v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static I spread(uint64_t two, const int* from) {  // one of two words to each lane
    return _mm512_permutexvar_epi32(load(from), _mm512_castsi128_si512(_mm_cvtsi64_si128(int64_t(two))));
  }
  static F factors(I words, I bit) {  // 1 + the four bits of each lane from `bit` on
    const F table = _mm512_set_ps(16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1);
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(words, bit), table);
  }
  // Of 1 + four bits for each lane, from `bit` on, a factor: that factor in every 16 bits, and what is left to 128 of a zero point times it
  // in every byte.
  template <int Zero> static void fold(uint32_t nibbles, I bit, I& factor, I& shift) {
    static constexpr Factors<Zero> table;
    const I of = _mm512_srlv_epi32(set32(int(nibbles)), bit);
    factor = _mm512_permutexvar_epi32(of, load(table.words)), shift = _mm512_permutexvar_epi32(of, load(table.shifts));
  }
  static F evens_first(F v) {  // lanes
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15), v);
  }
  static F permuted(F v, const int* from) { return _mm512_permutexvar_ps(load(from), v); }

  // Rows and columns of a square of int32 change places.
  static void transpose(I* r) {
    I t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
      t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
      r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
      r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
      r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
      r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
  }
};

}  // namespace
}  // namespace headrace
