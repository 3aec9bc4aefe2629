// What the kernels of film_norm.cu are made of: copies to shared memory, a cluster of blocks, sums of
// groups, their merge, and the result. The macros are described there.
#pragma once

#include "step.h"

#include "cuda/elements.h"

#ifndef FD_DYNAMIC_SHARED  // the tests bring their own
#define FD_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

constexpr int kSize = FD_DTYPE == kFloat32 ? 4 : 2;
constexpr int kLanes = FD_FIXED ? FD_PACK : 1;  // sums of a thread
constexpr int kStages = 4;                      // parts of a slab that are waited for one by one

// --- the device's own instructions ---------------------------------------------------------------

#ifdef __CUDA_ARCH__
// off by some 2^-21 of the result: nothing before a result of 16 bits
FD_INLINE float fd_sigmoid_approx(float z) {
  float e, r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(-1.4426950408889634f * z));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.0f + e));
  return r;
}

// consecutive bytes to shared memory, under way until fd_wait
template <int kBytes>
FD_INLINE void fd_copy_async(void* to, const void* from) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(kBytes)
                 : "memory");
}
FD_INLINE void fd_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
FD_INLINE void fd_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}
#else
FD_INLINE float fd_sigmoid_approx(float z) { return 1.0f / (1.0f + __builtin_expf(-z)); }
template <int kBytes>
FD_INLINE void fd_copy_async(void* to, const void* from) {
  __builtin_memcpy(to, from, kBytes);
}
FD_INLINE void fd_commit() {}
template <int kLeft>
FD_INLINE void fd_wait() {}
#endif

#if FD_CLUSTER > 1 && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
FD_INLINE uint32_t fd_cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
FD_INLINE void fd_cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
FD_INLINE void fd_cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// what block `rank` of the cluster has at the place of `mine`
FD_INLINE float fd_cluster_read(const float* mine, uint32_t rank) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(mine));
  float value;
  asm volatile(
      "{\n .reg .u32 there;\n mapa.shared::cluster.u32 there, %1, %2;\n"
      " ld.shared::cluster.f32 %0, [there];\n}"
      : "=f"(value)
      : "r"(at), "r"(rank)
      : "memory");
  return value;
}
#else  // a block alone is the cluster
FD_INLINE uint32_t fd_cluster_rank() { return 0; }
FD_INLINE void fd_cluster_arrive() {}
FD_INLINE void fd_cluster_wait() {}
FD_INLINE float fd_cluster_read(const float* mine, uint32_t) { return *mine; }
#endif

// z / (1 + exp(-z)): NaN at -inf and -0 far below, as PyTorch has it. fd_exp saturates at exp(88),
// its square overflows as exp does.
FD_INLINE float fd_silu(float z) {
  if (FD_DTYPE != kFloat32) return z * fd_sigmoid_approx(z);
  const float root = fd_exp(-0.5f * z);
  return z / (1.0f + root * root);
}

// --- the part of a batch that a block works on ------------------------------------------------------

struct Tile {
  int64_t start;  // element of the first channel at the first pixel
  int64_t outer;  // elements from one step of the outer axis to the next
  int64_t channels, pixels;
  int row;  // elements from one step of the outer axis to the next in the slab
};

FD_DEVICE Tile tile_of(int64_t sample, int64_t channel, int64_t pixel, int64_t channels,
                       int64_t pixels, int64_t all_channels, int64_t all_pixels) {
  const int64_t base = sample * all_channels * all_pixels;
  return FD_LAST ? Tile{base + pixel * all_channels + channel, all_channels, channels, pixels,
                        static_cast<int>(channels)}
                 : Tile{base + channel * all_pixels + pixel, all_pixels, channels, pixels,
                        static_cast<int>(pixels)};
}

