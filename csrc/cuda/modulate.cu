// x' = x + gate * residual, then (weight * norm(x') + bias) * (1 + scale) + shift, token by token.
//
// blockDim.x threads share a token, in whole warps; blockDim.y tokens share a block. A token is read
// once and kept in registers, or, where it is longer than they hold, read again for each pass. The
// sums are taken in float32 in an order that depends on the shape alone.
//
//   FD_DTYPE, FD_FILM_DTYPE, FD_AFFINE_DTYPE   of x and the results; of scale, shift and gate; of
//                                              weight and bias
//   FD_NORM      0 none, 1 layer, 2 rms
//   FD_HAS       bits: 1 residual, 2 gate, 4 out, 8 scale, 16 shift, 32 weight, 64 bias
//   FD_KEEP      packs of a token that each thread keeps; 0: read again
// and those of elements.h.
#include "cuda/elements.h"

#define FD_HAS_RESIDUAL ((FD_HAS & 1) != 0)
#define FD_HAS_GATE ((FD_HAS & 2) != 0)
#define FD_HAS_OUT ((FD_HAS & 4) != 0)
#define FD_HAS_SCALE ((FD_HAS & 8) != 0)
#define FD_HAS_SHIFT ((FD_HAS & 16) != 0)
#define FD_HAS_WEIGHT ((FD_HAS & 32) != 0)
#define FD_HAS_BIAS ((FD_HAS & 64) != 0)

// Sum over the threads that share a token; every thread of the block calls it.
FD_DEVICE float sum_of_token(float value, float* shared) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
  if (blockDim.x <= 32) return value;
  const unsigned int warps = blockDim.x / 32;
  float* mine = shared + threadIdx.y * warps;
  if (threadIdx.x % 32 == 0) mine[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
  for (unsigned int w = 0; w < warps; ++w) sum += mine[w];
  __syncthreads();  // before the next call writes
  return sum;
}

template <int kDtype>
FD_DEVICE void load(const void* from, int64_t at, float* x) {
  fd_load_pack<kDtype, FD_PACK>(from, at, FD_PACK, x);
}

extern "C" __global__ void __launch_bounds__(256)
    modulate(const void* x, const void* residual, const void* scale, int64_t scale_sample,
             int64_t scale_token, const void* shift, int64_t shift_sample, int64_t shift_token,
             const void* gate, int64_t gate_sample, int64_t gate_token, const void* weight,
             const void* bias, float eps, int64_t samples, int64_t tokens, int64_t channels,
             void* out, void* total) {
  __shared__ float shared[8];
  const int64_t rows = samples * tokens, packs = channels / FD_PACK;
  const float share = 1.0f / static_cast<float>(channels);
  // every thread of a block takes part in its sums, also where its token is past the last
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * blockDim.y; base < rows;
       base += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t row = base + threadIdx.y;
    const int64_t mine = row < rows ? packs : 0;
    const int64_t sample = row / tokens, token = row - sample * tokens;
    const int64_t start = row * channels;

    const auto read = [&](int64_t c, float* v, bool store) {
      load<FD_DTYPE>(x, start + c, v);
      if (!FD_HAS_RESIDUAL) return;
      float h[FD_PACK], g[FD_PACK];
      load<FD_DTYPE>(residual, start + c, h);
      if (FD_HAS_GATE) load<FD_FILM_DTYPE>(gate, sample * gate_sample + token * gate_token + c, g);
#pragma unroll
      for (int i = 0; i < FD_PACK; ++i) v[i] += FD_HAS_GATE ? g[i] * h[i] : h[i];
      if (store) fd_store_pack<FD_DTYPE, FD_PACK>(total, start + c, FD_PACK, v);
    };

#if FD_KEEP > 0
    float kept[FD_KEEP][FD_PACK];
#endif
    // calls body(c, x') for the packs of this thread; the first pass stores x'
    const auto each = [&](bool first, auto body) {
#if FD_KEEP > 0
#pragma unroll
      for (int k = 0; k < FD_KEEP; ++k) {
        const int64_t pack = threadIdx.x + static_cast<int64_t>(k) * blockDim.x;
        if (pack < mine) {
          if (first) read(pack * FD_PACK, kept[k], true);
          body(pack * FD_PACK, kept[k]);
        }
      }
#else
      for (int64_t pack = threadIdx.x; pack < mine; pack += blockDim.x) {
        float v[FD_PACK];
        read(pack * FD_PACK, v, first);
        body(pack * FD_PACK, v);
      }
#endif
    };

    float mean = 0.0f, rest = 0.0f, rstd = 1.0f;
    if (FD_NORM == 0 || !FD_HAS_OUT) {
      if (FD_KEEP > 0 || !FD_HAS_OUT) each(true, [](int64_t, const float*) {});
    } else {
      float first = 0.0f, second = 0.0f;
      each(true, [&](int64_t, const float* v) {
#pragma unroll
        for (int i = 0; i < FD_PACK; ++i) first += FD_NORM == 1 ? v[i] : v[i] * v[i];
      });
      if (FD_NORM == 1) {
        mean = share * sum_of_token(first, shared);
        // what the rounded mean leaves is summed too: a mean far above the deviation costs no digits
        first = 0.0f;
        each(false, [&](int64_t, const float* v) {
#pragma unroll
          for (int i = 0; i < FD_PACK; ++i) {
            const float d = v[i] - mean;
            first += d;
            second += d * d;
          }
        });
        rest = share * sum_of_token(first, shared);
        second = share * sum_of_token(second, shared) - rest * rest;
        second = second < 0.0f ? 0.0f : second;  // by a rounding alone; a NaN must stay
      } else {
        second = share * sum_of_token(first, shared);
      }
      rstd = 1.0f / fd_sqrt(second + eps);
    }
    if (!FD_HAS_OUT) continue;
    each(FD_NORM == 0 && FD_KEEP == 0, [&](int64_t c, const float* v) {
      float y[FD_PACK], p[FD_PACK];
#pragma unroll
      for (int i = 0; i < FD_PACK; ++i) y[i] = ((v[i] - mean) - rest) * rstd;
      if (FD_HAS_WEIGHT) {
        load<FD_AFFINE_DTYPE>(weight, c, p);
#pragma unroll
        for (int i = 0; i < FD_PACK; ++i) y[i] *= p[i];
      }
      if (FD_HAS_BIAS) {
        load<FD_AFFINE_DTYPE>(bias, c, p);
#pragma unroll
        for (int i = 0; i < FD_PACK; ++i) y[i] += p[i];
      }
      if (FD_HAS_SCALE) {
        load<FD_FILM_DTYPE>(scale, sample * scale_sample + token * scale_token + c, p);
#pragma unroll
        for (int i = 0; i < FD_PACK; ++i) y[i] *= 1.0f + p[i];
      }
      if (FD_HAS_SHIFT) {
        load<FD_FILM_DTYPE>(shift, sample * shift_sample + token * shift_token + c, p);
#pragma unroll
        for (int i = 0; i < FD_PACK; ++i) y[i] += p[i];
      }
      fd_store_pack<FD_DTYPE, FD_PACK>(out, start + c, FD_PACK, y);
    });
  }
}
