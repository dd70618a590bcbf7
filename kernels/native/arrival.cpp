#include "arrival.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <system_error>

namespace headrace {
namespace {

constexpr size_t kAtOnce = size_t(1) << 20;  // bytes between two looks at whether it shall end

void map_pages(const uint8_t* from, const uint8_t* to, size_t page) {
#ifdef __linux__
  constexpr int kPopulateRead = 22;  // MADV_POPULATE_READ of Linux 5.14, which older headers lack
  if (madvise(const_cast<uint8_t*>(from), size_t(to - from), kPopulateRead) == 0) return;
#endif
  for (const uint8_t* at = from; at < to; at += page) (void)*static_cast<const volatile uint8_t*>(at);
}

}  // namespace

void Arrival::begin(std::vector<Stretch> stretches) {
  try {
    thread_ = std::thread([this, all = std::move(stretches)] { bring(all); });
  } catch (const std::system_error&) {  // the system starts no more threads; pages then come as they are read
  }
}

void Arrival::end() {
  over_.store(true);
  if (thread_.joinable()) thread_.join();
}

void Arrival::bring(const std::vector<Stretch>& stretches) {
  const auto page = size_t(sysconf(_SC_PAGESIZE));
  for (const auto& [data, bytes] : stretches) {
    const uint8_t* end = data + bytes;
    for (const uint8_t* at = data - uintptr_t(data) % page; at < end; at += kAtOnce) {
      if (over_.load(std::memory_order_relaxed)) return;
      map_pages(at, std::min(at + kAtOnce, end), page);
    }
  }
}

}  // namespace headrace
