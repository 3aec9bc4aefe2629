// A vector of floats as wide as the instruction set has it, with loads and stores that convert.
//
// The operators are the compiler's own on vector types: a * b + c is one instruction, where there is
// one, in a source that is compiled with contraction on, and two roundings in one without.
#pragma once

#include "../half.h"

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace fd {
namespace FD_ISA {
namespace {

// vec_silu_scaled(t) is y / (1 + exp(-y)) for t = -y log2(e): who has y as x slope + offset has t as
// cheaply. With every constant of the exponential scaled alike it is t / (-log2(e) (1 + 2^t)). To
// 3 ulp of float32 above y = -5, where the rounding of t itself begins to show; with kFast to 2^-13.
constexpr double kSiluScale = -1.4426950408889634;

#ifdef __AVX512F__

constexpr int kWidth = 16;
using Vec = __m512;

inline Vec vec_set(float x) { return _mm512_set1_ps(x); }

inline __mmask16 vec_first(int n) { return static_cast<__mmask16>((1u << n) - 1); }

// Elements [at, at + 16) of `from`, whose type is `D`; with `n`, the first n and zeros.
template <int D>
inline Vec vec_load(const void* from, int64_t at, int n = kWidth) {
  const __mmask16 mask = vec_first(n);
  if (D == kFloat32) {
    const float* p = static_cast<const float*>(from) + at;
    return n == kWidth ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(mask, p);
  }
  const uint16_t* p = static_cast<const uint16_t*>(from) + at;
  const __m256i half = n == kWidth ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                                   : _mm256_maskz_loadu_epi16(mask, p);
  if (D == kFloat16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// NaN passes through
inline Vec vec_clamp(Vec v, float bound) {
  return _mm512_min_ps(vec_set(bound), _mm512_max_ps(vec_set(-bound), v));
}

inline __m256i vec_to_bf16(Vec v) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i u = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff));
  const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, quiet), 16));
#endif
}

template <int D>
inline void vec_store(Vec v, void* to, int64_t at, int n = kWidth) {
  const __mmask16 mask = vec_first(n);
  if (D == kFloat32) {
    float* p = static_cast<float*>(to) + at;
    if (n == kWidth)
      _mm512_storeu_ps(p, v);
    else
      _mm512_mask_storeu_ps(p, mask, v);
    return;
  }
  uint16_t* p = static_cast<uint16_t*>(to) + at;
  const __m256i half =
      D == kFloat16 ? _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT) : vec_to_bf16(v);
  if (n == kWidth)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
  else
    _mm256_mask_storeu_epi16(p, mask, half);
}

// Past the caches, to a multiple of the size of what is written.
template <int D>
inline void vec_stream(Vec v, void* to, int64_t at) {
  if (D == kFloat32) {
    _mm512_stream_ps(static_cast<float*>(to) + at, v);
    return;
  }
  const __m256i half =
      D == kFloat16 ? _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT) : vec_to_bf16(v);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(to) + at), half);
}

inline void vec_stream_end() { _mm_sfence(); }  // another thread may read it next

template <bool kFast>
inline Vec vec_silu_scaled(Vec t) {
  const Vec f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF);  // t - floor(t)
  if (kFast) {
    const Vec p = ((f * -0.11256559f - 0.32614598f) * f - 1.0038756f) * f - 1.4425871f;
    return t * _mm512_rcp14_ps(_mm512_scalef_ps(p, t) - 1.442695f);
  }
  const Vec p = ((((f * -0.0027087706f - 0.012968876f) * f - 0.08054035f) * f - 0.34646842f) * f -
                 1.0000086f) * f - 1.4426949f;
  // finite, since the step below would take 0 times infinity; NaN passes through
  const Vec d = _mm512_max_ps(vec_set(-1e38f), _mm512_scalef_ps(p, t) - 1.442695f);
  const Vec r = _mm512_rcp14_ps(d);  // a division takes as long as six products
  return t * (r + r * (1.0f - d * r));
}

#ifdef __AVX512BF16__
// 32 neighbouring bf16 as the even and the odd ones of them.
inline void load_pairs(const uint16_t* from, Vec& even, Vec& odd) {
  const __m512i both = _mm512_loadu_si512(from);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

// Past the caches where `kStream`, to the start of a cache line.
template <bool kStream>
inline void store_pairs(uint16_t* to, Vec even, Vec odd) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
  const __m512i ordered = _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves);
  if (kStream)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), ordered);
  else
    _mm512_storeu_si512(to, ordered);
}

