// Loads and stores of a run of elements in the tensor's own type.
#pragma once

#include "../half.h"

#include <cstdint>

namespace fd {
namespace FD_ISA {
namespace {

// Elements [at, at + n) of `from` as float32: the tensor's own memory where that is its type,
// else converted into `scratch`.
inline const float* load_as_float(const void* from, int dtype, int64_t at, int64_t n,
                                  float* scratch) {
  if (dtype == kFloat32) return static_cast<const float*>(from) + at;
  const uint16_t* p = static_cast<const uint16_t*>(from) + at;
  if (dtype == kBFloat16) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) scratch[i] = fd_from_bf16(p[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) scratch[i] = fd_from_f16(p[i]);
  }
  return scratch;
}

inline void store_as(const float* from, int dtype, void* to, int64_t at, int64_t n) {
  if (dtype == kFloat32) {
    float* p = static_cast<float*>(to) + at;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) p[i] = from[i];
    return;
  }
  uint16_t* p = static_cast<uint16_t*>(to) + at;
  if (dtype == kBFloat16) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) p[i] = fd_to_bf16(from[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) p[i] = fd_to_f16(from[i]);
  }
}

}  // namespace
}  // namespace FD_ISA
}  // namespace fd
