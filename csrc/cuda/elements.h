// Packs of consecutive elements of one sample: loads, stores, and the walk over a batch.
//
// A kernel is compiled for one case, chosen by the macros of fastdiff/ops/_cuda.py:
//   FD_PACK           elements a thread handles together
//   FD_VECTOR         1: whole packs, aligned, so that each is one load or store
//   FD_CHANNELS_LAST  1: channels are the fastest axis and the kernel needs logical indices
#pragma once

#include "half.h"

#ifdef __CUDACC__
#define FD_MEMBER __host__ __device__ __forceinline__
#define FD_DEVICE static __device__ __forceinline__  // for what has no meaning on the host
#else
#define FD_MEMBER inline
#define FD_DEVICE static inline
#endif

// consecutive bytes that move in one instruction (up to 16 of them)
template <int kBytes>
struct alignas(kBytes < 16 ? kBytes : 16) FdBytes {
  uint32_t word[kBytes / 4];
};

#ifdef __CUDA_ARCH__
// in PTX: from a plain assignment the compiler makes single stores where it finds no better
FD_INLINE void fd_store_bytes(void* to, const FdBytes<16>& x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.word[0]),
               "r"(x.word[1]), "r"(x.word[2]), "r"(x.word[3])
               : "memory");
}
FD_INLINE void fd_store_bytes(void* to, const FdBytes<8>& x) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(x.word[0]), "r"(x.word[1])
               : "memory");
}
#else
template <int kBytes>
FD_INLINE void fd_store_bytes(void* to, const FdBytes<kBytes>& x) {
  *static_cast<FdBytes<kBytes>*>(to) = x;
}
#endif

template <int kDtype>
FD_INLINE float fd_load(const void* from, int64_t at) {
  if (kDtype == kFloat32) return static_cast<const float*>(from)[at];
  const uint16_t x = static_cast<const uint16_t*>(from)[at];
  return kDtype == kBFloat16 ? fd_from_bf16(x) : fd_from_f16(x);
}

template <int kDtype>
FD_INLINE void fd_store(void* to, int64_t at, float x) {
  if (kDtype == kFloat32)
    static_cast<float*>(to)[at] = x;
  else
    static_cast<uint16_t*>(to)[at] = kDtype == kBFloat16 ? fd_to_bf16(x) : fd_to_f16(x);
}

// Elements [at, at + count) of `from` as float32; `count` is kPack where FD_VECTOR is set.
template <int kDtype, int kPack>
FD_INLINE void fd_load_pack(const void* from, int64_t at, int count, float* x) {
  if constexpr (FD_VECTOR && kPack > 1) {
    constexpr int kSize = kDtype == kFloat32 ? 4 : 2;
    const auto pack = *reinterpret_cast<const FdBytes<kPack * kSize>*>(
        static_cast<const char*>(from) + at * kSize);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      if constexpr (kDtype == kFloat32) {
        x[i] = fd_as_float(pack.word[i]);
      } else {
        const uint16_t half = static_cast<uint16_t>(pack.word[i / 2] >> (i % 2 * 16));
        x[i] = kDtype == kBFloat16 ? fd_from_bf16(half) : fd_from_f16(half);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPack; ++i)
      if (kPack == 1 || i < count) x[i] = fd_load<kDtype>(from, at + i);
  }
}

template <int kDtype, int kPack>
FD_INLINE void fd_store_pack(void* to, int64_t at, int count, const float* x) {
  if constexpr (FD_VECTOR && kPack > 1) {
    constexpr int kSize = kDtype == kFloat32 ? 4 : 2;
    FdBytes<kPack * kSize> pack;
#pragma unroll
    for (int i = 0; i < kPack * kSize / 4; ++i) {
      if constexpr (kDtype == kFloat32) {
        pack.word[i] = fd_as_uint(x[i]);
      } else {
        const auto half = [&](int k) -> uint32_t {
          return kDtype == kBFloat16 ? fd_to_bf16(x[k]) : fd_to_f16(x[k]);
        };
        pack.word[i] = half(2 * i) | half(2 * i + 1) << 16;
      }
    }
    fd_store_bytes(static_cast<char*>(to) + at * kSize, pack);
  } else {
#pragma unroll
    for (int i = 0; i < kPack; ++i)
      if (kPack == 1 || i < count) fd_store<kDtype>(to, at + i, x[i]);
  }
}

// Position of a thread in the batch: threads along x share a sample, blocks stride over both.
struct FdWalk {
  int64_t sample, sample_stride, unit, unit_stride;
};

FD_DEVICE FdWalk fd_walk() {
  return {static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y,
          static_cast<int64_t>(gridDim.y) * blockDim.y,
          static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x,
          static_cast<int64_t>(gridDim.x) * blockDim.x};
}

// Calls body(at, count, normals) for the packs of one unit of work, where normals(k) are those of
// draw k. A unit is the part of a sample that shares Philox calls:
//
// - memory order is logical order (or no noise is drawn): one pack;
// - channels last: FD_PACK channels by four pixels. Element 4 * block of the noise may be any pixel
//   of its channel: where the number of pixels is no multiple of 4, a channel starts `shift`
//   elements into a block, and quad q holds its pixels 4 q - shift .. 4 q - shift + 3.
//
// draw(block, z) gives the four normals of a block; kDraws of them are asked for each block.
struct FdShape {
  int64_t size, channels, pixels;
};

FD_INLINE int64_t fd_units(const FdShape& s) {
#if FD_CHANNELS_LAST
  return (s.pixels + (s.pixels % 4 != 0 ? 3 : 0) + 3) / 4 * (s.channels / FD_PACK);
#else
  return (s.size + FD_PACK - 1) / FD_PACK;
#endif
}

template <int kDraws, class Draw, class Body>
FD_INLINE void fd_for_unit(const FdShape& s, int64_t unit, Draw draw, Body body) {
  constexpr int kRoom = kDraws > 0 ? kDraws : 1;
#if FD_CHANNELS_LAST
  const uint64_t across = static_cast<uint64_t>(s.channels / FD_PACK);
  const int64_t q = static_cast<int64_t>(static_cast<uint64_t>(unit) / across);
  const int64_t c = (unit - q * static_cast<int64_t>(across)) * FD_PACK;
  float z[kRoom][FD_PACK][4];
  int shift = 0;
#pragma unroll
  for (int j = 0; j < FD_PACK; ++j) {
    const int64_t first = (c + j) * s.pixels;
    shift = static_cast<int>(first & 3);  // FD_PACK > 1 only where pixels is a multiple of 4
#pragma unroll
    for (int d = 0; d < kDraws; ++d) draw(d, (first >> 2) + q, z[d][j]);
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int64_t pixel = 4 * q - shift + k;
    if (pixel < 0 || pixel >= s.pixels) continue;
    float n[kRoom][FD_PACK];
#pragma unroll
    for (int d = 0; d < kDraws; ++d)
#pragma unroll
      for (int j = 0; j < FD_PACK; ++j) n[d][j] = z[d][j][k];
    body(pixel * s.channels + c, FD_PACK, n);
  }
#else
  const int64_t at = unit * FD_PACK;
  const int count = s.size - at < FD_PACK ? static_cast<int>(s.size - at) : FD_PACK;
  float n[kRoom][FD_PACK];
#pragma unroll
  for (int d = 0; d < kDraws; ++d)
#pragma unroll
    for (int j = 0; j < FD_PACK; j += 4) draw(d, unit * (FD_PACK / 4) + j / 4, n[d] + j);
  body(at, count, n);
#endif
}
