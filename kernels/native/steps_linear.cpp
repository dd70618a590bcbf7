// Steps that read weights: linears and the head, with what is fused into them.
#include <algorithm>

#include "scratch.h"

namespace headrace {
namespace {

constexpr size_t kLeastBytes = 12288, kMostBytes = 131072;  // of weights that a thread takes at once when decoding
constexpr int kTogether = 4;                                // rows that a thread quantizes at once

}  // namespace

const Rows& Engine::rows_of(const LinearStep& step) const {
  if (step.group == 0) return step.wanted ? batch_.wanted_fine : batch_.all_fine;
  return step.wanted ? batch_.of_wanted : batch_.all;
}

void Engine::linear(const LinearStep& step, Scratch& mine) {
  const Rows& rows = rows_of(step);
  const int k = step.weights[0].k, fine = int(rows.fine.size()), coarse = int(rows.coarse.size());
  if (!rows.count()) return;
  unsigned kinds = 0;
  for (const Weight& w : step.weights)
    kinds |= w.bits == 8 ? (w.block ? kBlocksOf8 : kRowsOf8) : w.bits == 6 ? kAllOf6 : w.bits == 5 ? kAllOf5 : w.block ? kBlocksOf4 : kRowsOf4;
  const auto input = [&](int i) {
    const float* x = row(step.in, step.gather ? batch_.wanted[i] : i);
    if (!step.norm) return x;
    kernels_.rms_norm(x, step.norm, program_->geometry.eps, k, mine.norm.data());
    return static_cast<const float*>(mine.norm.data());
  };
  const bool by_itself = alone(rows, k);
  Activations& x = by_itself ? mine.own : shared_;
  if (by_itself) {
    for (int i = 0; i < fine; i++) kernels_.fine(input(rows.fine[i]), k, kinds, x.fine()[i]);
  } else {
    Coarse target = shared_.coarse;
    target.m = coarse, target.k = k, target.group = step.group;
    bool scaled_rows = false, blocks = false;
    for (const Weight& w : step.weights) (w.block && !w.factors ? blocks : scaled_rows) = true;
    // Fine rows in pairs, since threads that write to one cache line wait for each other: with vectors of 32 bytes or more, steps of two
    // tokens end with a line. Then coarse ones a few at a time.
    const int pairs = (fine + 1) / 2, together = std::max(kernels_.tokens, coarse > 8 * kTogether ? kTogether : 1);
    for (int taken; (taken = pool_.take()) < pairs + (coarse + together - 1) / together;) {
      if (taken < pairs) {
        for (int i = 2 * taken; i < std::min(2 * taken + 2, fine); i++) kernels_.fine(input(rows.fine[i]), k, kinds, x.fine()[i]);
        continue;
      }
      const int first = (taken - pairs) * together;
      for (int i = first; i < std::min(first + together, coarse); i++)
        kernels_.coarse(input(rows.coarse[i]), i, scaled_rows, blocks, target);
    }
    pool_.meet();
  }
  const bool pairs = step.gated >= 0;
  const int count = pairs ? 1 : int(step.weights.size()), threads = pool_.threads();
  size_t bytes = 0;  // that a thread takes at once: enough to read in a stream, few enough to end together
  for (const Weight& w : step.weights) bytes += w.n * w.code_bytes();
  bytes = std::min(kMostBytes, std::max(kLeastBytes, bytes / (threads * 32))) / (pairs ? 2 : 1);
  const auto chunk_width = [&](int w) {
    const size_t channels = round_up(bytes / step.weights[w].code_bytes() + 1, 16);
    return coarse ? kernels_.panel : int(std::min<size_t>(kWidest, channels));
  };
  const auto chunks = [&](int w) { return (step.weights[w].n + chunk_width(w) - 1) / chunk_width(w); };
  int total = 0;  // chunks of all weights
  for (int w = 0; w < count; w++) total += chunks(w);
  // With prompts chunks are few and long: those that do not fill a round of threads are split by tokens.
  const int whole = coarse ? total / threads * threads : total, pieces = whole + (total - whole) * threads;
  // When decoding, most pieces are a thread's own, in the order of memory, and only the rest is taken from the counter: threads
  // that take in turn wait for each other's caches.
  const int own = coarse ? 0 : pieces * 3 / (4 * threads);
  for (int done = 0;; done++) {
    const int taken = done < own ? mine.number * own + done : threads * own + pool_.take();
    if (taken >= pieces) break;
    int chunk = taken < whole ? taken : whole + (taken - whole) / threads, w = 0;
    for (; chunk >= chunks(w); w++) chunk -= chunks(w);
    const Weight& weight = step.weights[w];
    const int width = chunk_width(w), begin = chunk * width, end = std::min(weight.n, begin + width);
    const int part = taken < whole ? 0 : (taken - whole) % threads, parts = taken < whole ? 1 : threads;
    if (fine && part == 0) {
      const auto run = [&](const Weight& of, const Out& out, int column) {
        kernels_.decode(of, x.fine(), fine, begin, end, out, column);
      };
      finish(step, rows.fine.data(), fine, w, begin, end, mine, run);
    }
    const int first = int(int64_t(coarse) * part / parts), last = int(int64_t(coarse) * (part + 1) / parts);
    if (first == last) continue;
    Coarse target = x.coarse;
    target.m = coarse, target.k = k, target.group = step.group;
    const auto run = [&](const Weight& of, const Out& out, int column) {
      kernels_.prompt(of, target, begin, end, first, last, Out{out.y, out.stride, out.rows - first}, column, mine.panel.data());
    };
    finish(step, rows.coarse.data() + first, last - first, w, begin, end, mine, run);
  }
}

// Channels begin … end for some rows: run computes them, then comes what is fused after.
template <class Run>
void Engine::finish(const LinearStep& step, const int* rows, int count, int weight, int begin, int end, Scratch& mine,
                    Run run) {
  if (step.gated < 0 && step.sum < 0) {
    const bool head = step.out.empty();
    float* y = head ? batch_.logits : registers_[step.out[weight]].data();
    return run(step.weights[weight], Out{y, head ? size_t(vocab()) : strides_[step.out[weight]], rows}, begin);
  }
  // Results go to rows of the thread's own, as far apart as the chunk is wide.
  const int n = end - begin;
  float *first = mine.results.data(), *second = first + size_t(n) * count;
  run(step.weights[weight], Out{first, size_t(n), mine.order.data()}, 0);
  if (step.gated >= 0) run(step.weights[1], Out{second, size_t(n), mine.order.data()}, 0);
  for (int i = 0; i < count; i++) {
    const float *one = first + size_t(i) * n, *two = second + size_t(i) * n;
    if (step.gated >= 0) kernels_.silu_mul(one, two, n, row(step.gated, rows[i]) + begin);
    else kernels_.add(row(step.residual, rows[i]) + begin, one, n, row(step.sum, rows[i]) + begin);
  }
}

}  // namespace headrace
