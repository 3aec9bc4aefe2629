// float32 <-> bfloat16 / float16, round to nearest even, by integer arithmetic that vectorises.
#pragma once

#include "normal.h"

// The element types a tensor may have; equal to DTYPES in fastdiff/ops/_native.py.
enum FdDtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

FD_INLINE float fd_from_bf16(uint16_t x) { return fd_as_float(static_cast<uint32_t>(x) << 16); }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
// one instruction on the device, and the same rounding; only the payload of a NaN differs
FD_INLINE uint16_t fd_to_bf16(float x) {
  uint16_t y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

FD_INLINE float fd_from_f16(uint16_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

FD_INLINE uint16_t fd_to_f16(float x) {
  uint16_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
#else
FD_INLINE uint16_t fd_to_bf16(float x) {
  const uint32_t u = fd_as_uint(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
}

FD_INLINE float fd_from_f16(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
  const uint32_t magnitude = x & 0x7fffu;
  // normal and subnormal alike: place the bits as a float with a small exponent, then scale by
  // an exact power of two; infinities and NaN keep an all-ones exponent
  const float scaled = fd_as_float(magnitude << 13) * fd_as_float(0x77800000u);
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return fd_as_float(fd_as_uint(scaled) | special | sign);
}

FD_INLINE uint16_t fd_to_f16(float x) {
  const uint32_t u = fd_as_uint(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  // subnormal results: adding 0.5 lines the mantissa up so that float addition does the rounding
  const uint32_t subnormal = fd_as_uint(fd_as_float(a) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  uint32_t h = a < 0x38800000u ? subnormal : normal;
  h = a >= 0x477ff000u ? 0x7c00u : h;
  h = a > 0x7f800000u ? 0x7e00u | ((a >> 13) & 0x3ffu) : h;
  return static_cast<uint16_t>(h | sign);
}
#endif
