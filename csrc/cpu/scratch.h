// How a kernel lays out the scratch that its caller allocates.
#pragma once

#include "vec.h"

namespace smartbird::SMARTBIRD_ISA {

// Hands out 64-byte aligned pieces of `base`; with a null base it only counts.
class ScratchAllocator {
 public:
  explicit ScratchAllocator(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(int64_t n) {
    char* p = base_ == nullptr ? nullptr : base_ + bytes_;
    bytes_ += ceil_div(n * static_cast<int64_t>(sizeof(T)), 64) * 64;
    return reinterpret_cast<T*>(p);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

}  // namespace smartbird::SMARTBIRD_ISA
