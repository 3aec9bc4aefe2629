// Unit normals of a batch: writes each element once, reads nothing but the seeds.
//
// Macros: FD_DTYPE, and those of elements.h.
#include "cuda/elements.h"

extern "C" __global__ void __launch_bounds__(256)
    noise(const int64_t* seeds, int64_t step, int64_t stream, int64_t samples, int64_t size,
          int64_t channels, int64_t pixels, void* out) {
  const FdShape shape{size, channels, pixels};
  const FdWalk walk = fd_walk();
  const int64_t units = fd_units(shape);
  for (int64_t sample = walk.sample; sample < samples; sample += walk.sample_stride) {
    const uint64_t seed = static_cast<uint64_t>(seeds[sample]);
    const auto draw = [&](int, int64_t block, float* z) {
      fd_normal4(seed, static_cast<uint32_t>(stream), static_cast<uint32_t>(step),
                 static_cast<uint64_t>(block), z[0], z[1], z[2], z[3]);
    };
    const auto body = [&](int64_t at, int count, const float (*z)[FD_PACK]) {
      fd_store_pack<FD_DTYPE, FD_PACK>(out, sample * size + at, count, z[0]);
    };
    for (int64_t unit = walk.unit; unit < units; unit += walk.unit_stride)
      fd_for_unit<1>(shape, unit, draw, body);
  }
}
