// phi std(c) / std(u + w (c - u)) + 1 - phi of each sample; reads both model outputs once.
//
// Float32 inside a chunk, of differences from the first element of the sample, so that a mean costs
// no digits; float64 over the chunks, in an order that depends on the shape alone and without
// atomics, so that two runs agree.
//
//   FD_DTYPE       of both outputs
//   FD_UNITS       packs a thread adds up: FD_UNITS * FD_PACK * blockDim.x elements a chunk
// and those of elements.h.
#include "step.h"

#include "cuda/row_sum.h"

extern "C" __global__ void __launch_bounds__(256)
    guidance_rescale(const void* output, const void* uncond, int64_t output_stride,
                     int64_t uncond_stride, const float* guidance, int64_t samples, int64_t size,
                     float* partial) {
  __shared__ float shared[256];
  const int64_t units = (size + FD_PACK - 1) / FD_PACK;
  const int64_t a_chunk = static_cast<int64_t>(FD_UNITS) * blockDim.x;
  const int64_t chunks = (units + a_chunk - 1) / a_chunk;
  // every thread of a block takes part in its sums, also where its sample is past the last
  for (int64_t start = static_cast<int64_t>(blockIdx.y) * blockDim.y; start < samples;
       start += static_cast<int64_t>(gridDim.y) * blockDim.y) {
    const int64_t sample = start + threadIdx.y;
    const bool present = sample < samples;
    const int64_t c_at = sample * output_stride, u_at = sample * uncond_stride;
    float weight = 1.0f, first[1] = {}, base[1] = {};
    if (present) {
      weight = guidance[sample];
      fd_load_pack<FD_DTYPE, 1>(output, c_at, 1, first);
      fd_load_pack<FD_DTYPE, 1>(uncond, u_at, 1, base);
      base[0] = fd_guide(first[0], base[0], weight);
    }
    for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
      float sums[4] = {};
#pragma unroll 1
      for (int j = 0; j < FD_UNITS; ++j) {
        const int64_t unit = chunk * a_chunk + static_cast<int64_t>(j) * blockDim.x + threadIdx.x;
        if (!present || unit >= units) continue;
        const int64_t at = unit * FD_PACK;
        const int count = size - at < FD_PACK ? static_cast<int>(size - at) : FD_PACK;
        float c[FD_PACK], u[FD_PACK];
        fd_load_pack<FD_DTYPE, FD_PACK>(output, c_at + at, count, c);
        fd_load_pack<FD_DTYPE, FD_PACK>(uncond, u_at + at, count, u);
#pragma unroll
        for (int i = 0; i < FD_PACK; ++i) {
          if (!FD_VECTOR && i >= count) break;
          const float a = c[i] - first[0];
          const float b = fd_guide(c[i], u[i], weight) - base[0];
          sums[0] += a;
          sums[1] += a * a;
          sums[2] += b;
          sums[3] += b * b;
        }
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float sum = sum_of_row(sums[k], shared);
        if (present && threadIdx.x == 0) partial[4 * (sample * chunks + chunk) + k] = sum;
      }
    }
  }
}

FD_DEVICE double fd_spread(double sum, double squares, int64_t size) {
  const double n = static_cast<double>(size), mean = sum / n;
  const double spread = squares / n - mean * mean;
  return spread < 0.0 ? 0.0 : spread;  // NaN stays NaN
}

// The factor of each sample; a block a sample.
extern "C" __global__ void __launch_bounds__(256)
    guidance_rescale_sum(const float* partial, const float* phi, int64_t samples, int64_t size,
                         int64_t chunks, float* out) {
  __shared__ double shared[256];
  for (int64_t sample = blockIdx.x; sample < samples; sample += gridDim.x) {
    double sums[4] = {};
    for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x)
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[k] += partial[4 * (sample * chunks + chunk) + k];
#pragma unroll
    for (int k = 0; k < 4; ++k) sums[k] = sum_of_row(sums[k], shared);
    if (threadIdx.x == 0) {
      const double before = fd_spread(sums[0], sums[1], size);
      const double after = fd_spread(sums[2], sums[3], size), share = phi[sample];
      const double ratio = after == 0.0 ? 1.0 : sqrt(before) / sqrt(after);
      out[sample] = after == 0.0 ? 1.0f : static_cast<float>(share * ratio + (1.0 - share));
    }
  }
}
