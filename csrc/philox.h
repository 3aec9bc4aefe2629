// Philox4x32-10: the counter-based generator behind every random number of fastdiff.
//
// Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
// Only 32-bit integer operations, so the words are the same on every machine. Host and device.
//
//   key     = the 64-bit seed of one sample (low word, high word)
//   counter = (block low, block high, step, stream), block = element_index / 4
#pragma once

#ifndef __CUDACC_RTC__
#include <cstdint>
#else
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#endif

#ifdef __CUDACC__
#define FD_INLINE static __host__ __device__ __forceinline__
#else
// static, not inline: each instruction set keeps its own copy, so the linker cannot hand an
// AVX-512 body to a caller that was chosen for a CPU without it.
#define FD_INLINE static inline __attribute__((always_inline))
#endif

FD_INLINE void fd_philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3,
                               uint32_t k0, uint32_t k1) {
  const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
  const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
  const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
  const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
  c1 = static_cast<uint32_t>(p1);
  c3 = static_cast<uint32_t>(p0);
  c0 = n0;
  c2 = n2;
}

// In place: (c0, c1, c2, c3) is the counter on entry and the four words on return.
FD_INLINE void fd_philox4x32_10(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3,
                                uint32_t k0, uint32_t k1) {
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    fd_philox_round(c0, c1, c2, c3, k0, k1);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}
