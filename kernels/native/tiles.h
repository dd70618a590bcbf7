// AMX's eight tiles of 16 rows by 64 bytes, and the same in plain C++, so that what is built on them runs and is tested
// on any machine. A tile's number is a template parameter, because it is part of the instruction.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace headrace {
namespace {

struct AmxTiles {
  // gcc 12's _tile_loadconfig tells the compiler of 8 of the 64 bytes, and the rest may never be stored; hence assembly.
  static void begin() {
    struct alignas(64) Shape {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    static_assert(sizeof(Shape) == 64, "the instruction reads 64 bytes");
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
    asm volatile("ldtilecfg %0" : : "m"(shape) : "memory");
  }
  static void end() { asm volatile("tilerelease" : : : "memory"); }
  template <int T> static void zero() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }
  template <int T> static void load(const void* p, size_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
  }
  template <int T> static void store(void* p, size_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
  }
  // C[row][column] += sum of A[row][4 k + i] (unsigned) * B[k][4 column + i] (signed).
  template <int C, int A, int B> static void dot() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};

struct EmulatedTiles {
  struct Tile { uint8_t bytes[16][64]; };
  static Tile& tile(int t) {
    static thread_local Tile tiles[8];
    return tiles[t];
  }
  static void begin() {}
  static void end() {}
  template <int T> static void zero() { std::memset(&tile(T), 0, sizeof(Tile)); }
  template <int T> static void load(const void* p, size_t stride) {
    for (int r = 0; r < 16; r++) std::memcpy(tile(T).bytes[r], static_cast<const uint8_t*>(p) + r * stride, 64);
  }
  template <int T> static void store(void* p, size_t stride) {
    for (int r = 0; r < 16; r++) std::memcpy(static_cast<uint8_t*>(p) + r * stride, tile(T).bytes[r], 64);
  }
  template <int C, int A, int B> static void dot() {
    for (int r = 0; r < 16; r++)
      for (int c = 0; c < 16; c++) {
        int32_t sum;
        std::memcpy(&sum, tile(C).bytes[r] + 4 * c, 4);
        for (int k = 0; k < 16; k++)
          for (int i = 0; i < 4; i++) sum += int(tile(A).bytes[r][4 * k + i]) * int8_t(tile(B).bytes[k][4 * c + i]);
        std::memcpy(tile(C).bytes[r] + 4 * c, &sum, 4);
      }
  }
};

}  // namespace
}  // namespace headrace
