// Increments of a Brownian path: a weighted sum of counter normals, and x + scale * sum.
//
// Macros: FD_DTYPE of out, FD_ADD (whether x, float32 as out is then, is added), and those of
// elements.h.
#include "cuda/elements.h"
#include "step.h"

extern "C" __global__ void __launch_bounds__(256)
    brownian(const int64_t* seeds, const int32_t* counters, const float* weights, int64_t draws,
             int64_t stream, const float* x, float scale, int64_t samples, int64_t size,
             int64_t channels, int64_t pixels, void* out) {
  const FdShape shape{size, channels, pixels};
  const FdWalk walk = fd_walk();
  const int64_t units = fd_units(shape);
  for (int64_t sample = walk.sample; sample < samples; sample += walk.sample_stride) {
    const uint64_t seed = static_cast<uint64_t>(seeds[sample]);
    const auto draw = [&](int, int64_t block, float* sum) {
      sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
#pragma unroll 1
      for (int64_t k = 0; k < draws; ++k) {
        float z[4];
        fd_normal4(seed, static_cast<uint32_t>(stream), static_cast<uint32_t>(counters[k]),
                   static_cast<uint64_t>(block), z[0], z[1], z[2], z[3]);
        const float weight = weights[k];
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] = fd_add_term(sum[i], weight, z[i]);
      }
    };
    const auto body = [&](int64_t at, int count, const float (*sum)[FD_PACK]) {
      const int64_t place = sample * size + at;
#if FD_ADD
      float value[FD_PACK];
      fd_load_pack<0, FD_PACK>(x, place, count, value);
#pragma unroll
      for (int i = 0; i < FD_PACK; ++i) value[i] = fd_add_term(value[i], scale, sum[0][i]);
      fd_store_pack<FD_DTYPE, FD_PACK>(out, place, count, value);
#else
      fd_store_pack<FD_DTYPE, FD_PACK>(out, place, count, sum[0]);
#endif
    };
    for (int64_t unit = walk.unit; unit < units; unit += walk.unit_stride)
      fd_for_unit<1>(shape, unit, draw, body);
  }
}
