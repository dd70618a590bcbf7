// Memory aligned to cache lines that only grows, so that a call of a size seen before allocates nothing.
#pragma once
#include <cstdlib>
#include <new>

#include "kernels.h"

namespace headrace {

template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr, other.size_ = 0; }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  void grow(size_t n) {  // what it held is lost
    if (n <= size_) return;
    std::free(data_);
    size_ = 0;
    data_ = static_cast<T*>(std::aligned_alloc(64, round_up(n * sizeof(T), 64)));
    if (!data_) throw std::bad_alloc();
    size_ = n;
  }
  T* data() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace headrace
