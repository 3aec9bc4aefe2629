// x = alpha x0 + sigma eps with counter noise, and what a model should predict of it, in one pass.
//
// Reads x0, writes x and the target: 12 bytes an element in float32, and 8 more where a store first
// fetches its line. Drawing takes longer than those bytes, so a piece asks for the memory of the
// next one. Every backend does the same float32 operations in the same order.
#include "../step.h"

#include "fill_normal.h"
#include "kernels.h"
#include "scratch.h"
#include "store.h"
#include "table.h"
#include "threads.h"

namespace fd {
namespace FD_ISA {
namespace {

constexpr int64_t kPiece = 4 * kGroup;
// channels_last draws runs of pixels, one a channel: they must not be short
constexpr int64_t kMostPiece = 4 * kPiece;

template <int kTarget>
inline void mix(const float* x0, const float* eps, float alpha, float sigma, int64_t n, float* x,
                float* target) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    x[i] = fd_add_term(alpha * x0[i], sigma, eps[i]);
    if (kTarget != kSample) target[i] = fd_target<kTarget>(x0[i], eps[i], alpha, sigma);
  }
}

inline void mix(int target_kind, const float* x0, const float* eps, float alpha, float sigma,
                int64_t n, float* x, float* target) {
  switch (target_kind) {
    case kEpsilon:
      return mix<kEpsilon>(x0, eps, alpha, sigma, n, x, target);
    case kVPrediction:
      return mix<kVPrediction>(x0, eps, alpha, sigma, n, x, target);
    case kFlow:
      return mix<kFlow>(x0, eps, alpha, sigma, n, x, target);
    default:
      return mix<kSample>(x0, eps, alpha, sigma, n, x, target);
  }
}

template <int kWrite>
inline void prefetch(const void* tensor, int64_t at, int64_t n, int64_t width) {
  const char* p = static_cast<const char*>(tensor) + at * width;
  for (int64_t i = 0; i < n * width; i += 64) __builtin_prefetch(p + i, kWrite);
}

}  // namespace

void add_noise(const FdAddNoiseArgs& a) {
  const int64_t piece = a.channels > 0 ? kMostPiece : kPiece;
  const int64_t pieces = (a.size + piece - 1) / piece, total = a.samples * a.size;
  const int64_t pixels = a.channels > 0 ? a.size / a.channels : 0;
  const int64_t width = a.dtype == kFloat32 ? 4 : 2;
  const bool plain = a.dtype == kFloat32;
  parallel_for(a.samples * pieces, 1.0 * piece, [&](int64_t begin, int64_t end) {
    alignas(64) float eps[kMostPiece];
    alignas(64) float given[kMostPiece], mixed[kMostPiece], wanted[kMostPiece];
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t sample = unit / pieces, first = unit % pieces * piece;
      const int64_t n = least(a.size - first, piece), at = sample * a.size + first;
      const uint64_t seed = static_cast<uint64_t>(a.seeds[sample]);
      if (a.channels > 0) {
        fill_normal_channels_last(seed, a.stream, a.step, first, n, a.channels, pixels, eps);
      } else {
        const int64_t next = least(at + n, total), ahead = least(total - next, piece);
        fill_normal(seed, a.stream, a.step, first, n, eps, [&](int stage) {
          if (stage == 0) prefetch<0>(a.x0, next, ahead, width);
          if (stage == 1) prefetch<1>(a.x, next, ahead, width);
          if (stage == 2 && a.target) prefetch<1>(a.target, next, ahead, width);
        });
      }
      const float* x0 = load_as_float(a.x0, a.dtype, at, n, given);
      float* x = plain ? static_cast<float*>(a.x) + at : mixed;
      float* target = plain && a.target ? static_cast<float*>(a.target) + at : wanted;
      mix(a.target ? a.target_kind : kSample, x0, eps, a.alpha[sample], a.sigma[sample], n, x,
          target);
      if (plain) continue;
      store_as(x, a.dtype, a.x, at, n);
      if (a.target) store_as(target, a.dtype, a.target, at, n);
    }
  });
}

}  // namespace FD_ISA
}  // namespace fd
