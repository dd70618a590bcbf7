// The engine: a compiled program, its caches and its threads; runs a ragged batch of spans.
#pragma once
#include <atomic>
#include <memory>
#include <vector>

#include "activations.h"
#include "arrival.h"
#include "buffer.h"
#include "cache.h"
#include "compile.h"
#include "huge_pages.h"
#include "pool.h"

namespace headrace {

// A stretch of one sequence: n tokens at positions start …, over what the slot holds before; wanted: rows within the span.
struct Span {
  int slot, start, n;
  const int32_t* ids;
  int wanted_count;
  const int32_t* wanted;
};

// A piece of a layer's attention: the queries of `tokens` tokens (and of all query heads of one key head) against
// positions begin … end. Pieces of one span and head that split its positions are merged by whoever is last.
struct Piece {
  int span, head, first, tokens, begin, end;
  int part, parts, merge;  // merge: number of the first part
};

// When weights are copied into huge pages: when the engine is made; bit by bit, once it has run for a while; never.
enum class Settle { kAtOnce, kLater, kNever };

class Engine {
 public:
  Engine(std::unique_ptr<Program> program, int slots, int context, int threads, const Kernels& kernels, bool fuse, Settle settle);
  ~Engine();

  // Logits (wanted rows of all spans, vocab). Raises SpanError, Cancelled.
  void run(const std::vector<Span>& spans, float* logits);
  void cancel() { cancelled_.store(true); }

  int length(int slot);
  void copy(int source, int target, int n);
  size_t read_bytes(int slot, int start, int stop);
  void read(int slot, int start, int stop, uint8_t* out);
  void write(int slot, int start, int stop, const uint8_t* data, size_t bytes);

  const Kernels& kernels() const { return kernels_; }
  const Pool& pool() const { return pool_; }
  int slots() const { return cache_.slots(); }
  int context() const { return cache_.context(); }
  size_t copied() const { return huge_pages_.copied() * kHugePage; }  // bytes
  int vocab() const { return program_->geometry.vocab; }
  int64_t runs = 0, tokens = 0, meetings = 0;
  double seconds[kKinds] = {};

 private:
  struct Scratch;  // what a thread has for itself

  void settle();
  bool settle_aside();
  void check(const std::vector<Span>& spans) const;
  void check_slot(int slot) const;
  void prepare(const std::vector<Span>& spans, float* logits);
  void plan_attention();
  void work(int thread);
  void execute(const Step& step, Scratch& mine);
  void embed(const Step& step);
  void elementwise(const Step& step);
  void rope(const Step& step, Scratch& mine);
  void attention(const Step& step, Scratch& mine);
  void piece(const Step& step, const Piece& p, const Piece* next, Scratch& mine);
  const Rows& rows_of(const LinearStep& step) const;
  void linear(const LinearStep& step, Scratch& mine);
  template <class Run> void finish(const LinearStep& step, const int* rows, int count, int weight, int begin, int end,
                                   Scratch& mine, Run run);
  float* row(int r, int i) const { return registers_[r].data() + size_t(i) * strides_[r]; }

  std::unique_ptr<Program> program_;
  const Kernels& kernels_;
  const std::vector<Step> steps_;
  Cache cache_;
  HugePages huge_pages_;
  std::atomic<double> busy_{0};                     // seconds that runs took
  double allowance_ = 0;                            // seconds that copying may take
  Pool pool_;                                       // after what its threads use between runs
  std::vector<Buffer<float>> registers_;
  std::vector<size_t> strides_;

  // Of the call that runs.
  struct Batch {
    std::vector<Span> spans;
    std::vector<int> ids, slot, position;           // of each token
    std::vector<int> wanted;                        // the token of each wanted row
    Rows all, of_wanted;                            // for linears that have coarse activations
    Rows all_fine, wanted_fine;                     // for those that have not
    std::vector<Piece> pieces;
    int parts = 0;
    float* logits = nullptr;
  } batch_;
  Activations shared_;
  Buffer<float> parts_;                             // maxima, sums and values of pieces that are parts
  std::unique_ptr<std::atomic<int>[]> missing_;     // parts of each merge that are still to come
  int missing_size_ = 0;
  std::vector<std::unique_ptr<Scratch>> scratch_;

  std::atomic<bool> cancelled_{false};
  std::atomic<int64_t> stop_at_{0};
  Arrival arrival_;                                 // last, so that it ends before what it reads
};

}  // namespace headrace
