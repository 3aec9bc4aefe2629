// z = mu + exp(logvar / 2) eps with counter noise, KL(N(mu, exp(logvar)) || N(0, I)) a sample, and
// the gradients of both. Forward reads mu and logvar, writes z; backward reads them and grad_z,
// writes two gradients and draws eps anew instead of loading it.
//
// z and the gradients are equal in bits on every backend. The KL is a sum: float32 inside a chunk,
// float64 over the chunks, in an order that depends on the shape alone and without atomics, so that
// two runs agree.
//
//   FD_DTYPE       of every tensor but kl, grad_kl and the partial sums
//   FD_UNITS       packs a thread adds up: FD_UNITS * FD_PACK * blockDim.x elements a chunk
//   FD_THROUGH_Z, FD_THROUGH_KL   which gradients come in
// and those of elements.h.
#include "step.h"

#include "cuda/row_sum.h"

extern "C" __global__ void __launch_bounds__(256)
    reparameterize(const void* mu, const void* logvar, const int64_t* seeds, int64_t step,
                   int64_t stream, float low, float high, int64_t draws, int64_t samples,
                   int64_t size, void* z, float* partial) {
  __shared__ float shared[256];
  const FdShape shape{size, 0, 0};
  const int64_t units = fd_units(shape);
  const int64_t a_chunk = static_cast<int64_t>(FD_UNITS) * blockDim.x;
  const int64_t chunks = (units + a_chunk - 1) / a_chunk;
  // every thread of a block takes part in its sums, also where its sample is past the last
  for (int64_t base = static_cast<int64_t>(blockIdx.y) * blockDim.y; base < samples;
       base += static_cast<int64_t>(gridDim.y) * blockDim.y) {
    const int64_t sample = base + threadIdx.y;
    const bool present = sample < samples;
    const uint64_t seed = present ? static_cast<uint64_t>(seeds[sample]) : 0;
    int64_t number = 0;  // of the draw
    const auto draw = [&](int, int64_t block, float* eps) {
      block += number * (fd_draw_stride(size) / 4);
      fd_normal4(seed, static_cast<uint32_t>(stream), static_cast<uint32_t>(step),
                 static_cast<uint64_t>(block), eps[0], eps[1], eps[2], eps[3]);
    };
    for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
      float sum = 0.0f;
      const auto body = [&](int64_t at, int count, const float (*eps)[FD_PACK]) {
        const int64_t here = sample * size + at;
        float m[FD_PACK], lv[FD_PACK], out[FD_PACK];
        fd_load_pack<FD_DTYPE, FD_PACK>(mu, here, count, m);
        fd_load_pack<FD_DTYPE, FD_PACK>(logvar, here, count, lv);
#pragma unroll
        for (int i = 0; i < FD_PACK; ++i) {
          if (!FD_VECTOR && i >= count) break;
          const float bounded = fd_clamp(lv[i], low, high), sd = fd_exp(0.5f * bounded);
          out[i] = fd_add_term(m[i], sd, eps[0][i]);
          // sd^2 - 1 is exact where the variance is near 1: a posterior at the prior costs no digit
          if (number == 0) sum += m[i] * m[i] + ((sd * sd - 1.0f) - bounded);
        }
        fd_store_pack<FD_DTYPE, FD_PACK>(z, (sample * draws + number) * size + at, count, out);
      };
#pragma unroll 1
      for (int j = 0; j < FD_UNITS; ++j) {
        const int64_t unit = chunk * a_chunk + static_cast<int64_t>(j) * blockDim.x + threadIdx.x;
        if (!present || unit >= units) continue;
#pragma unroll 1
        for (number = 0; number < draws; ++number) fd_for_unit<1>(shape, unit, draw, body);
      }
      sum = sum_of_row(sum, shared);
      if (present && threadIdx.x == 0)
        partial[sample * chunks + chunk] = chunks == 1 ? 0.5f * sum : sum;
    }
  }
}

