#include "mapping.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "error.h"

namespace headrace {

Mapping::Mapping(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  require<ProgramError>(file >= 0, "cannot open ", path, ": ", std::strerror(errno));
  struct stat status;
  void* at = MAP_FAILED;
  if (fstat(file, &status) == 0 && status.st_size > 0) {
    size_ = size_t(status.st_size);
    at = mmap(nullptr, size_, PROT_READ, MAP_SHARED, file, 0);
  }
  const int reason = errno;
  close(file);
  require<ProgramError>(at != MAP_FAILED, "cannot map ", path, ": ", size_ ? std::strerror(reason) : "it is empty");
  data_ = static_cast<const uint8_t*>(at);
}

Mapping::Mapping(Mapping&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr; }

Mapping::~Mapping() {
  if (data_) munmap(const_cast<uint8_t*>(data_), size_);
}

}  // namespace headrace
