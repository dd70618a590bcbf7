#include "mapping.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "error.h"
#include "huge_pages.h"
#include "kernels.h"

namespace headrace {
namespace {

// At an address where huge pages of it can lie: a system whose page cache holds large pieces (Linux 5.18 with XFS, 6.16 with
// ext4) then reads and maps the file in them, and others take the advice for nothing.
void* map_aligned(int file, size_t size) {
  const size_t room = round_up(size, kHugePage) + kHugePage;
  void* space = mmap(nullptr, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (space == MAP_FAILED) return space;
  auto* from = static_cast<uint8_t*>(space);
  uint8_t* at = from + (kHugePage - reinterpret_cast<uintptr_t>(from) % kHugePage) % kHugePage;
  if (mmap(at, size, PROT_READ, MAP_SHARED | MAP_FIXED, file, 0) == MAP_FAILED) {
    const int reason = errno;
    munmap(space, room);
    errno = reason;
    return MAP_FAILED;
  }
  uint8_t* end = at + round_up(size, size_t(sysconf(_SC_PAGESIZE)));
  if (at > from) munmap(from, size_t(at - from));
  munmap(end, size_t(from + room - end));
#ifdef MADV_HUGEPAGE
  madvise(at, size, MADV_HUGEPAGE);
#endif
  return at;
}

}  // namespace

Mapping::Mapping(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  require<ProgramError>(file >= 0, "cannot open ", path, ": ", std::strerror(errno));
  struct stat status;
  void* at = MAP_FAILED;
  if (fstat(file, &status) == 0 && status.st_size > 0) {
    size_ = size_t(status.st_size);
    at = map_aligned(file, size_);
  }
  const int reason = errno;
  close(file);
  require<ProgramError>(at != MAP_FAILED, "cannot map ", path, ": ", size_ ? std::strerror(reason) : "it is empty");
  data_ = static_cast<uint8_t*>(at);
}

Mapping::Mapping(Mapping&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr; }

Mapping::~Mapping() {
  if (data_) munmap(data_, size_);
}

}  // namespace headrace
