// Quantized inputs of a linear: fine rows for short stretches of a sequence, coarse ones for prompts.
#pragma once
#include <algorithm>
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
    // Of up to kFew tokens together: steps of four kinds; and each one's own numbers.
    const size_t padded = round_up(k, kColumns), steps = kStepBytes * padded, segments = (padded / kSegment + 1) * 16;
    const size_t numbers = round_up(padded + 4 * (padded / 8 + 5 * segments + 2 * (padded / 4)), 64), bytes = 4 * steps + numbers;
    fine_memory_.grow(bytes * fine_rows);
    fine_.resize(fine_rows);
    for (int i = 0; i < fine_rows; i++) {
      const int number = i % kFew, together = std::min(kFew, fine_rows - (i - number));
      uint8_t* first = fine_memory_.data() + bytes * (i - number);
      const auto kind = [&](int which) { return first + which * together * steps; };
      int8_t* codes = reinterpret_cast<int8_t*>(kind(4) + number * numbers);
      int32_t* own = reinterpret_cast<int32_t*>(codes + padded);
      const auto take = [&](size_t n) { return own += n, own - n; };
      Fine& x = fine_[i];
      x.number = number, x.together = together;
      x.four = {0, kind(0), take(padded / 8), take(segments)};
      x.wide = {0, kind(1), take(4 * segments)};
      x.eight = {codes, reinterpret_cast<float*>(take(padded / 4)), take(padded / 4)};
      x.split[0] = kind(2), x.split[1] = kind(3);
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
