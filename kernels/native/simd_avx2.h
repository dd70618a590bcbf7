// Vectors of 32 bytes: what the kernels' templates ask of AVX2 with FMA and F16C. With HEADRACE_VNNI, AVX-VNNI's products.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace headrace {
namespace {

struct Avx2 {
  using I = __m256i;
  using F = __m256;
  static constexpr int bytes = 32, lanes = 8, registers = 16;
  static constexpr int panels = 2, tokens = 3;                // 16 registers: 6 sums, 2 of weights, 1 token, 1 product
  static constexpr int together = 1;  // so often merged, sums of rows are in registers at once
  static constexpr int attend_rows = 3, most_rows = 32;

  static I load(const void* p) { return _mm256_loadu_si256(static_cast<const I*>(p)); }
  static I load_part(const void* p, int n) {
    alignas(32) uint8_t whole[32] = {};
    std::memcpy(whole, p, n < 32 ? n : 32);
    return load(whole);
  }
  static void store(void* p, I v) { _mm256_storeu_si256(static_cast<I*>(p), v); }
  static I zero() { return _mm256_setzero_si256(); }
  static I set8(int v) { return _mm256_set1_epi8(char(v)); }
  static I set16(int v) { return _mm256_set1_epi16(short(v)); }
  static I set32(int v) { return _mm256_set1_epi32(v); }
  static I add32(I a, I b) { return _mm256_add_epi32(a, b); }
  static I add16(I a, I b) { return _mm256_add_epi16(a, b); }
  static I sub32(I a, I b) { return _mm256_sub_epi32(a, b); }
  // int16 of a and b, in turn four lanes of each.
  static I pack16(I a, I b) { return _mm256_packs_epi32(a, b); }
  static I mul16(I a, I b) { return _mm256_mullo_epi16(a, b); }
  static I mul32(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static I broadcast32(const void* p) {
    int v;
    std::memcpy(&v, p, 4);
    return _mm256_set1_epi32(v);
  }

  static I low_nibbles(I w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
  static I high_nibbles(I w) { return _mm256_and_si256(_mm256_srli_epi16(w, 4), _mm256_set1_epi8(15)); }
  // In every eight bytes the even ones first.
  static I evens_first(I w) {
    return _mm256_shuffle_epi8(
        w, _mm256_broadcastsi128_si256(_mm_set_epi8(15, 13, 11, 9, 14, 12, 10, 8, 7, 5, 3, 1, 6, 4, 2, 0)));
  }

  // The even bytes of two vectors, then the odd ones.
  static void store_apart(int8_t* p, I a, I b) {
    const I even = _mm256_set1_epi16(255);
    const I evens = _mm256_packus_epi16(_mm256_and_si256(a, even), _mm256_and_si256(b, even));
    const I odds = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
    store(p, _mm256_permute4x64_epi64(evens, 0xd8));
    store(p + bytes, _mm256_permute4x64_epi64(odds, 0xd8));
  }

  // Sums of products of neighbours: two int16, or four of a byte of up to 7 bits (unsigned) by a byte (signed), to each int32; of four
  // whole bytes, of which the first are unsigned or, where signed_bytes says so, become signed: their zero point, 128, is taken off.
#if defined(HEADRACE_VNNI)
  static constexpr bool signed_bytes = false;
  static I dot16(I sum, I a, I b) {
    asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
    return sum;
  }
  static I dot8(I sum, I a, I b) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
    return sum;
  }
  static I dot_bytes(I sum, I a, I b) { return dot8(sum, a, b); }
  static I dot_nibbles(I sum, I even, I first, I odd, I second) { return dot8(dot8(sum, even, first), odd, second); }
  static constexpr bool pairs = false;
#else
  static constexpr bool signed_bytes = true;
  static I dot16(I sum, I a, I b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
  static I dot8(I sum, I a, I b) { return add_pairs(sum, _mm256_maddubs_epi16(a, b), 1); }
  static I dot_bytes(I sum, I a, I b) {  // two products of magnitudes up to 128 by 127 fit an int16
    const I whole = _mm256_xor_si256(a, set8(-128));
    return add_pairs(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(whole), _mm256_sign_epi8(b, whole)), 1);
  }
  static constexpr bool pairs = true;  // products of neighbours are int16
  static I pair_start(I b, int zero_point) { return _mm256_sub_epi16(zero(), pair_products(set8(zero_point), b)); }
  static I pair_products(I a, I b) { return _mm256_maddubs_epi16(a, b); }
  static I add_pairs(I sum, I of, int factor) { return add32(sum, _mm256_madd_epi16(of, _mm256_set1_epi16(short(factor)))); }
  // Factors of each lane twice, of four lanes and then of the same four again instead of one by one.
  static I fours_twice(I factors) {
    return _mm256_shuffle_epi8(factors, _mm256_broadcastsi128_si256(_mm_set_epi8(13, 12, 9, 8, 5, 4, 1, 0, 13, 12, 9, 8, 5, 4, 1, 0)));
  }
  // Unsigned bytes as int16, in two vectors, and int16 of as many columns in that order.
  static I widened(I w, int half) { return half ? _mm256_unpackhi_epi8(w, zero()) : _mm256_unpacklo_epi8(w, zero()); }
  static void store_widened(int16_t* p, const int16_t* codes) {
    for (int i = 0; i < 4; i++) std::memcpy(p + 8 * i, codes + 8 * (i / 2 + i % 2 * 2), 16);
  }
  static I dot_nibbles(I sum, I even, I first, I odd, I second) {
    return add_pairs(sum, add16(pair_products(even, first), pair_products(odd, second)), 1);
  }
#endif
  static I kept(I v) { return v; }
  static I kept_there(I v) {  // gcc cannot tell what it is
    asm("" : "+x"(v));
    return v;
  }
  static I widen(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

  static F loadf(const float* p) { return _mm256_loadu_ps(p); }
  static void storef(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F zerof() { return _mm256_setzero_ps(); }
  static F setf(float v) { return _mm256_set1_ps(v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static I to_int(F v) { return _mm256_cvtps_epi32(v); }
  static I bits(F v) { return _mm256_castps_si256(v); }
  static F floats(I v) { return _mm256_castsi256_ps(v); }
  static I and_bits(I a, I b) { return _mm256_and_si256(a, b); }
  static I max_unsigned(I a, I b) { return _mm256_max_epu32(a, b); }
  // Every lane gets what `merge` makes of N neighbours, itself among them; N a power of two.
  template <int N, class Merge> static I neighbours(I v, Merge merge) {
    if constexpr (N > 1) v = merge(v, _mm256_shuffle_epi32(v, 0xb1));
    if constexpr (N > 2) v = merge(v, _mm256_shuffle_epi32(v, 0x4e));
    if constexpr (N > 4) v = merge(v, _mm256_permute4x64_epi64(v, 0x4e));
    return v;
  }
  static uint32_t top_unsigned(I v) {
    __m128i half = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4e));
    return uint32_t(_mm_cvtsi128_si32(_mm_max_epu32(half, _mm_shuffle_epi32(half, 0xb1))));
  }
  static float sum(F v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static float top(F v) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }
  static int sum32(I v) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
  }
  static F scalef(F a, F whole) {  // a * 2^whole, whole within -127 … 127: by the exponent, whose 0 makes zero
    return mul(a, _mm256_castsi256_ps(_mm256_slli_epi32(add32(to_int(whole), set32(127)), 23)));
  }
  static void store16(int16_t* p, I v) {
    const __m128i packed = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  static void store8(int8_t* p, I v) {
    const __m128i packed = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(packed, packed));
  }

  static I pack8(const I* v) {  // four vectors of int32 to one of bytes, saturating
    const I all = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    return _mm256_permutevar8x32_epi32(all, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0));
  }

  static float half(uint16_t h) { return _cvtsh_ss(h); }
  // Two vectors become one: every sum of two neighbours, on level 0, or of what the level before has left of four and eight
  // neighbours. Within four lanes a's sums come before b's, then so do whole fours.
  template <int Level> static F merge(F a, F b) {
    if constexpr (Level < 2) return add(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
    else return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
  template <int Level> static I merge(I a, I b) {
    const F x = _mm256_castsi256_ps(a), y = _mm256_castsi256_ps(b);
    if constexpr (Level < 2) return add32(bits(_mm256_shuffle_ps(x, y, 0x88)), bits(_mm256_shuffle_ps(x, y, 0xdd)));
    else return add32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
  }
  static F halves(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  // N halves of each of `lanes / N` rows, `stride` apart.
  template <int N> static F halves_of(const uint16_t* p, size_t stride) {
    const auto four = [&](int r) { return part<long long>(p + r * stride); };
    const auto two = [&](int r) { return part<int>(p + r * stride); };
    if constexpr (N == 4) return _mm256_cvtph_ps(_mm_set_epi64x(four(1), four(0)));
    else return _mm256_cvtph_ps(_mm_set_epi32(two(3), two(2), two(1), two(0)));
  }
  template <class T> static T part(const void* p) {
    T v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static I spread(uint64_t one, const int*) { return set32(int(one)); }  // eight lanes take no second word
  static F factors(I words, I bit) {  // 1 + the four bits of each lane from `bit` on
    return to_float(add32(and_bits(_mm256_srlv_epi32(words, bit), set32(15)), set32(1)));
  }
  // What adds high bits to codes of a unit, even and odd columns: every quarter or half of a vector moves its own bits of the same bytes to
  // their place. Kept in registers, since gcc would make it anew for every row.
  template <int Bits> struct HighBits {
    I left = kept_there(Bits == 5 ? _mm256_set_epi64x(1, 2, 3, 4) : _mm256_set_epi64x(2, 2, 4, 4));
    I right = kept_there(Bits == 5 ? _mm256_set_epi64x(3, 2, 1, 0) : _mm256_set_epi64x(2, 2, 0, 0));
    I mask = kept_there(set8(Bits == 5 ? 0x10 : 0x30));
    __attribute__((always_inline)) void add(I& evens, I& odds, const uint8_t* unit, int) const {
      I own;
      if constexpr (Bits == 5) own = _mm256_set1_epi64x(part<long long>(unit));
      else own = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(unit)));
      evens = _mm256_or_si256(evens, and_bits(_mm256_sllv_epi64(own, left), mask));
      odds = _mm256_or_si256(odds, and_bits(_mm256_srlv_epi64(own, right), mask));
    }
  };
  // Of 1 + four bits for each lane, from `bit` on, a factor: that factor in every 16 bits ...
  static I factor_pairs(uint32_t nibbles, I bit) {
    const I twice = _mm256_set1_epi16(short(nibbles));  // 64 columns have four at most
    return add16(and_bits(_mm256_srlv_epi32(twice, bit), set32(0x000f000f)), set32(0x10001));
  }
  // ... and what is left to 128 of a zero point times it in every byte.
  template <int Zero> static void fold(uint32_t nibbles, I bit, I& factor, I& shift) {
    factor = factor_pairs(nibbles, bit), shift = sub32(set8(-128), mul16(factor, set32(Zero * 0x1010101)));
  }
  static F evens_first(F v) { return _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7)); }  // lanes
  static F permuted(F v, const int* from) { return _mm256_permutevar8x32_ps(v, load(from)); }

  // Rows and columns of a square of int32 change places.
  static void transpose(I* r) {
    I t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
      t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
      t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
    }
    for (int i = 0; i < 8; i++) r[i] = t[i];
  }
};

}  // namespace
}  // namespace headrace
