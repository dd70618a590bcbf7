// What each thread of an engine has for itself, and the sizes that decide how much.
#pragma once
#include "engine.h"

namespace headrace {

constexpr int kPart = 1024;   // positions of one piece of attention of a short span
constexpr int kQueries = 32;  // queries of one piece of attention of a prompt
constexpr int kWidest = 512;  // channels that a thread takes at once when decoding, at most
constexpr int kAlone = 4096;  // numbers that every thread quantizes for itself sooner than it meets the others

// Whether every thread quantizes all of these rows of width k.
inline bool alone(const Rows& rows, int k) {
  return rows.coarse.empty() && (rows.fine.size() == 1 || rows.fine.size() * k <= kAlone);
}

struct Engine::Scratch {
  Activations own;       // of a token, or few short ones, quantized by every thread for itself
  Buffer<float> norm;    // one row
  Buffer<float> results; // of a chunk of channels, before what comes after a linear
  Buffer<uint8_t> panel; // of prompt
  Buffer<int16_t> q, p;
  Buffer<float> q_scale, m, l, sum, turned;
  Buffer<int> limit, s, order;  // order: 0, 1, 2, …
  int number = 0;  // of the thread
  bool leads = false;
};

}  // namespace headrace