FD_DEVICE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// For every pack of this thread from `begin` to `end` on the outer axis, pixels below `until`: calls
// load(element, place in the slab, v), then use(element, place, channel of the run, v). `kBatch`
// packs are loaded before the first is used, so that as many are under way.
template <int kBatch, class Load, class Use>
FD_DEVICE void for_packs(const Tile& t, int64_t begin, int64_t end, int64_t until, Load load,
                         Use use) {
  const int64_t inner = (FD_LAST ? t.channels : until) / FD_PACK;
  float v[kBatch][(1 + FD_RESIDUAL) * FD_PACK];  // of x, then of the residual
  if (FD_FIXED) {
    if (threadIdx.x >= inner) return;
    const int i = static_cast<int>(threadIdx.x) * FD_PACK;
    for (int64_t o = begin + threadIdx.y; o < end; o += kBatch * blockDim.y) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int64_t here = o + u * blockDim.y;
        if (here < end) load(t.start + here * t.outer + i, here * t.row + i, v[u]);
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int64_t here = o + u * blockDim.y;
        if (here < end) use(t.start + here * t.outer + i, here * t.row + i, i, v[u]);
      }
    }
    return;
  }
  for (int64_t o = begin + threadIdx.y; o < end; o += blockDim.y) {
    for (int64_t i = threadIdx.x; i < inner; i += kBatch * blockDim.x) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int64_t here = i + u * blockDim.x, at = here * FD_PACK;
        if (here < inner) load(t.start + o * t.outer + at, o * t.row + at, v[u]);
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int64_t here = i + u * blockDim.x, at = here * FD_PACK;
        const int channel = static_cast<int>(FD_LAST ? at : o);
        if (here < inner) use(t.start + o * t.outer + at, o * t.row + at, channel, v[u]);
      }
    }
  }
}

template <int kBatch, class Load, class Use>
FD_DEVICE void for_all(const Tile& t, Load load, Use use) {
  for_packs<kBatch>(t, 0, FD_LAST ? t.pixels : t.channels, t.pixels, load, use);
}

// --- sums of groups -------------------------------------------------------------------------------

// Adds a pack to the sums of a thread.
FD_DEVICE void fd_add(float* sum, const float* v) {
#pragma unroll
  for (int k = 0; k < FD_PACK; ++k) sum[FD_FIXED ? k : 0] += v[k];
}

// Sums over the block of what the threads bring, by group; every thread calls it.
FD_DEVICE void group_sums(const float* lanes, float* scratch, float* sums, int width, int groups) {
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  const int threads = static_cast<int>(blockDim.x * blockDim.y);
  const int rows = FD_FIXED ? static_cast<int>(blockDim.y) : threads;
  const int row = FD_FIXED ? static_cast<int>(threadIdx.y) : thread;
  const int columns = FD_FIXED ? static_cast<int>(blockDim.x) * FD_PACK : 1;
  float* mine = scratch + row * columns + (FD_FIXED ? threadIdx.x * FD_PACK : 0);
#pragma unroll
  for (int k = 0; k < kLanes; ++k) mine[k] = lanes[k];
  int half = 1;
  while (2 * half < rows) half *= 2;
  for (; half > 0; half /= 2) {
    __syncthreads();
    if (row < half && row + half < rows) {
#pragma unroll
      for (int k = 0; k < kLanes; ++k) mine[k] += mine[half * columns + k];
    }
  }
  __syncthreads();
  for (int g = thread; g < groups; g += threads) {
    float sum = 0.0f;
    if (FD_FIXED)
      for (int c = 0; c < width; ++c) sum += scratch[g * width + c];
    else
      sum = scratch[0];
    sums[g] = sum;
  }
  __syncthreads();
}

// Of one group: a number near the mean, and the sums of x minus it and of its square. Such sums do
// not cancel where the mean is far above the deviation, and the pivot need not be exact (Chan, Golub
// and LeVeque 1983, "Algorithms for computing the sample variance").
struct Sums {
  float *pivot, *first, *second;
};

template <int kBatch, class Read>
FD_DEVICE void group_moments(const Tile& t, const Sums& s, float* scratch, int width, int groups,
                             Read read) {
  float pivot[kLanes], first[kLanes] = {}, second[kLanes] = {};
#pragma unroll
  for (int k = 0; k < kLanes; ++k) {
    const int group = FD_FIXED ? (static_cast<int>(threadIdx.x) * FD_PACK + k) / width : 0;
    pivot[k] = s.pivot[group < groups ? group : 0];
  }
  for_all<kBatch>(t, read, [&](int64_t, int64_t, int, const float* v) {
#pragma unroll
    for (int k = 0; k < FD_PACK; ++k) {
      const int lane = FD_FIXED ? k : 0;
      const float d = v[k] - pivot[lane];
      first[lane] += d;
      second[lane] += d * d;
    }
  });
  group_sums(first, scratch, s.first, width, groups);
  group_sums(second, scratch, s.second, width, groups);
}

