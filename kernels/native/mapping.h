// A file mapped read-only, for as long as the object lives.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace headrace {

class Mapping {
 public:
  explicit Mapping(const std::string& path);  // raises ProgramError
  Mapping(Mapping&& other) noexcept;
  Mapping(const Mapping&) = delete;
  ~Mapping();
  const uint8_t* data() const { return data_; }
  uint8_t* place() const { return data_; }  // for huge_pages.h, which puts other pages of the same content there
  size_t size() const { return size_; }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace headrace
