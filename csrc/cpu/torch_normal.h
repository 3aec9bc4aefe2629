// torch's normals on the CPU: the words of MT19937, and those that a block of 16 words gives.
//
// Which products round on their own is a fact of torch's build: see torch_noise.cpp.
#pragma once

#if defined(__AVX2__) && defined(__FMA__)
#define FD_TORCH_NOISE
#include <immintrin.h>

#include "scratch.h"
#include "vec.h"

namespace fd {
namespace FD_ISA {
namespace {

constexpr int kState = 624, kLag = 397;  // of MT19937
constexpr int kBlock = 16;               // values of one Box-Muller block

// The same vectors, whatever vec.h builds them from.
typedef int32_t Ints __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef uint32_t Uints __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));

inline Uints load(const uint32_t* p) { return *reinterpret_cast<const Uints*>(p); }
inline void store(uint32_t* p, Uints v) { *reinterpret_cast<Uints*>(p) = v; }

#ifdef __AVX512F__
// Neighbouring vectors in turn, `k` words past aligned ones, of aligned loads alone: one that lies
// across two cache lines takes twice as long.
struct Window {
  Uints now;
  explicit Window(const uint32_t* first) : now(load(first)) {}
  template <int k>
  Uints at(const uint32_t* p) {
    const Uints then = load(p + kWidth);
    const Uints found = (Uints)_mm512_alignr_epi32((__m512i)then, (__m512i)now, k);
    now = then;
    return found;
  }
};

inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec root(Vec a) { return _mm512_sqrt_ps(a); }
// Of two vectors the lower halves and the upper ones.
inline void halves(Vec a, Vec b, Vec& low, Vec& high) {
  low = _mm512_shuffle_f32x4(a, b, 0x44);
  high = _mm512_shuffle_f32x4(a, b, 0xee);
}
inline Vec where(Uints bits, uint32_t bit, Vec set, Vec clear) {
  const __mmask16 mask = _mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(bit));
  return _mm512_mask_blend_ps(mask, clear, set);
}
#else
struct Window {
  explicit Window(const uint32_t*) {}
  template <int k>
  Uints at(const uint32_t* p) {
    return load(p + k);
  }
};

inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline Vec root(Vec a) { return (Vec)_mm256_sqrt_ps((__m256)a); }
// A block is two vectors already.
inline void halves(Vec a, Vec b, Vec& low, Vec& high) {
  low = a;
  high = b;
}
inline Vec where(Uints bits, uint32_t bit, Vec set, Vec clear) {
  const Uints moved = bits << __builtin_clz(bit);  // the sign bit chooses
  return (Vec)_mm256_blendv_ps((__m256)clear, (__m256)set, (__m256)moved);
}
#endif

inline Vec to_floats(Uints v) { return __builtin_convertvector((Ints)v, Vec); }

// The words of MT19937 that follow the kState ones at `words`, `made` of them, behind those; `words`
// starts a cache line and kState divides `made`.
inline void advance(uint32_t* words, int64_t made) {
  constexpr int kPast = kLag % kWidth, kAhead = kLag - kPast;
  Window here(words), ahead(words + kAhead);
  for (uint32_t *p = words, *stop = words + made; p < stop; p += kWidth) {
    const Uints low = here.at<1>(p), lag = ahead.at<kPast>(p + kAhead);
    const Uints mixed = (load(p) & 0x80000000u) | (low & 0x7fffffffu);
    store(p + kState, lag ^ (mixed >> 1) ^ ((0u - (low & 1u)) & 0x9908b0dfu));
  }
}

// Low 24 bits of a word as torch hands it out.
inline Uints uniform(const uint32_t* p) {
  Uints y = load(p);
  y ^= y >> 11;
  y ^= (y << 7) & 0x9d2c5680u;
  y ^= (y << 15) & 0xefc60000u;
  return (y ^ (y >> 18)) & 0xffffffu;
}

