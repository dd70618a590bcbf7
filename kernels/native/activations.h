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
    const size_t padded = round_up(k, kPad), segments = (padded / kSegment + 1) * 16;
    const size_t steps4 = padded / 8, steps8 = padded / 4, bytes = round_up(6 * padded + 4 * (steps4 + steps8 + 2 * segments), 64);
    fine_memory_.grow(bytes * fine_rows);
    fine_.resize(fine_rows);
    for (int i = 0; i < fine_rows; i++) {
      uint8_t* at = fine_memory_.data() + bytes * i;
      Fine& f = fine_[i];
      f.natural = reinterpret_cast<int16_t*>(at);
      f.high4 = reinterpret_cast<int8_t*>(f.natural + padded);
      f.low4 = f.high4 + padded;
      f.high8 = f.low4 + padded;
      f.low8 = f.high8 + padded;
      f.steps4 = reinterpret_cast<int32_t*>(f.low8 + padded);
      f.steps8 = f.steps4 + steps4;
      f.segments4 = f.steps8 + steps8;
      f.segments8 = f.segments4 + segments;
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
