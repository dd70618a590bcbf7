// Keys and values of every slot, laid out so that attention reads them in order:
//
//   int8      keys [tile of 16 positions][head_dim / 2][16][2], values [positions / 2][padded head_dim][2]
//   float32   keys and values [position][head_dim]
//
// Memory is zero and is taken from the system page by page as slots fill.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "program.h"

namespace headrace {

class Cache {
 public:
  Cache(const Geometry& geometry, bool int8, std::vector<float> scales, int slots, int context, const Kernels& kernels);
  ~Cache();
  Cache(const Cache&) = delete;

  int context() const { return context_; }
  int padded() const { return padded_; }
  bool int8() const { return int8_; }
  float key_scale(int layer) const { return scales_[2 * layer]; }
  float value_scale(int layer) const { return scales_[2 * layer + 1]; }
  int& length(int slot) { return lengths_[slot]; }
  int slots() const { return int(lengths_.size()); }

  uint8_t* keys(int slot, int layer, int head) const;
  uint8_t* values(int slot, int layer, int head) const;

  void expect(int slot, int layer, int head, int position) const;
  // Writes a position's key and value (head_dim each) of one head.
  void store(int slot, int layer, int head, int position, const float* key, const float* value);

  void copy(int source, int target, int n);
  size_t bytes(int positions) const;  // of read and write: (layers, 2, kv_heads, positions, head_dim)
  void read(int slot, int start, int stop, uint8_t* out) const;
  void write(int slot, int start, int stop, const uint8_t* data);

 private:
  template <class Move> void walk(int slot, int start, int stop, Move move) const;

  const Geometry geometry_;
  const bool int8_;
  const std::vector<float> scales_;
  const Kernels& kernels_;
  const int context_, padded_;
  size_t key_bytes_, value_bytes_, total_ = 0;  // of one head of one layer of one slot
  uint8_t* data_ = nullptr;
  std::vector<int> lengths_;
};

}  // namespace headrace
