// Threads that run one function together and meet inside it.
//
// A thread that waits spins for a bounded time and then sleeps. Sleeping frees its processor, so that the system moves the
// thread that is waited for there, should another program have taken its own.
// Work inside a phase is taken from a counter, which the last thread to arrive at a meeting sets back.
// What nobody waits for is done between runs, in pieces, by a thread that would sleep otherwise.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace headrace {

class Pool {
 public:
  // threads: at most so many; where the system starts fewer, those do the work.
  // aside: does a piece of such work and says whether there is more; called by one thread at a time.
  Pool(int threads, std::function<bool()> aside);
  ~Pool();
  int threads() const { return threads_; }

  // Calls work(thread) on every thread, on the caller as thread 0; returns when all are done.
  void run(const std::function<void(int)>& work);

  // Waits until all threads have arrived. The counter is 0 afterwards.
  void meet();

  // The next piece of work of this phase: 0, 1, 2, …
  int take() { return next_.fetch_add(1, std::memory_order_relaxed); }

  int64_t meetings() const { return meetings_; }

 private:
  void serve(int thread);

  int threads_ = 1;
  const std::function<bool()> aside_;
  alignas(64) std::atomic<int> next_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> meeting_{0};
  alignas(64) std::atomic<uint32_t> job_{0};
  int64_t meetings_ = 0;
  bool stop_ = false;
  std::atomic<int> asleep_{0};  // in meetings
  int idle_ = 0;                // between runs
  const std::function<void(int)>* work_ = nullptr;
  std::mutex mutex_;
  std::condition_variable wake_, met_;
  std::vector<std::thread> workers_;
};

}  // namespace headrace
