// What the standard library has, but as templates that every instruction set would instantiate under
// one name: the linker keeps one of them, and a CPU without its instructions would run it.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace fd {
namespace FD_ISA {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

template <class T>
inline void fill(T* from, T* to, T value) {
  for (; from < to; ++from) *from = value;
}

// Memory that a thread keeps from call to call, from the start of a cache line, so that no vector
// in it lies across two.
struct Kept {
  void* data = nullptr;
  size_t bytes = 0;

  ~Kept() { std::free(data); }

  void* room(size_t wanted) {
    if (wanted > bytes) {
      std::free(data);
      bytes = (wanted + 63) / 64 * 64;
      data = std::aligned_alloc(64, bytes);
      if (!data) std::abort();  // no exception leaves a parallel region
    }
    return data;
  }
};

template <class T>
inline T* scratch(size_t count) {
  static thread_local Kept kept;
  return static_cast<T*>(kept.room(count * sizeof(T)));
}

}  // namespace
}  // namespace FD_ISA
}  // namespace fd
