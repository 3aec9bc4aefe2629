// Counter noise into a scratch buffer, vectorised over blocks. Internal to one instruction set.
#pragma once

#include "../normal.h"

#include <cstdint>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace fd {
namespace FD_ISA {
namespace {

constexpr int kBatch = 16;              // blocks a batch: 64 normals
constexpr int kGroup = 16 * kBatch;     // blocks a group: 1,024 normals
using Words4 = uint32_t[4][kGroup];
using Normals4 = float[4][kGroup];

// Lane p of a batch works on block kBlockOf[p]: in this order the 4 x 4 transposes of
// `interleave` stay inside 128-bit lanes and their results come out in element order.
#if defined(__AVX512F__)
constexpr uint32_t kBlockOf[kBatch] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
#elif defined(__AVX2__)
constexpr uint32_t kBlockOf[kBatch] = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};
#else
constexpr uint32_t kBlockOf[kBatch] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#endif

#if defined(__AVX512F__) || defined(__AVX2__)
#if defined(__AVX512F__)
using Words = __m512i;
inline Words multiply(Words a, Words b) { return _mm512_mul_epu32(a, b); }
inline Words high_half(Words a) { return _mm512_srli_epi64(a, 32); }
inline Words low_to_high(Words a) { return _mm512_slli_epi64(a, 32); }
inline Words exclusive_or(Words a, Words b) { return _mm512_xor_si512(a, b); }
inline Words all(uint32_t a) { return _mm512_set1_epi64(static_cast<int64_t>(a)); }
inline Words low_high(Words low, Words high) { return _mm512_mask_blend_epi32(0xAAAA, low, high); }
inline Words load(const uint32_t* p) { return _mm512_loadu_si512(p); }
inline void store(uint32_t* p, Words a) { _mm512_storeu_si512(p, a); }
#else
using Words = __m256i;
inline Words multiply(Words a, Words b) { return _mm256_mul_epu32(a, b); }
inline Words high_half(Words a) { return _mm256_srli_epi64(a, 32); }
inline Words low_to_high(Words a) { return _mm256_slli_epi64(a, 32); }
inline Words exclusive_or(Words a, Words b) { return _mm256_xor_si256(a, b); }
inline Words all(uint32_t a) { return _mm256_set1_epi64x(static_cast<int64_t>(a)); }
inline Words low_high(Words low, Words high) { return _mm256_blend_epi32(low, high, 0xAA); }
inline Words load(const uint32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline void store(uint32_t* p, Words a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
#endif

// A 32-bit word lives in the low half of a 64-bit lane, where one multiply gives both halves of
// the product; what is left in the high half is never read. Even lanes of the batch are in `even`,
// odd ones in `odd`, so packing them again is one shift and one blend.
inline void philox_batch(const uint32_t* low, const uint32_t* high, uint32_t step, uint32_t stream,
                         uint32_t k0, uint32_t k1, Words4& words, int to) {
  constexpr int kLanes = sizeof(Words) / 4;
  const Words m0 = all(0xD2511F53u), m1 = all(0xCD9E8D57u);
  for (int at = 0; at < kBatch; at += kLanes) {
    const Words l = load(low + at), h = load(high + at);
    Words even[4] = {l, h, all(step), all(stream)};
    Words odd[4] = {high_half(l), high_half(h), all(step), all(stream)};
    uint32_t a = k0, b = k1;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const Words key0 = all(a), key1 = all(b);
      const Words e0 = multiply(even[0], m0), e1 = multiply(even[2], m1);
      const Words o0 = multiply(odd[0], m0), o1 = multiply(odd[2], m1);
      even[0] = exclusive_or(exclusive_or(high_half(e1), even[1]), key0);
      odd[0] = exclusive_or(exclusive_or(high_half(o1), odd[1]), key0);
      even[2] = exclusive_or(exclusive_or(high_half(e0), even[3]), key1);
      odd[2] = exclusive_or(exclusive_or(high_half(o0), odd[3]), key1);
      even[1] = e1;
      odd[1] = o1;
      even[3] = e0;
      odd[3] = o0;
      a += 0x9E3779B9u;
      b += 0xBB67AE85u;
    }
    for (int w = 0; w < 4; ++w) store(words[w] + to + at, low_high(even[w], low_to_high(odd[w])));
  }
}
#else
inline void philox_batch(const uint32_t* low, const uint32_t* high, uint32_t step, uint32_t stream,
                         uint32_t k0, uint32_t k1, Words4& words, int to) {
#pragma omp simd
  for (int i = 0; i < kBatch; ++i) {
    uint32_t w0 = low[i], w1 = high[i], w2 = step, w3 = stream;
    fd_philox4x32_10(w0, w1, w2, w3, k0, k1);
    words[0][to + i] = w0;
    words[1][to + i] = w1;
    words[2][to + i] = w2;
    words[3][to + i] = w3;
  }
}
#endif

// z[k][from + p] is normal k of block kBlockOf[p]; out takes the 64 normals in element order.
inline void interleave(const Normals4& z, int from, float* out) {
#if defined(__AVX512F__)
  const __m512 a = _mm512_loadu_ps(z[0] + from), b = _mm512_loadu_ps(z[1] + from);
  const __m512 c = _mm512_loadu_ps(z[2] + from), d = _mm512_loadu_ps(z[3] + from);
  const __m512d ab0 = _mm512_castps_pd(_mm512_unpacklo_ps(a, b));
  const __m512d ab1 = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
  const __m512d cd0 = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
  const __m512d cd1 = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
  _mm512_storeu_ps(out, _mm512_castpd_ps(_mm512_unpacklo_pd(ab0, cd0)));
  _mm512_storeu_ps(out + 16, _mm512_castpd_ps(_mm512_unpackhi_pd(ab0, cd0)));
  _mm512_storeu_ps(out + 32, _mm512_castpd_ps(_mm512_unpacklo_pd(ab1, cd1)));
  _mm512_storeu_ps(out + 48, _mm512_castpd_ps(_mm512_unpackhi_pd(ab1, cd1)));
#elif defined(__AVX2__)
  for (int at = 0; at < kBatch; at += 8) {
    const __m256 a = _mm256_loadu_ps(z[0] + from + at), b = _mm256_loadu_ps(z[1] + from + at);
    const __m256 c = _mm256_loadu_ps(z[2] + from + at), d = _mm256_loadu_ps(z[3] + from + at);
    const __m256d ab0 = _mm256_castps_pd(_mm256_unpacklo_ps(a, b));
    const __m256d ab1 = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
    const __m256d cd0 = _mm256_castps_pd(_mm256_unpacklo_ps(c, d));
    const __m256d cd1 = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
    float* to = out + 4 * at;
    _mm256_storeu_ps(to, _mm256_castpd_ps(_mm256_unpacklo_pd(ab0, cd0)));
    _mm256_storeu_ps(to + 8, _mm256_castpd_ps(_mm256_unpackhi_pd(ab0, cd0)));
    _mm256_storeu_ps(to + 16, _mm256_castpd_ps(_mm256_unpacklo_pd(ab1, cd1)));
    _mm256_storeu_ps(to + 24, _mm256_castpd_ps(_mm256_unpackhi_pd(ab1, cd1)));
  }
#else
  for (int p = 0; p < kBatch; ++p)
    for (int k = 0; k < 4; ++k) out[4 * kBlockOf[p] + k] = z[k][from + p];
#endif
}

// 64 * batches normals of consecutive blocks, at most kGroup of them, in element order.
//
// Three loops over a buffer in L1 instead of one over registers: a batch from counter to normal is
// one chain of some 180 cycles, longer than the processor looks ahead, while the iterations of
// each of these loops are short and overlap.
inline void normal_batches(uint64_t seed, uint32_t stream, uint32_t step, uint64_t first_block,
                           int batches, float* out) {
  Words4 words;
  for (int b = 0; b < batches; ++b) {
    const uint64_t block = first_block + static_cast<uint64_t>(b) * kBatch;
    const uint32_t first = static_cast<uint32_t>(block);
    const uint32_t carry = static_cast<uint32_t>(block >> 32);
    uint32_t low[kBatch], high[kBatch];
#pragma omp simd
    for (int p = 0; p < kBatch; ++p) {
      low[p] = first + kBlockOf[p];
      high[p] = carry + (low[p] < first ? 1u : 0u);
    }
    philox_batch(low, high, step, stream, static_cast<uint32_t>(seed),
                 static_cast<uint32_t>(seed >> 32), words, b * kBatch);
  }
  Normals4 z;
  for (int pair = 0; pair < 4; pair += 2) {
#pragma omp simd
    for (int i = 0; i < batches * kBatch; ++i)
      fd_box_muller(words[pair][i], words[pair + 1][i], z[pair][i], z[pair + 1][i]);
  }
  for (int b = 0; b < batches; ++b) interleave(z, b * kBatch, out + 4 * b * kBatch);
}

// Normals of the logical elements [first, first + n) of one sample.
inline void fill_normal(uint64_t seed, uint32_t stream, uint32_t step, int64_t first, int64_t n,
                        float* out) {
  constexpr int64_t kWidth = 4 * kBatch;
  const int64_t end = first + n;
  int64_t at = first / 4 * 4;
  while (at < end) {
    const uint64_t block = static_cast<uint64_t>(at) / 4;
    if (at >= first && at + kWidth <= end) {
      const int64_t whole = (end - at) / kWidth;
      const int batches = static_cast<int>(whole < kGroup / kBatch ? whole : kGroup / kBatch);
      normal_batches(seed, stream, step, block, batches, out + (at - first));
      at += batches * kWidth;
    } else {
      float edge[kWidth];
      normal_batches(seed, stream, step, block, 1, edge);
      const int64_t lo = at < first ? first : at;
      const int64_t hi = at + kWidth < end ? at + kWidth : end;
      for (int64_t e = lo; e < hi; ++e) out[e - first] = edge[e - at];
      at += kWidth;
    }
  }
}

// The same for a piece of memory whose fastest axis is the channel: memory position
// pixel * channels + c holds logical element c * pixels + pixel.
inline void fill_normal_channels_last(uint64_t seed, uint32_t stream, uint32_t step,
                                      int64_t first, int64_t n, int64_t channels, int64_t pixels,
                                      float* out) {
  const int64_t first_pixel = first / channels, last_pixel = (first + n - 1) / channels;
  constexpr int64_t kRun = 1024;
  float run[kRun];
  for (int64_t p = first_pixel; p <= last_pixel; p += kRun) {
    const int64_t count = last_pixel + 1 - p < kRun ? last_pixel + 1 - p : kRun;
    for (int64_t c = 0; c < channels; ++c) {
      fill_normal(seed, stream, step, c * pixels + p, count, run);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (p + i) * channels + c - first;
        if (at >= 0 && at < n) out[at] = run[i];
      }
    }
  }
}

}  // namespace
}  // namespace FD_ISA
}  // namespace fd
