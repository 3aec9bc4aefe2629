// x = alpha x0 + sigma eps with counter noise, and what a model should predict of it, in one pass.
//
// Macros: FD_DTYPE of x0, x and target; FD_TARGET, which of FdTarget is written (kSample: none);
// and those of elements.h.
#include "cuda/elements.h"
#include "step.h"

extern "C" __global__ void __launch_bounds__(256)
    add_noise(const void* x0, const float* alpha, const float* sigma, const int64_t* seeds,
              int64_t step, int64_t stream, int64_t samples, int64_t size, int64_t channels,
              int64_t pixels, void* x, void* target) {
  const FdShape shape{size, channels, pixels};
  const FdWalk walk = fd_walk();
  const int64_t units = fd_units(shape);
  for (int64_t sample = walk.sample; sample < samples; sample += walk.sample_stride) {
    const uint64_t seed = static_cast<uint64_t>(seeds[sample]);
    const float a = alpha[sample], s = sigma[sample];
    const auto draw = [&](int, int64_t block, float* z) {
      fd_normal4(seed, static_cast<uint32_t>(stream), static_cast<uint32_t>(step),
                 static_cast<uint64_t>(block), z[0], z[1], z[2], z[3]);
    };
    const auto body = [&](int64_t at, int count, const float (*eps)[FD_PACK]) {
      const int64_t here = sample * size + at;
      float clean[FD_PACK], noisy[FD_PACK], wanted[FD_PACK];
      fd_load_pack<FD_DTYPE, FD_PACK>(x0, here, count, clean);
#pragma unroll
      for (int i = 0; i < FD_PACK; ++i) {
        if (!FD_VECTOR && i >= count) break;
        noisy[i] = fd_add_term(a * clean[i], s, eps[0][i]);
        wanted[i] = fd_target<FD_TARGET>(clean[i], eps[0][i], a, s);
      }
      fd_store_pack<FD_DTYPE, FD_PACK>(x, here, count, noisy);
      if (FD_TARGET != kSample) fd_store_pack<FD_DTYPE, FD_PACK>(target, here, count, wanted);
    };
    for (int64_t unit = walk.unit; unit < units; unit += walk.unit_stride)
      fd_for_unit<1>(shape, unit, draw, body);
  }
}
