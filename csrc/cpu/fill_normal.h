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
#define FD_VECTOR_PHILOX
#if defined(__AVX512F__)
using Words = __m512i;
inline Words multiply(Words a, Words b) { return _mm512_mul_epu32(a, b); }
inline Words high_half(Words a) { return _mm512_srli_epi64(a, 32); }
inline Words low_to_high(Words a) { return _mm512_slli_epi64(a, 32); }
inline Words exclusive_or(Words a, Words b, Words c) {
  return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}
inline Words all(uint64_t a) { return _mm512_set1_epi64(static_cast<int64_t>(a)); }
inline Words all32(uint32_t a) { return _mm512_set1_epi32(static_cast<int32_t>(a)); }
inline Words add(Words a, Words b) { return _mm512_add_epi32(a, b); }
inline Words low_high(Words low, Words high) { return _mm512_mask_blend_epi32(0xAAAA, low, high); }
inline Words load(const uint32_t* p) { return _mm512_loadu_si512(p); }
inline void store(uint32_t* p, Words a) { _mm512_storeu_si512(p, a); }
#else
using Words = __m256i;
inline Words multiply(Words a, Words b) { return _mm256_mul_epu32(a, b); }
inline Words high_half(Words a) { return _mm256_srli_epi64(a, 32); }
inline Words low_to_high(Words a) { return _mm256_slli_epi64(a, 32); }
inline Words exclusive_or(Words a, Words b, Words c) {
  return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
}
inline Words all(uint64_t a) { return _mm256_set1_epi64x(static_cast<int64_t>(a)); }
inline Words all32(uint32_t a) { return _mm256_set1_epi32(static_cast<int32_t>(a)); }
inline Words add(Words a, Words b) { return _mm256_add_epi32(a, b); }
inline Words low_high(Words low, Words high) { return _mm256_blend_epi32(low, high, 0xAA); }
inline Words load(const uint32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline void store(uint32_t* p, Words a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
#endif

#endif

// The 16 blocks from `first` on, one lane after the other.
inline void philox_scalar(uint64_t seed, uint32_t stream, uint32_t step, uint64_t first,
                          Words4& words, int to) {
#pragma omp simd
  for (int p = 0; p < kBatch; ++p) {
    const uint64_t block = first + kBlockOf[p];
    uint32_t w0 = static_cast<uint32_t>(block), w1 = static_cast<uint32_t>(block >> 32);
    uint32_t w2 = step, w3 = stream;
    fd_philox4x32_10(w0, w1, w2, w3, static_cast<uint32_t>(seed),
                     static_cast<uint32_t>(seed >> 32));
    words[0][to + p] = w0;
    words[1][to + p] = w1;
    words[2][to + p] = w2;
    words[3][to + p] = w3;
  }
}

#if defined(FD_VECTOR_PHILOX)
// What the ten rounds have in common for all blocks of a draw: the round keys and, since only the
// low word of the counter changes inside a batch, half of the first round and of the second.
struct PhiloxDraw {
  uint64_t key[10][2];
  uint32_t step_high, step_low;  // of the first round's second product

  PhiloxDraw(uint64_t seed, uint32_t step) {
    uint32_t a = static_cast<uint32_t>(seed), b = static_cast<uint32_t>(seed >> 32);
    for (auto& k : key) {
      k[0] = a;
      k[1] = b;
      a += 0x9E3779B9u;
      b += 0xBB67AE85u;
    }
    const uint64_t product = static_cast<uint64_t>(step) * 0xCD9E8D57u;
    step_high = static_cast<uint32_t>(product >> 32);
    step_low = static_cast<uint32_t>(product);
  }
};

// A 32-bit word lives in the low half of a 64-bit lane, where one multiply gives both halves of
// the product; what is left in the high half is never read. Even lanes of the batch are in one
// set of vectors, odd ones in another, so packing them again is one shift and one blend.
inline void philox_batch(const PhiloxDraw& draw, uint64_t seed, uint32_t stream, uint32_t step,
                         uint64_t first, Words4& words, int to) {
  const uint32_t low = static_cast<uint32_t>(first), high = static_cast<uint32_t>(first >> 32);
  if (low > 0xFFFFFFFFu - (kBatch - 1)) {  // the low word wraps inside the batch
    philox_scalar(seed, stream, step, first, words, to);
    return;
  }
  const Words m0 = all(0xD2511F53u), m1 = all(0xCD9E8D57u);
  const auto key = [&](int round, int half) { return all(draw.key[round][half]); };
  const uint32_t c0 = draw.step_high ^ high ^ static_cast<uint32_t>(draw.key[0][0]);
  const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
  constexpr int kLanes = sizeof(Words) / 4;
  for (int at = 0; at < kBatch; at += kLanes) {
    const Words blocks = add(load(kBlockOf + at), all32(low));
    Words lane[2][4];
    for (int odd = 0; odd < 2; ++odd) {
      const Words product = multiply(odd ? high_half(blocks) : blocks, m0);
      const Words c2 = exclusive_or(high_half(product), all(stream), key(0, 1));
      const Words next = multiply(c2, m1);
      lane[odd][0] = exclusive_or(high_half(next), all(draw.step_low), key(1, 0));
      lane[odd][1] = next;
      lane[odd][2] = exclusive_or(all(p0 >> 32), product, key(1, 1));
      lane[odd][3] = all(p0);
    }
#pragma GCC unroll 8
    for (int round = 2; round < 10; ++round) {
      for (auto& c : lane) {
        const Words a = multiply(c[0], m0), b = multiply(c[2], m1);
        c[0] = exclusive_or(high_half(b), c[1], key(round, 0));
        c[2] = exclusive_or(high_half(a), c[3], key(round, 1));
        c[1] = b;
        c[3] = a;
      }
    }
    for (int w = 0; w < 4; ++w)
      store(words[w] + to + at, low_high(lane[0][w], low_to_high(lane[1][w])));
  }
}
#else
struct PhiloxDraw {
  PhiloxDraw(uint64_t, uint32_t) {}
};
inline void philox_batch(const PhiloxDraw&, uint64_t seed, uint32_t stream, uint32_t step,
                         uint64_t first, Words4& words, int to) {
  philox_scalar(seed, stream, step, first, words, to);
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
//
// `between(k)` is called before each of kStages parts of the work: a place for prefetches.
constexpr int kStages = 4;

template <class Between>
inline void normal_batches(uint64_t seed, uint32_t stream, uint32_t step, uint64_t first_block,
                           int batches, float* out, const Between& between) {
  const PhiloxDraw draw(seed, step);
  Words4 words;
  between(0);
  for (int b = 0; b < batches; ++b)
    philox_batch(draw, seed, stream, step, first_block + static_cast<uint64_t>(b) * kBatch, words,
                 b * kBatch);
  Normals4 z;
  for (int pair = 0; pair < 4; pair += 2) {
    between(1 + pair / 2);
#pragma omp simd
    for (int i = 0; i < batches * kBatch; ++i)
      fd_box_muller(words[pair][i], words[pair + 1][i], z[pair][i], z[pair + 1][i]);
  }
  between(3);
  for (int b = 0; b < batches; ++b) interleave(z, b * kBatch, out + 4 * b * kBatch);
}

// Normals of the logical elements [first, first + n) of one sample; `between` is called in every
// group of 1,024.
template <class Between>
inline void fill_normal(uint64_t seed, uint32_t stream, uint32_t step, int64_t first, int64_t n,
                        float* out, const Between& between) {
  constexpr int64_t kWidth = 4 * kBatch;
  const int64_t end = first + n;
  int64_t at = first / 4 * 4;
  while (at < end) {
    const uint64_t block = static_cast<uint64_t>(at) / 4;
    if (at >= first && at + kWidth <= end) {
      const int64_t whole = (end - at) / kWidth;
      const int batches = static_cast<int>(whole < kGroup / kBatch ? whole : kGroup / kBatch);
      normal_batches(seed, stream, step, block, batches, out + (at - first), between);
      at += batches * kWidth;
    } else {
      float edge[kWidth];
      normal_batches(seed, stream, step, block, 1, edge, [](int) {});
      const int64_t lo = at < first ? first : at;
      const int64_t hi = at + kWidth < end ? at + kWidth : end;
      for (int64_t e = lo; e < hi; ++e) out[e - first] = edge[e - at];
      at += kWidth;
    }
  }
}

inline void fill_normal(uint64_t seed, uint32_t stream, uint32_t step, int64_t first, int64_t n,
                        float* out) {
  fill_normal(seed, stream, step, first, n, out, [](int) {});
}

// Elements first .. first + n - 1 of a sample whose fastest axis in memory is the channel: position
// pixel * channels + c holds logical element c * pixels + pixel. fill(at, count, to) gives a run of
// logical elements.
template <class Fill>
inline void channels_last(int64_t first, int64_t n, int64_t channels, int64_t pixels, float* out,
                          const Fill& fill) {
  const int64_t first_pixel = first / channels, last_pixel = (first + n - 1) / channels;
  constexpr int64_t kRun = 1024;
  float run[kRun];
  for (int64_t p = first_pixel; p <= last_pixel; p += kRun) {
    const int64_t count = last_pixel + 1 - p < kRun ? last_pixel + 1 - p : kRun;
    for (int64_t c = 0; c < channels; ++c) {
      fill(c * pixels + p, count, run);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (p + i) * channels + c - first;
        if (at >= 0 && at < n) out[at] = run[i];
      }
    }
  }
}

inline void fill_normal_channels_last(uint64_t seed, uint32_t stream, uint32_t step,
                                      int64_t first, int64_t n, int64_t channels, int64_t pixels,
                                      float* out) {
  channels_last(first, n, channels, pixels, out, [&](int64_t at, int64_t count, float* to) {
    fill_normal(seed, stream, step, at, count, to);
  });
}

}  // namespace
}  // namespace FD_ISA
}  // namespace fd
