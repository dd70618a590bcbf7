#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "error.h"
#include "half.h"

namespace headrace {
namespace {

constexpr double kSettled = 1, kShare = 0.1;  // seconds of work before weights are copied; share of the time afterwards
constexpr int kPart = 1024;        // positions of one piece of attention of a short span
constexpr int kQueries = 32;       // queries of one piece of attention of a prompt
constexpr size_t kLeastBytes = 12288, kMostBytes = 131072;  // of weights that a thread takes at once when decoding
constexpr int kTogether = 4;        // rows that a thread quantizes at once
constexpr int kWidest = 512;       // channels of such a chunk at most
constexpr float kLog2e = 1.44269504088896340736f;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

struct Engine::Scratch {
  Activations own;       // of a single token, quantized by every thread for itself
  Buffer<float> norm;    // one row
  Buffer<float> results; // of a chunk of channels, before what comes after a linear
  Buffer<uint8_t> panel; // of prompt
  Buffer<int16_t> q, p;
  Buffer<float> q_scale, m, l, sum, turned;
  Buffer<int> limit, s, order;  // order: 0, 1, 2, …
  int number = 0;  // of the thread
  bool leads = false;
};

Engine::Engine(std::unique_ptr<Program> program, int slots, int context, int threads, const Kernels& kernels, bool fuse, Settle settle)
    : program_(std::move(program)), kernels_(kernels), steps_(compile(*program_, fuse)),
      cache_(program_->geometry, program_->int8, program_->scales, slots, context, kernels), pool_(threads) {
  // An odd number of cache lines, so that the rows of a column do not all fall into one set of the cache.
  for (const int width : program_->registers) strides_.push_back(round_up(width, 16) | 16);
  for (size_t i = 0; i < strides_.size(); i++) registers_.emplace_back();
  for (int i = 0; i < threads; i++) scratch_.push_back(std::make_unique<Scratch>());
  for (int i = 0; i < threads; i++) scratch_[i]->number = i;
  scratch_[0]->leads = true;
  if (settle != Settle::kNever) huge_pages_.look_for(program_->files());
  if (settle == Settle::kAtOnce) {
    const std::function<void(int)> move = [this](int) { while (huge_pages_.more()) huge_pages_.move_next(); };
    pool_.run(move);
    return;
  }
  std::vector<Arrival::Stretch> weights;
  for (const Step& step : steps_)
    for (const Weight& w : step.linear.weights) {
      weights.emplace_back(w.packed, size_t(w.n) * w.row_bytes());
      weights.emplace_back(reinterpret_cast<const uint8_t*>(w.scale), size_t(w.n) * w.blocks() * sizeof *w.scale);
    }
  arrival_.begin(std::move(weights));
}

Engine::~Engine() = default;

// Copies some weights into huge pages between two runs. Whoever runs the engine for a short answer alone pays nothing.
void Engine::settle() {
  if (!huge_pages_.more() || busy_ < kSettled || allowance_ <= 0) return;
  const double start = now(), end = start + allowance_;
  const std::function<void(int)> move = [this, end](int) { while (huge_pages_.more() && now() < end) huge_pages_.move_next(); };
  pool_.run(move);
  allowance_ -= now() - start;
}

void Engine::check_slot(int slot) const {
  require<SpanError>(slot >= 0 && slot < cache_.slots(), "slot ", slot, " of ", cache_.slots());
}

void Engine::check(const std::vector<Span>& spans) const {
  require<SpanError>(!spans.empty(), "there are no spans");
  std::vector<bool> seen(cache_.slots());
  for (const Span& s : spans) {
    check_slot(s.slot);
    require<SpanError>(!seen[s.slot], "slot ", s.slot, " is in two spans");
    seen[s.slot] = true;
    const int held = const_cast<Cache&>(cache_).length(s.slot);
    require<SpanError>(s.start >= 0 && s.start <= held, "slot ", s.slot, ": start ", s.start,
                       " is not between 0 and the ", held, " positions it holds");
    require<SpanError>(s.n > 0, "slot ", s.slot, ": a span without tokens");
    require<SpanError>(s.n <= cache_.context() - s.start, "slot ", s.slot, ": ", s.n, " tokens at ", s.start,
                       " pass the context of ", cache_.context());
    for (int i = 0; i < s.n; i++)
      require<SpanError>(s.ids[i] >= 0 && s.ids[i] < vocab(), "slot ", s.slot, ": id ", s.ids[i],
                         " is not below the vocabulary's ", vocab());
    for (int i = 0; i < s.wanted_count; i++)
      require<SpanError>(s.wanted[i] >= 0 && s.wanted[i] < s.n, "slot ", s.slot, ": wanted row ", s.wanted[i], " of ", s.n);
  }
}

void Engine::run(const std::vector<Span>& spans, float* logits) {
  check(spans);
  arrival_.end();
  settle();
  const double start = now();
  prepare(spans, logits);
  cancelled_.store(false);
  stop_at_.store(INT64_MAX);
  for (const Span& s : spans) cache_.length(s.slot) = s.start;  // until all is done
  const std::function<void(int)> job = [this](int thread) { work(thread); };
  pool_.run(job);
  meetings = pool_.meetings();
  busy_ += now() - start, allowance_ += kShare * (now() - start);
  if (stop_at_.load() != INT64_MAX) throw Cancelled();
  for (const Span& s : spans) {
    cache_.length(s.slot) = s.start + s.n;
    tokens += s.n;
  }
  runs++;
}

// Everything that grows, grows here, before the threads start.
void Engine::prepare(const std::vector<Span>& spans, float* logits) {
  Batch& b = batch_;
  b.spans = spans;
  b.logits = logits;
  b.ids.clear(), b.slot.clear(), b.position.clear(), b.wanted.clear(), b.all.clear(), b.of_wanted.clear();
  b.all_fine.clear(), b.wanted_fine.clear();
  for (const Span& s : spans) {
    const int first = int(b.ids.size());
    auto& rows = s.n <= kShort ? b.all.fine : b.all.coarse;
    for (int i = 0; i < s.n; i++) {
      rows.push_back(first + i);
      b.ids.push_back(s.ids[i]), b.slot.push_back(s.slot), b.position.push_back(s.start + i);
    }
    auto& wanted = s.wanted_count <= kShort ? b.of_wanted.fine : b.of_wanted.coarse;
    for (int i = 0; i < s.wanted_count; i++) {
      wanted.push_back(int(b.wanted.size()));
      b.wanted.push_back(first + s.wanted[i]);
    }
  }
  const size_t rows = std::max(b.ids.size(), b.wanted.size());
  for (size_t r = 0; r < registers_.size(); r++) registers_[r].grow(rows * strides_[r]);
  for (int i = 0; i < int(b.ids.size()); i++) b.all_fine.fine.push_back(i);
  for (int i = 0; i < int(b.wanted.size()); i++) b.wanted_fine.fine.push_back(i);
  int fine = 0, coarse = 0, widest = 1;
  for (const Step& s : steps_) {
    if (s.linear.weights.empty()) continue;
    const Rows& of = rows_of(s.linear);
    fine = std::max(fine, int(of.fine.size())), coarse = std::max(coarse, int(of.coarse.size()));
    widest = std::max(widest, s.linear.weights[0].k);
  }
  shared_.reserve(fine, coarse, widest);
  plan_attention();
  const Geometry& g = program_->geometry;
  const size_t queries = std::max<size_t>({size_t(kQueries), size_t(kShort) * g.group()});
  for (auto& s : scratch_) {
    s->own.reserve(1, 0, widest);
    s->norm.grow(widest);
    s->results.grow(2 * rows * std::max(kWidest, kernels_.panel));
    s->order.grow(rows);
    for (size_t i = 0; i < rows; i++) s->order[i] = int(i);
    s->panel.grow(kernels_.prompt_scratch(coarse));
    s->q.grow(queries * g.head_dim), s->p.grow(queries * kBlock);
    s->q_scale.grow(queries), s->m.grow(queries), s->l.grow(queries), s->limit.grow(queries);
    s->sum.grow(queries * cache_.padded()), s->turned.grow(std::max<size_t>(g.head_dim, queries * g.head_dim));
    s->s.grow(queries * kBlock);
  }
}

void Engine::plan_attention() {
  Batch& b = batch_;
  const Geometry& g = program_->geometry;
  b.pieces.clear();
  b.parts = 0;
  int first = 0;
  for (int i = 0; i < int(b.spans.size()); i++) {
    const Span& s = b.spans[i];
    if (s.n <= kShort) {
      const int end = s.start + s.n, count = (end + kPart - 1) / kPart;
      for (int head = 0; head < g.kv_heads; head++) {
        for (int part = 0; part < count; part++)
          b.pieces.push_back({i, head, first, s.n, part * kPart, std::min(end, (part + 1) * kPart), part, count, b.parts});
        b.parts += count;
      }
    } else {
      const int tokens = std::max(1, kQueries / g.group());
      for (int t = (s.n - 1) / tokens * tokens; t >= 0; t -= tokens) {  // the longest first
        const int n = std::min(tokens, s.n - t);
        for (int head = 0; head < g.kv_heads; head++)
          b.pieces.push_back({i, head, first + t, n, 0, s.start + t + n, 0, 1, 0});
      }
    }
    first += s.n;
  }
  parts_.grow(size_t(b.parts) * kShort * g.group() * (cache_.padded() + 2));
  if (missing_size_ < b.parts) {
    missing_size_ = b.parts;
    missing_.reset(new std::atomic<int>[b.parts]);
  }
  for (const Piece& p : b.pieces)
    if (p.parts > 1) missing_[p.merge].store(p.parts);
}

void Engine::work(int thread) {
  Scratch& mine = *scratch_[thread];
  int64_t meeting = 0;
  double before = mine.leads ? now() : 0;
  for (const Step& step : steps_) {
    execute(step, mine);
    if (mine.leads) {  // what is decided before a meeting, all know after it
      if (cancelled_.load(std::memory_order_relaxed)) stop_at_.store(std::min(stop_at_.load(), meeting));
    }
    pool_.meet();
    if (mine.leads) {
      const double after = now();
      seconds[int(step.kind)] += after - before;
      before = after;
    }
    if (stop_at_.load(std::memory_order_relaxed) <= meeting) return;
    meeting++;
  }
}

void Engine::execute(const Step& step, Scratch& mine) {
  switch (step.kind) {
    case Kind::kEmbed: return embed(step);
    case Kind::kElementwise: return elementwise(step);
    case Kind::kRope: return rope(step, mine);
    case Kind::kAttention: return attention(step, mine);
    case Kind::kLinear: case Kind::kHead: return linear(step.linear, mine);
  }
}

void Engine::embed(const Step& step) {
  const Weight& w = step.table;
  for (int i; (i = pool_.take()) < int(batch_.ids.size());) {
    const uint8_t* codes = w.packed + batch_.ids[i] * w.row_bytes();
    const uint16_t* scales = w.scale + size_t(batch_.ids[i]) * w.blocks();
    float* out = row(step.instruction.registers[0], i);
    const int block = w.block ? w.block : w.k;
    for (int b = 0; b < w.blocks(); b++) {
      const float scale = half_to_float(scales[b]);
      for (int k = b * block; k < (b + 1) * block; k++) {
        const int code = w.bits == 8 ? codes[k] - 128 : (k % 2 ? codes[k / 2] >> 4 : codes[k / 2] & 15) - 8;
        out[k] = float(code) * scale;
      }
    }
  }
}

void Engine::elementwise(const Step& step) {
  const Instruction& i = step.instruction;
  const auto& r = i.registers;
  const bool rows = i.op == Op::kRows;
  const int count = int(step.wanted || rows ? batch_.wanted.size() : batch_.ids.size()), width = program_->registers[r[0]];
  for (int n; (n = pool_.take()) < count;) {
    const float* in = row(r[0], rows ? batch_.wanted[n] : n);
    switch (i.op) {
      case Op::kRows: std::memcpy(row(r[1], n), in, sizeof(float) * width); break;
      case Op::kRmsNorm: kernels_.rms_norm(in, step.norm, program_->geometry.eps, width, row(r[1], n)); break;
      case Op::kAdd: kernels_.add(in, row(r[1], n), width, row(r[2], n)); break;
      case Op::kSiluMul: kernels_.silu_mul(in, row(r[1], n), width, row(r[2], n)); break;
      case Op::kAddNorm:
        kernels_.add(in, row(r[1], n), width, row(r[2], n));
        kernels_.rms_norm(row(r[2], n), step.norm, program_->geometry.eps, width, row(r[3], n));
        break;
      default: break;
    }
  }
}

void Engine::rope(const Step& step, Scratch& mine) {
  const Geometry& g = program_->geometry;
  const auto& r = step.instruction.registers;
  const int d = g.head_dim, half = d / 2, tokens = int(batch_.ids.size());
  const int heads = tokens > kShort ? g.kv_heads : 1;  // of one piece of work
  for (int n; (n = pool_.take()) < tokens * (g.kv_heads / heads);) {
    const int token = n / (g.kv_heads / heads), position = batch_.position[token];
    const float *cos = step.cos + size_t(position) * half, *sin = step.sin + size_t(position) * half;
    for (int head = n % (g.kv_heads / heads), end = head + heads; head < end; head++) {
      for (int q = head * g.group(); q < (head + 1) * g.group(); q++) kernels_.rope(row(r[0], token) + q * d, cos, sin, half);
      std::memcpy(mine.turned.data(), row(r[1], token) + head * d, sizeof(float) * d);
      kernels_.rope(mine.turned.data(), cos, sin, half);
      cache_.store(batch_.slot[token], step.instruction.layer, head, position, mine.turned.data(), row(r[2], token) + head * d);
    }
  }
}

void Engine::attention(const Step& step, Scratch& mine) {
  for (size_t n; (n = size_t(pool_.take())) < batch_.pieces.size();) piece(step, batch_.pieces[n], mine);
}

void Engine::piece(const Step& step, const Piece& p, Scratch& mine) {
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

const Rows& Engine::rows_of(const LinearStep& step) const {
  if (step.group == 0) return step.wanted ? batch_.wanted_fine : batch_.all_fine;
  return step.wanted ? batch_.of_wanted : batch_.all;
}

void Engine::linear(const LinearStep& step, Scratch& mine) {
  const Rows& rows = rows_of(step);
  const int k = step.weights[0].k, fine = int(rows.fine.size()), coarse = int(rows.coarse.size());
  if (!rows.count()) return;
  bool four = false, eight = false;
  for (const Weight& w : step.weights) (w.bits == 4 ? four : eight) = true;
  const auto input = [&](int i) {
    const float* x = row(step.in, step.gather ? batch_.wanted[i] : i);
    if (!step.norm) return x;
    kernels_.rms_norm(x, step.norm, program_->geometry.eps, k, mine.norm.data());
    return static_cast<const float*>(mine.norm.data());
  };
  const bool alone = fine == 1 && coarse == 0;  // cheaper done by every thread than met for
  Activations& x = alone ? mine.own : shared_;
  if (alone) {
    kernels_.fine(input(rows.fine[0]), k, four, eight, x.fine()[0]);
  } else {
    Coarse target = shared_.coarse;
    target.m = coarse, target.k = k, target.group = step.group;
    bool scaled_rows = false, blocks = false;
    for (const Weight& w : step.weights) (w.block ? blocks : scaled_rows) = true;
    // Single fine rows, then coarse ones a few at a time.
    const int together = std::max(kernels_.tokens, coarse > 8 * kTogether ? kTogether : 1);
    for (int taken; (taken = pool_.take()) < fine + (coarse + together - 1) / together;) {
      if (taken < fine) {
        kernels_.fine(input(rows.fine[taken]), k, four, eight, x.fine()[taken]);
        continue;
      }
      const int first = (taken - fine) * together;
      for (int i = first; i < std::min(first + together, coarse); i++)
        kernels_.coarse(input(rows.coarse[i]), i, scaled_rows, blocks, target);
    }
    pool_.meet();
  }
  const bool pairs = step.gated >= 0;
  const int count = pairs ? 1 : int(step.weights.size()), threads = pool_.threads();
  size_t bytes = 0;  // that a thread takes at once: enough to read in a stream, few enough to end together
  for (const Weight& w : step.weights) bytes += w.n * w.row_bytes();
  bytes = std::min(kMostBytes, std::max(kLeastBytes, bytes / (threads * 32))) / (pairs ? 2 : 1);
  const auto chunk_width = [&](int w) {
    const size_t channels = round_up(bytes / step.weights[w].row_bytes() + 1, 16);
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

int Engine::length(int slot) {
  check_slot(slot);
  return cache_.length(slot);
}

void Engine::copy(int source, int target, int n) {
  check_slot(source), check_slot(target);
  require<SpanError>(n >= 0 && n <= cache_.length(source), "slot ", source, ": ", n, " positions of ", cache_.length(source));
  cache_.copy(source, target, n);
}

size_t Engine::read_bytes(int slot, int start, int stop) {
  check_slot(slot);
  require<SpanError>(start >= 0 && start <= stop && stop <= cache_.length(slot), "slot ", slot, ": positions ", start, " to ",
                     stop, " of ", cache_.length(slot));
  return cache_.bytes(stop - start);
}

void Engine::read(int slot, int start, int stop, uint8_t* out) {
  read_bytes(slot, start, stop);
  cache_.read(slot, start, stop, out);
}

void Engine::write(int slot, int start, int stop, const uint8_t* data, size_t bytes) {
  check_slot(slot);
  require<SpanError>(start >= 0 && start <= cache_.length(slot) && start <= stop && stop <= cache_.context(), "slot ", slot,
                     ": positions ", start, " to ", stop, " over ", cache_.length(slot), " of ", cache_.context());
  require<SpanError>(bytes == cache_.bytes(stop - start), "slot ", slot, ": ", bytes, " bytes for ", stop - start,
                     " positions; expected ", cache_.bytes(stop - start));
  cache_.write(slot, start, stop, data);
}

}  // namespace headrace