// Half the sum of the partial sums of each sample; a block a sample.
extern "C" __global__ void __launch_bounds__(256)
    reparameterize_sum(const float* partial, int64_t samples, int64_t chunks, float* kl) {
  __shared__ double shared[256];
  for (int64_t sample = blockIdx.x; sample < samples; sample += gridDim.x) {
    double sum = 0.0;
    for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x)
      sum += partial[sample * chunks + chunk];
    sum = sum_of_row(sum, shared);
    if (threadIdx.x == 0) kl[sample] = static_cast<float>(0.5 * sum);
  }
}

// dz/dmu = 1, dz/dlogvar = eps sd / 2; dkl/dmu = mu, dkl/dlogvar = (sd^2 - 1) / 2.
extern "C" __global__ void __launch_bounds__(256)
    reparameterize_backward(const void* grad_z, const float* grad_kl, const void* mu,
                            const void* logvar, const int64_t* seeds, int64_t step, int64_t stream,
                            float low, float high, int64_t draws, int64_t samples, int64_t size,
                            void* grad_mu, void* grad_logvar) {
  const FdShape shape{size, 0, 0};
  const FdWalk walk = fd_walk();
  const int64_t units = fd_units(shape);
  for (int64_t sample = walk.sample; sample < samples; sample += walk.sample_stride) {
    const uint64_t seed = FD_THROUGH_Z ? static_cast<uint64_t>(seeds[sample]) : 0;
    // without a gradient through kl its weight is 0, not left out: a NaN in mu must come through
    const float k = FD_THROUGH_KL ? grad_kl[sample] : 0.0f;
    int64_t number = 0;  // of the draw
    const auto draw = [&](int, int64_t block, float* eps) {
      block += number * (fd_draw_stride(size) / 4);
      fd_normal4(seed, static_cast<uint32_t>(stream), static_cast<uint32_t>(step),
                 static_cast<uint64_t>(block), eps[0], eps[1], eps[2], eps[3]);
    };
    for (int64_t unit = walk.unit; unit < units; unit += walk.unit_stride) {
      float m[FD_PACK], lv[FD_PACK], sd[FD_PACK], a[FD_PACK], b[FD_PACK];
      const auto add = [&](int64_t at, int count, const float (*eps)[FD_PACK]) {
        float g[FD_PACK];
        fd_load_pack<FD_DTYPE, FD_PACK>(grad_z, (sample * draws + number) * size + at, count, g);
#pragma unroll
        for (int i = 0; i < FD_PACK; ++i) {
          if (!FD_VECTOR && i >= count) break;
          const float weighted = g[i] * (sd[i] * eps[0][i]);
          a[i] = number == 0 ? g[i] : a[i] + g[i];
          b[i] = number == 0 ? weighted : b[i] + weighted;
        }
      };
      const int64_t at = unit * FD_PACK, here = sample * size + at;
      const int count = size - at < FD_PACK ? static_cast<int>(size - at) : FD_PACK;
      fd_load_pack<FD_DTYPE, FD_PACK>(logvar, here, count, lv);
#pragma unroll
      for (int i = 0; i < FD_PACK; ++i) {
        if (!FD_VECTOR && i >= count) break;
        sd[i] = fd_exp(0.5f * fd_clamp(lv[i], low, high));
      }
      if (FD_THROUGH_Z) {
#pragma unroll 1
        for (number = 0; number < draws; ++number) fd_for_unit<1>(shape, unit, draw, add);
      }
      // again, from the cache: kept over the draws, it would not fit the registers
      fd_load_pack<FD_DTYPE, FD_PACK>(logvar, here, count, lv);
      fd_load_pack<FD_DTYPE, FD_PACK>(mu, here, count, m);
#pragma unroll
      for (int i = 0; i < FD_PACK; ++i) {
        if (!FD_VECTOR && i >= count) break;
        const float to_mu = k * m[i], to_variance = k * (sd[i] * sd[i] - 1.0f);
        a[i] = FD_THROUGH_Z ? a[i] + to_mu : to_mu;
        b[i] = 0.5f * (FD_THROUGH_Z ? b[i] + to_variance : to_variance);
        if (fd_beyond(lv[i], low, high)) b[i] = 0.0f;
      }
      fd_store_pack<FD_DTYPE, FD_PACK>(grad_mu, here, count, a);
      fd_store_pack<FD_DTYPE, FD_PACK>(grad_logvar, here, count, b);
    }
  }
}
