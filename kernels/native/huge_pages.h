// Weights in huge pages: memory in pages of 2 MB is read up to half again as fast as a mapped file in pages of 4 KB, because
// prefetchers stop at the end of a page. A system with large pieces in its page cache maps files so by itself (mapping.cpp).
// What it does not is copied here, a huge page at a time, to the same address: pointers stay, also those being read.
// The file's own pages leave the process as the copies come, so that its memory in use stays the same.
#pragma once
#include <atomic>
#include <vector>

#include "mapping.h"

namespace headrace {

constexpr size_t kHugePage = 2 << 20;

class HugePages {
 public:
  // All of the files, unless the system has no huge pages or too little memory.
  void look_for(const std::vector<Mapping>& files);

  // Whether there is a stretch that was not looked at.
  bool more() const { return next_.load(std::memory_order_relaxed) < places_.size(); }
  // Looks at the next stretch; several threads may call it together.
  void move_next();
  size_t copied() const { return copied_.load(std::memory_order_relaxed); }  // huge pages

 private:
  std::vector<uint8_t*> places_;  // of whole stretches of kHugePage
  std::atomic<size_t> next_{0}, copied_{0};
};

}  // namespace headrace
