// Sums of a tensor and of its square over the groups of a normalisation, in either memory order.
//
// They are float32 over runs of 64 pixels, float32 over such runs inside one of a fixed number of
// parts, float64 over the parts: an order that neither the batch nor the number of threads changes.
#pragma once

#include "kernels.h"
#include "scratch.h"
#include "vec.h"

namespace fd {
namespace FD_ISA {
namespace {

constexpr int64_t kRun = 64;    // pixels that are added up in registers
constexpr int64_t kParts = 16;  // of a sample, at most
constexpr int64_t kBlock = 4096;  // elements of a run where a group is one run of memory

inline float element(const void* from, int dtype, int64_t i) {
  if (dtype == kFloat32) return static_cast<const float*>(from)[i];
  const uint16_t bits = static_cast<const uint16_t*>(from)[i];
  return dtype == kBFloat16 ? fd_from_bf16(bits) : fd_from_f16(bits);
}

inline float element(const FdFilmNormArgs& a, const void* from, int64_t i) {
  return element(from, a.dtype, i);
}

// --- sums, channels fastest ---------------------------------------------------------------

// What a part of a sample adds up to, `lanes` values each: a lane is a channel, or a pair of
// channels of one group.
struct Sums {
  float *sum, *square;
};

#ifdef __AVX512BF16__
// Sums over pairs of neighbouring channels, one instruction for 32 products: of x by 1, of x by x.
// No shift: a bf16 whose mean is far above its spread has lost the spread itself.
void add_pairs(const uint16_t* x, int64_t channels, int64_t pixels, const Sums& to) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  for (int64_t c = 0; c < channels; c += 128) {
    const int64_t left = least(channels - c, 128);
    const int vectors = static_cast<int>((left + 31) / 32);
    __m512 sum[4] = {}, square[4] = {};
    if (left == 128) {
      for (int64_t i = 0; i < pixels; ++i) {
        for (int k = 0; k < 4; ++k) {
          const __m512bh v = (__m512bh)_mm512_loadu_si512(x + i * channels + c + 32 * k);
          sum[k] = _mm512_dpbf16_ps(sum[k], v, ones);
          square[k] = _mm512_dpbf16_ps(square[k], v, v);
        }
      }
    } else {
      for (int k = 0; k < vectors; ++k) {
        const int64_t n = least(left - 32 * k, 32);
        const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << n) - 1);
        for (int64_t i = 0; i < pixels; ++i) {
          const __m512bh v =
              (__m512bh)_mm512_maskz_loadu_epi16(mask, x + i * channels + c + 32 * k);
          sum[k] = _mm512_dpbf16_ps(sum[k], v, ones);
          square[k] = _mm512_dpbf16_ps(square[k], v, v);
        }
      }
    }
    for (int k = 0; k < vectors; ++k) {
      const int n = static_cast<int>(least(left - 32 * k, 32) / 2);
      const int64_t lane = c / 2 + 16 * k;
      vec_store<kFloat32>(vec_load<kFloat32>(to.sum, lane, n) + sum[k], to.sum, lane, n);
      vec_store<kFloat32>(vec_load<kFloat32>(to.square, lane, n) + square[k], to.square, lane, n);
    }
  }
}
#endif

template <int D, int kVectors>
void add_columns(const void* x, int64_t at, int64_t channels, int64_t pixels, int n, int64_t c,
                 const float* shift, const Sums& to) {
  Vec sum[kVectors] = {}, square[kVectors] = {}, center[kVectors];
  for (int k = 0; k < kVectors; ++k) center[k] = vec_load<kFloat32>(shift, c + k * kWidth, n);
  for (int64_t i = 0; i < pixels; ++i) {
    for (int k = 0; k < kVectors; ++k) {
      const Vec v = vec_load<D>(x, at + i * channels + c + k * kWidth, n) - center[k];
      sum[k] += v;
      square[k] += v * v;
    }
  }
  for (int k = 0; k < kVectors; ++k) {
    const int64_t lane = c + k * kWidth;
    vec_store<kFloat32>(vec_load<kFloat32>(to.sum, lane, n) + sum[k], to.sum, lane, n);
    vec_store<kFloat32>(vec_load<kFloat32>(to.square, lane, n) + square[k], to.square, lane, n);
  }
}