// A mean as the sum of two float32 numbers, so that x - high is exact where x is near it.
struct Norm {
  float high, low, rstd;
};

// Parts of a group merged: sums around one pivot for all, the `origin`.
struct Merged {
  double first, second;
};

FD_DEVICE Merged fd_merge(const Merged& m, double origin, double n, float pivot, float first,
                          float second) {
  const double off = pivot - origin;
  return {m.first + (n * off + first), m.second + (n * off * off + 2.0 * off * first + second)};
}

FD_DEVICE Norm fd_norm(const Merged& m, double origin, double n, float eps) {
  const double off = m.first / n, mean = origin + off;
  // a NaN must stay one: only a rounded variance of nearly equal numbers is below 0
  double variance = m.second / n - off * off;
  variance = variance < 0.0 ? 0.0 : variance;
  const float high = static_cast<float>(mean);
  return {high, static_cast<float>(mean - high),
          1.0f / fd_sqrt(static_cast<float>(variance) + eps)};
}

// --- application ----------------------------------------------------------------------------------

struct Film {
  const void *weight, *bias, *scale, *shift;
  int64_t scale_stride, shift_stride;
};

// z = (x - high) a + c of each channel of the run, into three arrays of `channels` numbers.
template <class NormOf>
FD_DEVICE void coefficients(const Film& f, float* high, int64_t sample, int64_t first,
                            int64_t channels, NormOf norm_of) {
  const int64_t threads = static_cast<int64_t>(blockDim.x) * blockDim.y;
  for (int64_t c = threadIdx.y * blockDim.x + threadIdx.x; c < channels; c += threads) {
    const int64_t channel = first + c;
    const Norm n = FD_GROUPS ? norm_of(c) : Norm{0.0f, 0.0f, 1.0f};
    float a = n.rstd, b = 0.0f;
    if (FD_WEIGHT) a *= fd_load<FD_PARAM_DTYPE>(f.weight, channel);
    if (FD_BIAS) b = fd_load<FD_PARAM_DTYPE>(f.bias, channel);
    if (FD_SCALE) {
      const float s = fd_load<FD_FILM_DTYPE>(f.scale, sample * f.scale_stride + channel);
      a *= FD_PLUS_ONE ? 1.0f + s : s;
      b *= FD_PLUS_ONE ? 1.0f + s : s;
    }
    if (FD_SHIFT) b += fd_load<FD_FILM_DTYPE>(f.shift, sample * f.shift_stride + channel);
    high[c] = n.high;
    high[channels + c] = a;
    high[2 * channels + c] = b - n.low * a;
  }
  __syncthreads();
}

template <int kBatch, class Read>
FD_DEVICE void apply(const Tile& t, const float* high, const void* residual, void* out, Read read) {
  float mean[FD_PACK], a[FD_PACK], b[FD_PACK];
  const auto fetch = [&](int channel, int step) {
#pragma unroll
    for (int k = 0; k < FD_PACK; ++k) {
      const int64_t c = channel + k * step;
      mean[k] = FD_GROUPS ? high[c] : 0.0f;
      a[k] = high[t.channels + c];
      b[k] = high[2 * t.channels + c];
    }
  };
  if (FD_FIXED && threadIdx.x < t.channels / FD_PACK)
    fetch(static_cast<int>(threadIdx.x) * FD_PACK, 1);
  const auto load = [&](int64_t at, int64_t place, float* v) {
    read(at, place, v);
    if (FD_RESIDUAL) fd_load_pack<FD_DTYPE, FD_PACK>(residual, at, FD_PACK, v + FD_PACK);
  };
  for_all<kBatch>(t, load, [&](int64_t at, int64_t, int channel, float* v) {
    if (!FD_FIXED) fetch(channel, FD_LAST);
#pragma unroll
    for (int k = 0; k < FD_PACK; ++k) {
      const float z = (FD_GROUPS ? v[k] - mean[k] : v[k]) * a[k] + b[k];
      v[k] = FD_SILU ? fd_silu(z) : z;
      if (FD_RESIDUAL) v[k] += v[FD_PACK + k];
    }
    fd_store_pack<FD_DTYPE, FD_PACK>(out, at, FD_PACK, v);
  });
}
