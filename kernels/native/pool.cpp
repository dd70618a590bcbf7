#include "pool.h"

#include <chrono>
#include <exception>
#include <utility>

namespace headrace {
namespace {

constexpr int kSpins = 400;    // looks before a waiting thread offers its processor to others, about 5 to 10 us
constexpr int kYields = 100;   // offers before it sleeps; where nobody else wants the processor, about 50 us
constexpr auto kAwake = std::chrono::milliseconds(2);  // how long a worker looks for the next run before it sleeps

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

Pool::Pool(int threads, std::function<bool()> aside) : aside_(std::move(aside)) {
  try {
    workers_.reserve(threads - 1);
    for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { serve(i); });
  } catch (const std::exception&) {  // the system starts no more of them
  }
  threads_ = int(workers_.size()) + 1;
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    job_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::run(const std::function<void(int)>& work) {
  next_.store(0, std::memory_order_relaxed);
  meetings_ = 0;
  bool sleepers;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    work_ = &work;
    job_.fetch_add(1, std::memory_order_release);
    sleepers = idle_ > 0;
  }
  if (sleepers) wake_.notify_all();
  work(0);
  meet();  // nobody is inside work any more
}

void Pool::meet() {
  if (threads_ == 1) {
    next_.store(0, std::memory_order_relaxed);
    meetings_++;
    return;
  }
  const uint32_t now = meeting_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    next_.store(0, std::memory_order_relaxed);
    meetings_++;
    // In one order with asleep_: either a sleeper sees that the meeting is over, or it is seen here.
    meeting_.store(now + 1, std::memory_order_seq_cst);
    if (asleep_.load(std::memory_order_seq_cst) > 0) {
      { std::lock_guard<std::mutex> lock(mutex_); }
      met_.notify_all();
    }
    return;
  }
  for (int looks = 0; looks < kSpins + kYields; looks++) {
    if (meeting_.load(std::memory_order_acquire) != now) return;
    if (looks < kSpins) pause();
    else std::this_thread::yield();  // perhaps the thread that is waited for stands behind this one
  }
  std::unique_lock<std::mutex> lock(mutex_);
  asleep_.fetch_add(1, std::memory_order_seq_cst);
  met_.wait(lock, [&] { return meeting_.load(std::memory_order_seq_cst) != now; });
  asleep_.fetch_sub(1, std::memory_order_relaxed);
}

void Pool::serve(int thread) {
  uint32_t seen = 0;
  for (;;) {
    const auto until = std::chrono::steady_clock::now() + kAwake;
    for (int looks = 0; job_.load(std::memory_order_acquire) == seen; looks++) {
      if (looks < kSpins) {
        pause();
        continue;
      }
      std::this_thread::yield();
      if (std::chrono::steady_clock::now() < until) continue;
      if (thread == 1 && aside_()) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      idle_++;
      wake_.wait(lock, [&] { return job_.load(std::memory_order_acquire) != seen; });
      idle_--;
    }
    seen++;
    if (stop_) return;
    (*work_)(thread);
    meet();
  }
}

}  // namespace headrace
