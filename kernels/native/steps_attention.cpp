// Steps over the cache: keys and values are turned and stored, queries attend to them.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "scratch.h"

namespace headrace {
namespace {

constexpr float kLog2e = 1.44269504088896340736f;

}  // namespace

void Engine::rope(const Step& step, Scratch& mine) {
  const Geometry& g = program_->geometry;
  const auto& r = step.instruction.registers;
  const int d = g.head_dim, half = d / 2, tokens = int(batch_.ids.size());
  const int heads = tokens > kShort ? g.kv_heads : 1;  // of one piece of work
  for (int n; (n = pool_.take()) < tokens * (g.kv_heads / heads);) {
    const int token = n / (g.kv_heads / heads), position = batch_.position[token];
    const float *cos = step.cos + size_t(position) * half, *sin = step.sin + size_t(position) * half;
    for (int head = n % (g.kv_heads / heads), end = head + heads; head < end; head++) {
      cache_.expect(batch_.slot[token], step.instruction.layer, head, position);
      for (int q = head * g.group(); q < (head + 1) * g.group(); q++) kernels_.rope(row(r[0], token) + q * d, cos, sin, half);
      std::memcpy(mine.turned.data(), row(r[1], token) + head * d, sizeof(float) * d);
      kernels_.rope(mine.turned.data(), cos, sin, half);
      cache_.store(batch_.slot[token], step.instruction.layer, head, position, mine.turned.data(), row(r[2], token) + head * d);
    }
  }
}

void Engine::attention(const Step& step, Scratch& mine) {
  const auto& pieces = batch_.pieces;
  for (size_t n; (n = size_t(pool_.take())) < pieces.size();) {
    const size_t next = n + pool_.threads();  // where threads take turns
    piece(step, pieces[n], next < pieces.size() ? &pieces[next] : nullptr, mine);
  }
}

void Engine::piece(const Step& step, const Piece& p, const Piece* next, Scratch& mine) {
  const Geometry& g = program_->geometry;
  const int d = g.head_dim, layer = step.instruction.layer, q_register = step.instruction.registers[0];
  const Span& span = batch_.spans[p.span];
  Attend a{};
  a.rows = p.tokens * g.group(), a.head_dim = d, a.padded = cache_.padded();
  a.begin = p.begin, a.end = p.end;
  const size_t per_part = size_t(kShort) * g.group() * (a.padded + 2);
  float* part = p.parts > 1 ? parts_.data() + size_t(p.merge + p.part) * per_part : nullptr;
  a.m = part ? part : mine.m.data(), a.l = part ? part + a.rows : mine.l.data();
  a.sum = part ? part + 2 * a.rows : mine.sum.data();
  a.p = mine.p.data(), a.s = mine.s.data();
  const float unit = kLog2e / std::sqrt(float(d)) * (cache_.int8() ? cache_.key_scale(layer) : 1);
  for (int r = 0; r < a.rows; r++) {
    const int token = p.first + r / g.group();
    const float* q = row(q_register, token) + (p.head * g.group() + r % g.group()) * d;
    mine.limit[r] = batch_.position[token] + 1;
    if (cache_.int8()) {
      mine.q_scale[r] = kernels_.quantize(q, d, mine.q.data() + size_t(r) * d) * unit;
    } else {
      std::memcpy(mine.turned.data() + size_t(r) * d, q, sizeof(float) * d);
      mine.q_scale[r] = unit;
    }
  }
  a.q = mine.q.data(), a.q_scale = mine.q_scale.data(), a.limit = mine.limit.data();
  const uint8_t *keys = cache_.keys(span.slot, layer, p.head), *values = cache_.values(span.slot, layer, p.head);
  a.keys = reinterpret_cast<const int8_t*>(keys), a.values = reinterpret_cast<const int8_t*>(values);
  if (next) {
    const int slot = batch_.spans[next->span].slot;
    a.next_keys = reinterpret_cast<const int8_t*>(cache_.keys(slot, layer, next->head)) + size_t(next->begin) * d;
    a.next_values = reinterpret_cast<const int8_t*>(cache_.values(slot, layer, next->head)) + size_t(next->begin) * a.padded;
  }
  if (cache_.int8()) kernels_.attend(a);
  else kernels_.attend_float(a, mine.turned.data(), reinterpret_cast<const float*>(keys), reinterpret_cast<const float*>(values));
  const float value_scale = cache_.int8() ? cache_.value_scale(layer) : 1;
  if (part) {
    if (missing_[p.merge].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    missing_[p.merge].store(p.parts, std::memory_order_relaxed);  // for the next layer
  }
  // Results of one part, or of all of them in their order.
  const float* first = part ? part - p.part * per_part : nullptr;
  for (int r = 0; r < a.rows; r++) {
    float* out = row(step.instruction.registers[1], p.first + r / g.group()) + (p.head * g.group() + r % g.group()) * d;
    if (!part) {
      const float factor = value_scale / a.l[r];
      for (int i = 0; i < d; i++) out[i] = a.sum[size_t(r) * a.padded + i] * factor;
      continue;
    }
    float top = first[r], total = 0;
    for (int n = 1; n < p.parts; n++) top = std::max(top, first[n * per_part + r]);
    std::fill(out, out + d, 0.f);
    for (int n = 0; n < p.parts; n++) {
      const float* one = first + n * per_part;
      const float share = std::exp2(one[r] - top);
      total += one[a.rows + r] * share;
      for (int i = 0; i < d; i++) out[i] += one[2 * a.rows + size_t(r) * a.padded + i] * share;
    }
    for (int i = 0; i < d; i++) out[i] *= value_scale / total;
  }
}

}  // namespace headrace
