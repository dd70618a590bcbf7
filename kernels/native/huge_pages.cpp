#include "huge_pages.h"

#if defined(__linux__)
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

namespace headrace {
namespace {

constexpr size_t kSpare = size_t(512) << 20;  // memory that stays available to others

// Bytes that the system can give without swapping; 0 when it does not say.
size_t available_memory() {
  std::FILE* file = std::fopen("/proc/meminfo", "re");
  if (!file) return 0;
  char line[128];
  unsigned long long kilobytes = 0;
  while (std::fgets(line, sizeof line, file) && std::sscanf(line, "MemAvailable: %llu kB", &kilobytes) != 1) {}
  std::fclose(file);
  return size_t(kilobytes) << 10;
}

// Whether programs may ask for huge pages.
bool allowed() {
  std::FILE* file = std::fopen("/sys/kernel/mm/transparent_hugepage/enabled", "re");
  if (!file) return false;
  char line[128] = "";
  const bool read = std::fgets(line, sizeof line, file) != nullptr;
  std::fclose(file);
  return read && !std::strstr(line, "[never]");
}

// Whether a stretch is mapped as a huge page: ioctl PAGEMAP_SCAN (Linux 6.7; older systems do not map files so on their own).
bool is_huge(const uint8_t* at) {
  struct Scan {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, any_of, returned;
  };
  struct Region {
    uint64_t start, end, categories;
  };
  constexpr uint64_t kIsHuge = 1 << 6;  // PAGE_IS_HUGE
  constexpr unsigned long kScan = _IOWR('f', 16, Scan);
  (void)*static_cast<const volatile uint8_t*>(at);  // not mapped before it is touched
  const int pages = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (pages < 0) return false;
  Region region{};
  Scan scan{};
  scan.size = sizeof scan, scan.start = uint64_t(at), scan.end = scan.start + kHugePage;
  scan.vec = uint64_t(&region), scan.vec_len = 1, scan.mask = kIsHuge, scan.returned = kIsHuge;
  const bool found = ioctl(pages, kScan, &scan) == 1 && region.start == scan.start && region.end == scan.end;
  close(pages);
  return found;
}

bool copy_to_huge_page(uint8_t* at) {
  void* room = mmap(nullptr, 2 * kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (room == MAP_FAILED) return false;
  auto* from = static_cast<uint8_t*>(room);
  uint8_t* copy = from + (kHugePage - reinterpret_cast<uintptr_t>(from) % kHugePage) % kHugePage;
  uint8_t *behind = copy + kHugePage, *end = from + 2 * kHugePage;
  if (copy > from) munmap(from, size_t(copy - from));
  if (behind < end) munmap(behind, size_t(end - behind));
  bool moved = false;
  if (madvise(copy, kHugePage, MADV_HUGEPAGE) == 0) {
    std::memcpy(copy, at, kHugePage);
    moved = mprotect(copy, kHugePage, PROT_READ) == 0 &&
            mremap(copy, kHugePage, kHugePage, MREMAP_MAYMOVE | MREMAP_FIXED, at) != MAP_FAILED;
  }
  if (!moved) munmap(copy, kHugePage);
  return moved;
}

}  // namespace

void HugePages::look_for(const std::vector<Mapping>& files) {
  size_t bytes = 0;
  for (const Mapping& file : files) bytes += file.size();
  if (!allowed() || available_memory() < bytes + kSpare) return;
  for (const Mapping& file : files)
    for (size_t from = 0; from + kHugePage <= file.size(); from += kHugePage) places_.push_back(file.place() + from);
}

void HugePages::move_next() {
  const size_t number = next_.fetch_add(1, std::memory_order_relaxed);
  if (number >= places_.size() || is_huge(places_[number])) return;
  if (copy_to_huge_page(places_[number])) copied_.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace headrace

#else

namespace headrace {

void HugePages::look_for(const std::vector<Mapping>&) {}
void HugePages::move_next() {}

}  // namespace headrace

#endif
