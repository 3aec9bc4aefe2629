// Unit normals of a batch: out[i] = the normals of seeds[i], in the memory order of `out`.
//
// Writes 4 (float32) or 2 (bfloat16, float16) bytes an element, reads nothing but the seeds.
#include "fill_normal.h"
#include "kernels.h"
#include "store.h"
#include "table.h"
#include "threads.h"

namespace fd {
namespace FD_ISA {

void noise(const FdNoiseArgs& a) {
  constexpr int64_t kChunk = 4096;
  const int64_t chunks = (a.size + kChunk - 1) / kChunk;
  const int64_t pixels = a.channels > 0 ? a.size / a.channels : 0;
  parallel_for(a.samples * chunks, 1.0 * kChunk, [&](int64_t begin, int64_t end) {
    float scratch[kChunk];
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t sample = unit / chunks, first = unit % chunks * kChunk;
      const int64_t n = a.size - first < kChunk ? a.size - first : kChunk;
      const int64_t at = sample * a.size + first;
      const uint64_t seed = static_cast<uint64_t>(a.seeds[sample]);
      float* to = a.out_dtype == kFloat32 ? static_cast<float*>(a.out) + at : scratch;
      if (a.channels > 0)
        fill_normal_channels_last(seed, a.stream, a.step, first, n, a.channels, pixels, to);
      else
        fill_normal(seed, a.stream, a.step, first, n, to);
      if (to == scratch) store_as(scratch, a.out_dtype, a.out, at, n);
    }
  });
}

}  // namespace FD_ISA
}  // namespace fd