// sqrt(-2 log(1 - k / 2^24))
inline Vec radius(Vec k) {
  constexpr uint32_t kRootHalf = 0x3f3504f3u;  // mantissas in [sqrt(1/2), sqrt(2))
  const Uints bits = (Uints)(16777216.0f - k) - (kRootHalf + (24u << 23));
  const Vec e = __builtin_convertvector((Ints)bits >> 23, Vec);
  const Vec x = (Vec)((bits & 0x7fffffu) + kRootHalf) - 1.0f, z = x * x;
  Vec y = fma(vec_set(7.0376836292e-2f), x, vec_set(-1.1514610310e-1f));
  y = fma(y, x, vec_set(1.1676998740e-1f));
  y = fma(y, x, vec_set(-1.2420140846e-1f));
  y = fma(y, x, vec_set(1.4249322787e-1f));
  y = fma(y, x, vec_set(-1.6668057665e-1f));
  y = fma(y, x, vec_set(2.0000714765e-1f));
  y = fma(y, x, vec_set(-2.4999993993e-1f));
  y = fma(y, x, vec_set(3.3333331174e-1f));
  y = fma(y * x, z, e * -2.12194440e-4f);
  y = fma(z, vec_set(-0.5f), y);
  return root(-2.0f * fma(e, vec_set(0.693359375f), x + y));
}

inline void sines(Vec k, Vec& sine, Vec& cosine) {
  const Vec angle = k * (6.2831855f / 16777216.0f);
  // twice the quarter turn that is nearest
  const Uints turn = ((Uints)__builtin_convertvector(angle * 1.27323954473516f, Ints) + 1u) & ~1u;
  const Vec t = to_floats(turn);
  Vec x = fma(t, vec_set(-0.78515625f), angle);
  x = fma(t, vec_set(-2.4187564849853515625e-4f), x);
  x = fma(t, vec_set(-3.77489497744594108e-8f), x);
  const Vec z = x * x;
  Vec c = fma(vec_set(2.443315711809948e-5f), z, vec_set(-1.388731625493765e-3f));
  c = fma(c, z, vec_set(4.166664568298827e-2f));
  c = fma(c * z, z, -0.5f * z) + 1.0f;
  Vec s = fma(vec_set(-1.9515295891e-4f), z, vec_set(8.3321608736e-3f));
  s = fma(s, z, vec_set(-1.6666654611e-1f));
  s = fma(s * z, x, x);
  sine = (Vec)((Uints)where(turn, 2u, c, s) ^ ((turn << 29) & 0x80000000u));
  cosine = (Vec)((Uints)where(turn, 2u, s, c) ^ (((turn + 2u) << 29) & 0x80000000u));
}

// The 2 kWidth values of as many words: one block or two.
inline void box_muller(const uint32_t* words, Vec& first, Vec& second) {
  Vec u1, u2, sine, cosine;
  halves(to_floats(uniform(words)), to_floats(uniform(words + kWidth)), u1, u2);
  const Vec r = radius(u1);
  sines(u2, sine, cosine);
  // adding zero makes -0 positive, as torch's shift by its mean does
  halves(fma(r, cosine, vec_set(0.0f)), fma(r, sine, vec_set(0.0f)), first, second);
}

// Where share i of `shares` begins, out of `blocks`: equal times, for whoever draws a share has to walk
// past all before it, at `kWalk` of the price of drawing them.
inline int64_t first_block(int64_t i, int64_t shares, int64_t blocks) {
  constexpr double kWalk = 0.12;
  double part = 1.0, all = 1.0;
  for (int64_t k = 0; k < shares; ++k) {
    all *= 1.0 - kWalk;
    if (k < i) part *= 1.0 - kWalk;
  }
  return static_cast<int64_t>(static_cast<double>(blocks) * ((1.0 - part) / (1.0 - all)));
}

}  // namespace
}  // namespace FD_ISA
}  // namespace fd
#endif
