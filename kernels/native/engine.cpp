// Calls: what is asked is checked and planned, threads go through the steps, slots are read and written.
#include <algorithm>
#include <chrono>

#include "error.h"
#include "scratch.h"

namespace headrace {
namespace {

constexpr double kSettled = 1, kShare = 0.1;  // seconds of work before weights are copied; share of the time afterwards

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

Engine::Engine(std::unique_ptr<Program> program, int slots, int context, int threads, const Kernels& kernels, bool fuse, Settle settle)
    : program_(std::move(program)), kernels_(kernels), steps_(compile(*program_, fuse)),
      cache_(program_->geometry, program_->int8, program_->scales, slots, context, kernels), pool_(threads, [this] { return settle_aside(); }) {
  // An odd number of cache lines, so that the rows of a column do not all fall into one set of the cache.
  for (const int width : program_->registers) strides_.push_back(round_up(width, 16) | 16);
  for (size_t i = 0; i < strides_.size(); i++) registers_.emplace_back();
  for (int i = 0; i < pool_.threads(); i++) {
    scratch_.push_back(std::make_unique<Scratch>());
    scratch_[i]->number = i;
  }
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
      if (w.high) weights.emplace_back(w.high, w.n * w.high_bytes());
      weights.emplace_back(reinterpret_cast<const uint8_t*>(w.scale), size_t(w.n) * w.scales() * sizeof *w.scale);
      if (w.factors) weights.emplace_back(w.factors, w.n * w.factor_bytes());
    }
  arrival_.begin(std::move(weights));
}

Engine::~Engine() = default;

// Weights are copied into huge pages while nobody waits, and where runs follow each other closely, bit by bit between two of them.
// Whoever runs the engine for a short answer alone pays nothing.
bool Engine::settle_aside() {
  if (busy_.load(std::memory_order_acquire) < kSettled || !huge_pages_.more()) return false;
  huge_pages_.move_next();
  return true;
}

void Engine::settle() {
  if (!huge_pages_.more() || busy_.load(std::memory_order_relaxed) < kSettled || allowance_ <= 0) return;
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
  const double taken = now() - start;
  busy_.store(busy_.load(std::memory_order_relaxed) + taken, std::memory_order_release);
  allowance_ += kShare * taken;
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
  int fine = 0, coarse = 0, own = 1, widest = 1;
  for (const Step& s : steps_) {
    if (s.linear.weights.empty()) continue;
    const Rows& of = rows_of(s.linear);
    fine = std::max(fine, int(of.fine.size())), coarse = std::max(coarse, int(of.coarse.size()));
    if (alone(of, s.linear.weights[0].k)) own = std::max(own, int(of.fine.size()));
    widest = std::max(widest, s.linear.weights[0].k);
  }
  shared_.reserve(fine, coarse, widest);
  plan_attention();
  const Geometry& g = program_->geometry;
  const size_t queries = std::max<size_t>({size_t(kQueries), size_t(kShort) * g.group()});
  for (auto& s : scratch_) {
    s->own.reserve(own, 0, widest);
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
