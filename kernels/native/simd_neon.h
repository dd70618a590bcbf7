// Vectors of 16 bytes: what the kernels' templates ask of NEON on AArch64. With HEADRACE_DOTPROD, its products of four bytes;
// with HEADRACE_I8MM also those of unsigned by signed ones.
#pragma once
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace headrace {
namespace {

struct Neon {
  using I = int32x4_t;
  using F = float32x4_t;
  static constexpr int bytes = 16, lanes = 4, registers = 32;
  static constexpr int panels = 4, tokens = 3;  // 32 registers: 12 sums, 12 totals, 4 of weights, 1 token
  static constexpr bool pairs = false;  // products of four bytes are one instruction, or as good as
  static constexpr int together = 2;  // so often merged, sums of rows are in registers at once
  static constexpr int attend_rows = 4, most_rows = 32;

  static uint8x16_t u8(I v) { return vreinterpretq_u8_s32(v); }
  static int8x16_t s8(I v) { return vreinterpretq_s8_s32(v); }
  static int16x8_t s16(I v) { return vreinterpretq_s16_s32(v); }
  static uint32x4_t u32(I v) { return vreinterpretq_u32_s32(v); }

  static I load(const void* p) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
  static I load_part(const void* p, int n) {
    uint8_t whole[16] = {};
    std::memcpy(whole, p, n < 16 ? n : 16);
    return load(whole);
  }
  static void store(void* p, I v) { vst1q_u8(static_cast<uint8_t*>(p), u8(v)); }
  static I zero() { return vdupq_n_s32(0); }
  static I set8(int v) { return vreinterpretq_s32_s8(vdupq_n_s8(int8_t(v))); }
  static I set32(int v) { return vdupq_n_s32(v); }
  static I add32(I a, I b) { return vaddq_s32(a, b); }
  static I sub32(I a, I b) { return vsubq_s32(a, b); }
  // int16 of a, then of b.
  static I pack16(I a, I b) { return vreinterpretq_s32_s16(vcombine_s16(vmovn_s32(a), vmovn_s32(b))); }
  static I mul16(I a, I b) { return vreinterpretq_s32_s16(vmulq_s16(s16(a), s16(b))); }
  static I mul32(I a, I b) { return vmulq_s32(a, b); }
  static I broadcast32(const void* p) {
    int v;
    std::memcpy(&v, p, 4);
    return vdupq_n_s32(v);
  }

  static I low_nibbles(I w) { return vreinterpretq_s32_u8(vandq_u8(u8(w), vdupq_n_u8(15))); }
  static I high_nibbles(I w) { return vreinterpretq_s32_u8(vshrq_n_u8(u8(w), 4)); }
  // In every eight bytes the even ones first.
  static I evens_first(I w) {
    const uint8x16_t order = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};
    return vreinterpretq_s32_u8(vqtbl1q_u8(u8(w), order));
  }

  // The even bytes of two vectors, then the odd ones.
  static void store_apart(int8_t* p, I a, I b) {
    vst1q_s8(p, vuzp1q_s8(s8(a), s8(b)));
    vst1q_s8(p + bytes, vuzp2q_s8(s8(a), s8(b)));
  }

  // Sums of products of neighbours: two int16, or four of a byte of up to 7 bits (unsigned) by a byte (signed), to each int32; of four
  // whole bytes, of which the first are unsigned or, where signed_bytes says so, become signed: their zero point, 128, is taken off.
  static I dot16(I sum, I a, I b) {
    const I low = vmull_s16(vget_low_s16(s16(a)), vget_low_s16(s16(b))), high = vmull_high_s16(s16(a), s16(b));
    return vaddq_s32(sum, vpaddq_s32(low, high));
  }
#if defined(HEADRACE_I8MM)
  static constexpr bool signed_bytes = false;
  static I dot_bytes(I sum, I a, I b) { return vusdotq_s32(sum, u8(a), s8(b)); }
#else
  static constexpr bool signed_bytes = true;
  static I dot_bytes(I sum, I a, I b) { return dot8(sum, vreinterpretq_s32_u8(veorq_u8(u8(a), vdupq_n_u8(128))), b); }
#endif
  static I dot8(I sum, I a, I b) {
#if defined(HEADRACE_DOTPROD)
    return vdotq_s32(sum, s8(a), s8(b));
#else
    const int16x8_t low = vmull_s8(vget_low_s8(s8(a)), vget_low_s8(s8(b))), high = vmull_high_s8(s8(a), s8(b));
    return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
  }
  static I dot_nibbles(I sum, I even, I first, I odd, I second) { return dot8(dot8(sum, even, first), odd, second); }
  static I kept(I v) { return v; }
  static I widen(const int8_t* p) { return vreinterpretq_s32_s16(vmovl_s8(vld1_s8(p))); }

  static F loadf(const float* p) { return vld1q_f32(p); }
  static void storef(float* p, F v) { vst1q_f32(p, v); }
  static F zerof() { return vdupq_n_f32(0); }
  static F setf(float v) { return vdupq_n_f32(v); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F div(F a, F b) { return vdivq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F max(F a, F b) { return vmaxq_f32(a, b); }
  static F min(F a, F b) { return vminq_f32(a, b); }
  static F round(F a) { return vrndnq_f32(a); }
  static F to_float(I v) { return vcvtq_f32_s32(v); }
  static I to_int(F v) { return vcvtnq_s32_f32(v); }
  static I bits(F v) { return vreinterpretq_s32_f32(v); }
  static F floats(I v) { return vreinterpretq_f32_s32(v); }
  static I and_bits(I a, I b) { return vandq_s32(a, b); }
  static I max_unsigned(I a, I b) { return vreinterpretq_s32_u32(vmaxq_u32(u32(a), u32(b))); }
  // Every lane gets what `merge` makes of N neighbours, itself among them; N a power of two.
  template <int N, class Merge> static I neighbours(I v, Merge merge) {
    if constexpr (N > 1) v = merge(v, vrev64q_s32(v));
    if constexpr (N > 2) v = merge(v, vextq_s32(v, v, 2));
    return v;
  }
  static uint32_t top_unsigned(I v) { return vmaxvq_u32(u32(v)); }
  static float sum(F v) { return vaddvq_f32(v); }
  static float top(F v) { return vmaxvq_f32(v); }
  static int sum32(I v) { return vaddvq_s32(v); }
  static F scalef(F a, F whole) {  // a * 2^whole, whole within -127 … 127: by the exponent, whose 0 makes zero
    return mul(a, vreinterpretq_f32_s32(vshlq_n_s32(add32(to_int(whole), set32(127)), 23)));
  }
  static void store16(int16_t* p, I v) { vst1_s16(p, vqmovn_s32(v)); }
  static void store8(int8_t* p, I v) {
    const int16x4_t half = vqmovn_s32(v);
    const int8x8_t packed = vqmovn_s16(vcombine_s16(half, half));
    std::memcpy(p, &packed, 4);
  }

  static I pack8(const I* v) {  // four vectors of int32 to one of bytes, saturating
    const int8x8_t low = vqmovn_s16(vcombine_s16(vqmovn_s32(v[0]), vqmovn_s32(v[1])));
    return vreinterpretq_s32_s8(vcombine_s8(low, vqmovn_s16(vcombine_s16(vqmovn_s32(v[2]), vqmovn_s32(v[3])))));
  }

  static float half(uint16_t h) {
    __fp16 value;
    std::memcpy(&value, &h, 2);
    return value;
  }
  // Two vectors become one: every sum of two neighbours, on level 0, or of what that has left of four. a's sums come before b's.
  template <int Level> static F merge(F a, F b) { return vpaddq_f32(a, b); }
  template <int Level> static I merge(I a, I b) { return vpaddq_s32(a, b); }
  static F halves(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  // Two halves of each of two rows, `stride` apart.
  template <int N> static F halves_of(const uint16_t* p, size_t stride) {
    uint16_t all[4];
    std::memcpy(all, p, 4), std::memcpy(all + 2, p + stride, 4);
    return halves(all);
  }
  static I spread(uint64_t one, const int*) { return set32(int(one)); }  // four lanes take no second word
  static F factors(I words, I bit) {  // 1 + the four bits of each lane from `bit` on
    return to_float(add32(and_bits(vshlq_s32(words, vnegq_s32(bit)), set32(15)), set32(1)));
  }
  // What adds high bits to codes of half a unit, even and odd columns: bytes move their own bits to their place, so far less in the second
  // half of a unit.
  template <int Bits> struct HighBits {
    int8x16_t even = Bits == 5 ? int8x16_t{4, 4, 4, 4, 4, 4, 4, 4, 3, 3, 3, 3, 3, 3, 3, 3} : vdupq_n_s8(4);
    int8x16_t odd = Bits == 5 ? int8x16_t{0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1} : vdupq_n_s8(0);
    uint8x16_t mask = vdupq_n_u8(Bits == 5 ? 0x10 : 0x30);
    __attribute__((always_inline)) void add(I& evens, I& odds, const uint8_t* unit, int half) const {
      const uint8x16_t own = Bits == 5 ? vcombine_u8(vld1_u8(unit), vld1_u8(unit)) : vld1q_u8(unit);
      const int8x16_t less = vdupq_n_s8(int8_t(2 * half));
      const auto added = [&](I v, int8x16_t by) {
        return vreinterpretq_s32_u8(vorrq_u8(u8(v), vandq_u8(vshlq_u8(own, vsubq_s8(by, less)), mask)));
      };
      evens = added(evens, even), odds = added(odds, odd);
    }
  };
  // Of 1 + four bits for each lane, from `bit` on, a factor: that factor in every 16 bits, and what is left to 128 of a zero point times it
  // in every byte.
  template <int Zero> static void fold(uint32_t nibbles, I bit, I& factor, I& shift) {
    const I one = add32(and_bits(vshlq_s32(set32(int(nibbles)), vnegq_s32(bit)), set32(15)), set32(1));
    factor = vorrq_s32(one, vshlq_n_s32(one, 16)), shift = sub32(set8(-128), mul16(factor, set32(Zero * 0x1010101)));
  }
  static F evens_first(F v) { return vcombine_f32(vget_low_f32(vuzp1q_f32(v, v)), vget_low_f32(vuzp2q_f32(v, v))); }  // lanes
  static F permuted(F v, const int*) { return v; }  // four lanes never need it

  // Rows and columns of a square of int32 change places.
  static void transpose(I* r) {
    const auto pairs = [](I v) { return vreinterpretq_s64_s32(v); };
    const I a = vtrn1q_s32(r[0], r[1]), b = vtrn2q_s32(r[0], r[1]), c = vtrn1q_s32(r[2], r[3]), d = vtrn2q_s32(r[2], r[3]);
    r[0] = vreinterpretq_s32_s64(vtrn1q_s64(pairs(a), pairs(c))), r[1] = vreinterpretq_s32_s64(vtrn1q_s64(pairs(b), pairs(d)));
    r[2] = vreinterpretq_s32_s64(vtrn2q_s64(pairs(a), pairs(c))), r[3] = vreinterpretq_s32_s64(vtrn2q_s64(pairs(b), pairs(d)));
  }
};

}  // namespace
}  // namespace headrace
