// Quantized inputs of a linear: fine rows for short stretches of a sequence, coarse ones for prompts.
#pragma once
#include <vector>

#include "buffer.h"
#include "kernels.h"

namespace headrace {

constexpr int kShort = 8;  // tokens of a span, or wanted rows of it, that are still computed with fine activations

// Which rows of a register are computed how; together they are all.
struct Rows {
  std::vector<int> fine, coarse;
  int count() const { return int(fine.size() + coarse.size()); }
  void clear() { fine.clear(), coarse.clear(); }
};

class Activations {
 public:
  // Room for the rows of one input of width k; pointers below are valid until the next call.
  void reserve(int fine_rows, int coarse_rows, int k) {
    const size_t padded = round_up(k, kColumns), eighths = padded / 8, quarters = padded / 4;
    const size_t segments = (padded / kSegment + 1) * 16, split = padded * kSplitBytes;
    const size_t bytes = round_up(2 * split + 2 * padded + 4 * (2 * eighths + segments + 3 * quarters), 64);
    fine_memory_.grow(bytes * fine_rows);
    fine_.resize(fine_rows);
    for (int i = 0; i < fine_rows; i++) {
      uint8_t* own = fine_memory_.data() + bytes * i;
      int8_t* codes = reinterpret_cast<int8_t*>(own + 2 * split);
      int32_t* numbers = reinterpret_cast<int32_t*>(codes + 2 * padded);
      fine_[i].four = {0, codes, reinterpret_cast<int16_t*>(numbers), numbers + eighths, numbers + 2 * eighths};
      numbers += 2 * eighths + segments;
      fine_[i].eight = {codes + padded, reinterpret_cast<float*>(numbers), numbers + quarters, numbers + 2 * quarters};
      fine_[i].split[0] = own, fine_[i].split[1] = own + split;
    }
    const size_t groups = round_up(k, kColumns) / (kMostGroup / 2);
    codes_.grow(round_up(k, kColumns) * coarse_rows);
    scales_.grow(groups * coarse_rows);
    sums16_.grow(groups * 2 * coarse_rows);
    tiles_.grow(round_up(k, kPad) * 2 * round_up(coarse_rows, 16));
    tile_scales_.grow(coarse_rows);
    tile_sums_.grow(coarse_rows);
    coarse = {coarse_rows, k, kMostGroup, codes_.data(), scales_.data(), sums16_.data(), tiles_.data(),
              tile_scales_.data(), tile_sums_.data()};
  }
  Fine* fine() { return fine_.data(); }
  const Fine* fine() const { return fine_.data(); }
  Coarse coarse{};

 private:
  Buffer<uint8_t> fine_memory_;
  std::vector<Fine> fine_;
  Buffer<int8_t> codes_, tiles_;
  Buffer<float> scales_, tile_scales_;
  Buffer<int32_t> sums16_, tile_sums_;
};

}  // namespace headrace