// 32 floats in the order of load_pairs.
inline void separate(float* values) {
  alignas(64) static constexpr int32_t kEven[16] = {0,  2,  4,  6,  8,  10, 12, 14,
                                                    16, 18, 20, 22, 24, 26, 28, 30};
  const __m512i even = _mm512_load_si512(kEven), odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const Vec low = _mm512_loadu_ps(values), high = _mm512_loadu_ps(values + 16);
  _mm512_storeu_ps(values, _mm512_permutex2var_ps(low, even, high));
  _mm512_storeu_ps(values + 16, _mm512_permutex2var_ps(low, odd, high));
}
#endif

inline float vec_sum(Vec v) { return _mm512_reduce_add_ps(v); }

#else

constexpr int kWidth = 8;
typedef float Vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t VecInt __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t VecUint __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t VecHalf __attribute__((vector_size(16), aligned(2), may_alias));

inline Vec vec_set(float x) { return Vec{x, x, x, x, x, x, x, x}; }

template <int D>
inline Vec vec_load(const void* from, int64_t at, int n = kWidth) {
  if (D == kFloat32) {
    const float* p = static_cast<const float*>(from) + at;
    if (n == kWidth) return *reinterpret_cast<const Vec*>(p);
    Vec v{};
    std::memcpy(&v, p, n * sizeof(float));
    return v;
  }
  VecHalf h{};
  std::memcpy(&h, static_cast<const uint16_t*>(from) + at, n * sizeof(uint16_t));
  if (D == kBFloat16) return (Vec)(__builtin_convertvector(h, VecUint) << 16);
  Vec v{};
  for (int i = 0; i < kWidth; ++i) v[i] = fd_from_f16(h[i]);
  return v;
}

template <int D>
inline void vec_store(Vec v, void* to, int64_t at, int n = kWidth) {
  if (D == kFloat32) {
    float* p = static_cast<float*>(to) + at;
    if (n == kWidth)
      *reinterpret_cast<Vec*>(p) = v;
    else
      std::memcpy(p, &v, n * sizeof(float));
    return;
  }
  VecHalf h{};
  if (D == kBFloat16) {
    const VecUint u = (VecUint)v;
    const VecUint up = u + 0x7fffu + ((u >> 16) & 1u);
    const VecUint nan = (VecUint)(v != v);
    h = __builtin_convertvector(((nan & (u | 0x400000u)) | (~nan & up)) >> 16, VecHalf);
  } else {
    for (int i = 0; i < kWidth; ++i) h[i] = fd_to_f16(v[i]);
  }
  std::memcpy(static_cast<uint16_t*>(to) + at, &h, n * sizeof(uint16_t));
}

template <int D>
inline void vec_stream(Vec v, void* to, int64_t at) {
  vec_store<D>(v, to, at);
}

inline void vec_stream_end() {}

// NaN passes through
inline Vec vec_clamp(Vec v, float bound) {
  const Vec low = v < -bound ? vec_set(-bound) : v;
  return low > bound ? vec_set(bound) : low;
}

// 2^r p for an integral r in [-252, 252]
inline Vec vec_scale(Vec p, Vec r) {
  const VecInt all = __builtin_convertvector(r, VecInt), half = all >> 1;
  return p * (Vec)((half + 127) << 23) * (Vec)((all - half + 127) << 23);
}

template <bool>
inline Vec vec_silu_scaled(Vec t) {
  const Vec kept = vec_clamp(t, 200.0f);
  const Vec r = (kept + 12582912.0f) - 12582912.0f, f = kept - r;  // 1.5 * 2^23 rounds
  const Vec p = ((((f * -0.00191539f - 0.013958855f) * f - 0.08007986f) * f - 0.34656593f) * f -
                 0.99999964f) * f - 1.4426951f;
  return t / (vec_scale(p, r) - 1.442695f);
}

inline float vec_sum(Vec v) {
  float sum = 0.0f;
  for (int i = 0; i < kWidth; ++i) sum += v[i];
  return sum;
}

#endif

}  // namespace
}  // namespace FD_ISA
}  // namespace fd