// Sums of x - shift over each channel.
template <int D>
void add_channels(const void* x, int64_t at, int64_t channels, int64_t pixels, const float* shift,
                  const Sums& to) {
  int64_t c = 0;
  for (; c + 4 * kWidth <= channels; c += 4 * kWidth)
    add_columns<D, 4>(x, at, channels, pixels, kWidth, c, shift, to);
  for (; c + kWidth <= channels; c += kWidth)
    add_columns<D, 1>(x, at, channels, pixels, kWidth, c, shift, to);
  if (c < channels)
    add_columns<D, 1>(x, at, channels, pixels, static_cast<int>(channels - c), c, shift, to);
}

int64_t channels_a_lane(const FdFilmNormArgs& a) {
#ifdef __AVX512BF16__
  if (a.dtype == kBFloat16 && a.channels / a.groups % 2 == 0) return 2;
#endif
  (void)a;
  return 1;
}

void add_part(const FdFilmNormArgs& a, int64_t sample, int64_t begin, int64_t end,
              const float* shift, const Sums& to) {
  const int64_t lanes = a.channels / channels_a_lane(a);
  fill(to.sum, to.sum + lanes, 0.0f);
  fill(to.square, to.square + lanes, 0.0f);
  for (int64_t first = begin; first < end; first += kRun) {
    const int64_t pixels = least(end - first, kRun);
    const int64_t at = (sample * a.pixels + first) * a.channels;
#ifdef __AVX512BF16__
    if (lanes < a.channels) {
      add_pairs(static_cast<const uint16_t*>(a.x) + at, a.channels, pixels, to);
      continue;
    }
#endif
    if (a.dtype == kFloat32)
      add_channels<kFloat32>(a.x, at, a.channels, pixels, shift, to);
    else if (a.dtype == kBFloat16)
      add_channels<kBFloat16>(a.x, at, a.channels, pixels, shift, to);
    else
      add_channels<kFloat16>(a.x, at, a.channels, pixels, shift, to);
  }
}

// --- sums, pixels fastest -----------------------------------------------------------------

struct Moments {
  double sum, square;
};

template <int D>
Moments run_sums(const void* x, int64_t at, int64_t count, float shift) {
  Moments total{0.0, 0.0};
  const Vec center = vec_set(shift);
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t n = least(count - first, kBlock), whole = n / (4 * kWidth) * (4 * kWidth);
    Vec sum[4] = {}, square[4] = {};
    for (int64_t i = 0; i < whole; i += 4 * kWidth) {
      for (int k = 0; k < 4; ++k) {
        const Vec v = vec_load<D>(x, at + first + i + k * kWidth) - center;
        sum[k] += v;
        square[k] += v * v;
      }
    }
    double s = vec_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    double q = vec_sum((square[0] + square[1]) + (square[2] + square[3]));
    for (int64_t i = whole; i < n; ++i) {
      const double v = element(x, D, at + first + i) - shift;
      s += v;
      q += v * v;
    }
    total.sum += s;
    total.square += q;
  }
  return total;
}

Moments group_sums(const FdFilmNormArgs& a, int64_t at, int64_t count, float shift) {
  if (a.dtype == kFloat32) return run_sums<kFloat32>(a.x, at, count, shift);
  if (a.dtype == kBFloat16) return run_sums<kBFloat16>(a.x, at, count, shift);
  return run_sums<kFloat16>(a.x, at, count, shift);
}

// How the pixels of a sample fall into parts.
struct Parts {
  int64_t pixels, count;

  explicit Parts(int64_t all)
      : pixels(all), count(most(1, least(kParts, all / kRun))) {}
  int64_t begin(int64_t part) const { return pixels * part / count; }
};

// What the sums are shifted by: a rough mean of the group, so that the square of the mean that is
// taken off in the end is small beside the variance.
void middles(const FdFilmNormArgs& a, int64_t sample, float* shift) {
  const int64_t per_group = a.channels / a.groups, at = sample * a.pixels * a.channels;
  const int64_t pixels = least(a.pixels, 8);
  for (int64_t g = 0; g < a.groups; ++g) {
    float sum = 0.0f;
    for (int64_t i = 0; i < pixels && channels_a_lane(a) == 1; ++i)
      for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c)
        sum += element(a, a.x, at + a.pixels * i / pixels * a.channels + c);
    const float mean = sum / static_cast<float>(pixels * per_group);
    fill(shift + g * per_group, shift + (g + 1) * per_group, mean);
  }
}

float middle_of_run(const FdFilmNormArgs& a, int64_t at, int64_t count) {
  const int64_t n = least(count, 32);
  float sum = 0.0f;
  for (int64_t i = 0; i < n; ++i) sum += element(a, a.x, at + count * i / n);
  return sum / static_cast<float>(n);
}

}  // namespace
}  // namespace FD_ISA
}  // namespace fd
