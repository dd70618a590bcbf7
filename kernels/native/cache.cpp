#include "cache.h"

#include <sys/mman.h>

#include <cstring>

#include "error.h"

namespace headrace {
Cache::Cache(const Geometry& g, bool int8, std::vector<float> scales, int slots, int context, const Kernels& kernels)
    : geometry_(g), int8_(int8), scales_(std::move(scales)), kernels_(kernels), context_(context),
      padded_(int(round_up(g.head_dim, kTile))), lengths_(slots, 0) {
  const size_t positions = round_up(context, kBlock);
  key_bytes_ = positions * g.head_dim * (int8 ? 1 : 4);
  value_bytes_ = int8 ? positions * padded_ : key_bytes_;
  const double wanted = double(slots) * g.layers * g.kv_heads * double(key_bytes_ + value_bytes_);
  require<ProgramError>(wanted < 1e14, "a cache of ", wanted, " bytes is not possible");
  total_ = size_t(slots) * g.layers * g.kv_heads * (key_bytes_ + value_bytes_);
  void* at = mmap(nullptr, total_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  require<ProgramError>(at != MAP_FAILED, "no memory for a cache of ", total_, " bytes");
  data_ = static_cast<uint8_t*>(at);
}

Cache::~Cache() { munmap(data_, total_); }

uint8_t* Cache::keys(int slot, int layer, int head) const {
  const size_t index = (size_t(slot) * geometry_.layers + layer) * geometry_.kv_heads + head;
  return data_ + index * (key_bytes_ + value_bytes_);
}

uint8_t* Cache::values(int slot, int layer, int head) const { return keys(slot, layer, head) + key_bytes_; }

// Asks for the lines that `store` will write: they were read a step ago, and weights have gone through the caches since.
void Cache::expect(int slot, int layer, int head, int position) const {
  const int d = geometry_.head_dim;
  if (!int8_) return;
  const uint8_t *k = keys(slot, layer, head) + size_t(position / kTile) * kTile * d + position % kTile * 2;
  const uint8_t* v = values(slot, layer, head) + size_t(position / 2) * padded_ * 2;
  for (int i = 0; i < d; i += 4) __builtin_prefetch(k + size_t(i) * kTile, 1);  // 64 bytes apart
  for (int i = 0; i < padded_; i += 32) __builtin_prefetch(v + 2 * i, 1);
}

void Cache::store(int slot, int layer, int head, int position, const float* key, const float* value) {
  const int d = geometry_.head_dim;
  uint8_t *k = keys(slot, layer, head), *v = values(slot, layer, head);
  if (!int8_) {
    std::memcpy(k + size_t(position) * d * 4, key, size_t(d) * 4);
    std::memcpy(v + size_t(position) * d * 4, value, size_t(d) * 4);
    return;
  }
  int8_t codes[512];  // the widest head
  kernels_.cache_codes(key, scales_[2 * layer], d, codes);
  k += size_t(position / kTile) * kTile * d + position % kTile * 2;
  for (int i = 0; i < d; i += 2) std::memcpy(k + size_t(i) * kTile, codes + i, 2);
  kernels_.cache_codes(value, scales_[2 * layer + 1], d, codes);
  v += size_t(position / 2) * padded_ * 2 + position % 2;
  for (int i = 0; i < d; i++) v[2 * i] = uint8_t(codes[i]);
}

void Cache::copy(int source, int target, int n) {
  if (source == target) {
    lengths_[target] = n;
    return;
  }
  const size_t whole = int8_ ? round_up(n, kTile) : n, d = geometry_.head_dim * (int8_ ? 1 : 4);
  for (int layer = 0; layer < geometry_.layers; layer++)
    for (int head = 0; head < geometry_.kv_heads; head++) {
      std::memcpy(keys(target, layer, head), keys(source, layer, head), whole * d);
      std::memcpy(values(target, layer, head), values(source, layer, head), int8_ ? whole * padded_ : whole * d);
    }
  lengths_[target] = n;
}

size_t Cache::bytes(int positions) const {
  return size_t(geometry_.layers) * 2 * geometry_.kv_heads * positions * geometry_.head_dim * (int8_ ? 1 : 4);
}

// Calls move(place in the cache, number of the element) for every element of the stretch, in the order of read.
template <class Move>
void Cache::walk(int slot, int start, int stop, Move move) const {
  const int d = geometry_.head_dim;
  const size_t size = int8_ ? 1 : 4;
  size_t n = 0;
  for (int layer = 0; layer < geometry_.layers; layer++)
    for (const bool is_value : {false, true})
      for (int head = 0; head < geometry_.kv_heads; head++) {
        uint8_t* base = is_value ? values(slot, layer, head) : keys(slot, layer, head);
        for (int p = start; p < stop; p++)
          for (int i = 0; i < d; i++) {
            size_t at = size_t(p) * d + i;
            if (int8_ && is_value) at = size_t(p / 2) * padded_ * 2 + 2 * i + p % 2;
            if (int8_ && !is_value) at = size_t(p / kTile) * kTile * d + size_t(i / 2) * kTile * 2 + p % kTile * 2 + i % 2;
            move(base + at * size, n++ * size, size);
          }
      }
}

void Cache::read(int slot, int start, int stop, uint8_t* out) const {
  walk(slot, start, stop, [&](const uint8_t* at, size_t n, size_t size) { std::memcpy(out + n, at, size); });
}

void Cache::write(int slot, int start, int stop, const uint8_t* data) {
  walk(slot, start, stop, [&](uint8_t* at, size_t n, size_t size) { std::memcpy(at, data + n, size); });
  lengths_[slot] = stop;
}

}  // namespace headrace
