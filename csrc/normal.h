// Box-Muller on polynomials: two Philox words in, two unit normals out, the same bits everywhere.
//
// Only 32-bit integer operations, int -> float conversions, mul, add and a correctly rounded
// sqrt; no libm, no division, no fused multiply-add. Build with contraction off
// (-ffp-contract=off, --fmad=false), or the promise of equal bits is void.
//
// Max error against exact Box-Muller on the same words: 3e-6 relative to the radius for
// r > 0.1, 7.1e-5 absolute (all of it at r ~ 3e-4). Largest |z|: sqrt(64 ln 2) = 6.66.
#pragma once

#include "philox.h"

#ifdef __CUDA_ARCH__
FD_INLINE float fd_sqrt(float x) { return __fsqrt_rn(x); }
FD_INLINE float fd_as_float(uint32_t x) { return __uint_as_float(x); }
FD_INLINE uint32_t fd_as_uint(float x) { return __float_as_uint(x); }
#else
#ifndef __CUDACC_RTC__
// not std::sqrt: csrc/cpu/scratch.h says why
FD_INLINE float fd_sqrt(float x) { return __builtin_sqrtf(x); }
#else
FD_INLINE float fd_sqrt(float x) { return sqrtf(x); }
#endif
FD_INLINE float fd_as_float(uint32_t x) {
  float y;
  __builtin_memcpy(&y, &x, 4);
  return y;
}
FD_INLINE uint32_t fd_as_uint(float x) {
  uint32_t y;
  __builtin_memcpy(&y, &x, 4);
  return y;
}
#endif

// sqrt(-2 ln(u / 2^31)) for u = (word >> 1) + 1/2: u is split as 2^e (1 + f) with
// 1 + f in [sqrt(1/2), sqrt(2)), and ln(1 + f) = -f Q(f) / 2.
FD_INLINE float fd_radius(uint32_t word) {
  const float u = static_cast<float>(static_cast<int32_t>(word >> 1)) + 0.5f;
  const int32_t t = static_cast<int32_t>(fd_as_uint(u)) - 0x3f3504f3;
  const int32_t e = t >> 23;
  const float f = fd_as_float(static_cast<uint32_t>((t & 0x7fffff) + 0x3f3504f3)) - 1.0f;
  float q = 0.2016475796699524f;
  q = q * f + -0.3236100375652313f;
  q = q * f + 0.34486448764801025f;
  q = q * f + -0.3981376588344574f;
  q = q * f + 0.4994245767593384f;
  q = q * f + -0.6666942834854126f;
  q = q * f + 1.0000064373016357f;
  q = q * f + -2.0f;
  return fd_sqrt(static_cast<float>(31 - e) * 1.3862943649291992f + f * q);
}

// cos and sin of 2 pi word / 2^32: the nearest quarter turn by integer arithmetic, the rest of
// the angle, pi/4 x with x in [-1, 1), by polynomials.
FD_INLINE void fd_unit_circle(uint32_t word, float& cosine, float& sine) {
  const float x = static_cast<float>(static_cast<int32_t>(word << 2)) * 4.656612873077393e-10f;
  const float x2 = x * x;
  float s = -3.59504520019982e-05f;
  s = s * x2 + 0.00249000103212893f;
  s = s * x2 + -0.08074543625116348f;
  s = s * x2 + 0.7853981852531433f;
  s = s * x;
  float c = -0.00031902003684081137f;
  c = c * x2 + 0.01585020124912262f;
  c = c * x2 + -0.3084244132041931f;
  c = c * x2 + 1.0f;
  // quadrant = (word + 2^29) >> 30; its bits are read where they stand
  const uint32_t near = word + 0x20000000u;
  const bool swap = (near & 0x40000000u) != 0u;
  const uint32_t cos_sign = (near + 0x40000000u) & 0x80000000u;
  const uint32_t sin_sign = near & 0x80000000u;
  cosine = fd_as_float(fd_as_uint(swap ? s : c) ^ cos_sign);
  sine = fd_as_float(fd_as_uint(swap ? c : s) ^ sin_sign);
}

// Two words to two normals: the first sets the radius, the second the angle.
FD_INLINE void fd_box_muller(uint32_t a, uint32_t b, float& z0, float& z1) {
  float c, s;
  fd_unit_circle(b, c, s);
  const float r = fd_radius(a);
  z0 = r * c;
  z1 = r * s;
}

// The four normals of elements 4*block .. 4*block+3 of one sample.
FD_INLINE void fd_normal4(uint64_t seed, uint32_t stream, uint32_t step, uint64_t block, float& z0,
                          float& z1, float& z2, float& z3) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = step, c3 = stream;
  fd_philox4x32_10(c0, c1, c2, c3, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  fd_box_muller(c0, c1, z0, z1);
  fd_box_muller(c2, c3, z2, z3);
}
