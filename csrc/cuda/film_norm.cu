// GroupNorm, FiLM, activation and residual.
//
//   film_norm_resident    x is read once: a block, or a cluster of blocks, keeps the pixels of a run
//                         of whole groups in shared memory, so that the mean, the variance around
//                         it and the result cost one read and one write
//   film_norm_statistics  for what does not fit there: sums of chunks of pixels,
//   film_norm_merge       the mean and the deviation of each group from them,
//   film_norm_apply       and a second read; alone, it is FiLM without a normalisation
//
// Nothing is added up by atomics and the order of every sum depends on the shape alone, so two runs
// agree. No bits are promised across backends: sums may take another order, and FD_CONTRACT lets
// mul and add become fma.
//
// A block works on a run of channels by a range of pixels. In both memory orders its threads walk an
// outer axis by y and an inner, consecutive one by x: pixels by channels where channels are
// consecutive, else channels by pixels.
//
//   FD_DTYPE, FD_PARAM_DTYPE, FD_FILM_DTYPE   of x, residual and out; weight and bias; scale and shift
//   FD_GROUPS, FD_WEIGHT, FD_BIAS, FD_SCALE, FD_SHIFT, FD_SILU, FD_RESIDUAL   1: there is one
//   FD_PLUS_ONE  1: times 1 + scale, 0: times scale
//   FD_LAST      1: channels are the fastest axis
//   FD_FIXED     1: a thread keeps to FD_PACK channels (FD_LAST, one pack a thread and pixel);
//                0: the run is one group, or nothing is added up
//   FD_CLUSTER   blocks that share a run by pixels
//   FD_THREADS   the most of a block
// and FD_PACK and FD_VECTOR of elements.h.
#include "cuda/film.h"

// Block `rank` of a cluster has `share` pixels of `channels` channels, which are whole groups of
// `width` channels. Shared memory: the slab, sums of the threads, of the groups, coefficients.
extern "C" __global__ void __launch_bounds__(FD_THREADS)
    film_norm_resident(const void* x, const void* weight, const void* bias, const void* scale,
                       int64_t scale_stride, const void* shift, int64_t shift_stride,
                       const void* residual, void* out, int64_t all_channels, int64_t all_pixels,
                       int64_t runs, int64_t channels, int64_t width, int64_t share, float eps) {
  FD_DYNAMIC_SHARED(memory);
  const uint32_t task = blockIdx.x / FD_CLUSTER, across = static_cast<uint32_t>(runs);
  const int64_t rank = fd_cluster_rank();
  const int64_t sample = task / across, first = task % across * channels;
  const auto pixels_of = [&](int64_t k) {  // of block k, none where the others have them all
    const int64_t left = least(all_pixels - k * share, share);
    return left > 0 ? left : 0;
  };
  const Tile t = tile_of(sample, first, rank * share, channels, pixels_of(rank), all_channels,
                         all_pixels);
  const int group_channels = static_cast<int>(width);
  const int groups = static_cast<int>(channels) / group_channels;

  unsigned char* slab = memory;
  float* scratch = reinterpret_cast<float*>(slab + (share * channels * kSize + 15) / 16 * 16);
  const Sums s{scratch + blockDim.x * blockDim.y * kLanes,
               scratch + blockDim.x * blockDim.y * kLanes + groups,
               scratch + blockDim.x * blockDim.y * kLanes + 2 * groups};
  Norm* norms = reinterpret_cast<Norm*>(s.second + groups);
  float* coefficient = reinterpret_cast<float*>(norms + groups);

  const auto resident = [&](int64_t, int64_t place, float* v) {
    fd_load_pack<FD_DTYPE, FD_PACK>(slab, place, FD_PACK, v);
  };
  // a thread reads back only what it copied itself, so the slab needs no barrier
  const uint32_t outer = static_cast<uint32_t>(FD_LAST ? t.pixels : t.channels);
  const uint32_t rows = kStages * blockDim.y;
  const int64_t a_stage = (outer + rows - 1) / rows * blockDim.y;
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    for_packs<1>(
        t, stage * a_stage, least((stage + 1) * a_stage, outer), t.pixels,
        [&](int64_t at, int64_t place, float*) {
          if constexpr (FD_PACK * kSize >= 4)
            fd_copy_async<FD_PACK * kSize>(slab + place * kSize,
                                           static_cast<const char*>(x) + at * kSize);
          else
            reinterpret_cast<uint16_t*>(slab)[place] = static_cast<const uint16_t*>(x)[at];
        },
        [](int64_t, int64_t, int, const float*) {});
    fd_commit();
  }
  float sum[kLanes] = {};
  const auto add = [&](int stage) {
    for_packs<2>(t, stage * a_stage, least((stage + 1) * a_stage, outer), t.pixels, resident,
                 [&](int64_t, int64_t, int, const float* v) { fd_add(sum, v); });
  };
  static_assert(kStages == 4, "one wait a stage");
  fd_wait<3>();
  add(0);
  fd_wait<2>();
  add(1);
  fd_wait<1>();
  add(2);
  fd_wait<0>();
  add(3);
  group_sums(sum, scratch, s.pivot, group_channels, groups);
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  const int threads = static_cast<int>(blockDim.x * blockDim.y);
  for (int g = thread; g < groups; g += threads)
    s.pivot[g] = t.pixels > 0 ? s.pivot[g] / static_cast<float>(t.pixels * width) : 0.0f;
  __syncthreads();
  group_moments<2>(t, s, scratch, group_channels, groups, resident);
  fd_cluster_arrive();
  fd_cluster_wait();
  for (int g = thread; g < groups; g += threads) {
    const double origin = fd_cluster_read(s.pivot + g, 0);
    Merged m{0.0, 0.0};
#pragma unroll
    for (uint32_t k = 0; k < FD_CLUSTER; ++k)
      m = fd_merge(m, origin, static_cast<double>(pixels_of(k) * width),
                   fd_cluster_read(s.pivot + g, k), fd_cluster_read(s.first + g, k),
                   fd_cluster_read(s.second + g, k));
    norms[g] = fd_norm(m, origin, static_cast<double>(all_pixels * width), eps);
  }
  fd_cluster_arrive();
  __syncthreads();
  const Film f{weight, bias, scale, shift, scale_stride, shift_stride};
  coefficients(f, coefficient, sample, first, channels,
               [&](int64_t c) { return norms[static_cast<int>(c) / group_channels]; });
  apply<2>(t, coefficient, residual, out, resident);
  fd_cluster_wait();  // shared memory ends with its block: not before the others have read it
}

struct Place {
  int64_t run, chunk, sample;
};

// Of a block among runs of channels, then chunks of pixels, then samples. In 32 bits: a division of
// 64 is a call.
FD_DEVICE Place place_of(int64_t runs, int64_t chunks) {
  const uint32_t across = static_cast<uint32_t>(runs), down = static_cast<uint32_t>(chunks);
  const uint32_t rest = blockIdx.x / across;
  return {blockIdx.x % across, rest % down, rest / down};
}

// Blocks: sample, chunk of `share` pixels, run of `channels` channels; three sums a group.
extern "C" __global__ void __launch_bounds__(FD_THREADS)
    film_norm_statistics(const void* x, float* partial, int64_t all_channels, int64_t all_pixels,
                         int64_t runs, int64_t chunks, int64_t channels, int64_t width,
                         int64_t share) {
  FD_DYNAMIC_SHARED(memory);
  const Place at_block = place_of(runs, chunks);
  const int64_t run = at_block.run, chunk = at_block.chunk, sample = at_block.sample;
  const Tile t = tile_of(sample, run * channels, chunk * share, channels,
                   least(share, all_pixels - chunk * share), all_channels, all_pixels);
  const int groups = static_cast<int>(channels) / static_cast<int>(width);
  float* scratch = reinterpret_cast<float*>(memory);
  float* sums = scratch + blockDim.x * blockDim.y * kLanes;
  const Sums s{sums, sums + groups, sums + 2 * groups};
  const auto read = [&](int64_t at, int64_t, float* v) {
    fd_load_pack<FD_DTYPE, FD_PACK>(x, at, FD_PACK, v);
  };
  // the pivot is the mean of the first pixels: as far from that of the chunk as chance may have it,
  // and never more than sqrt(chunk / first pixels) deviations
  Tile head = t;
  head.pixels = least(t.pixels, FD_LAST ? blockDim.y : blockDim.x * FD_PACK);
  float sum[kLanes] = {};
  for_all<1>(head, read, [&](int64_t, int64_t, int, const float* v) { fd_add(sum, v); });
  group_sums(sum, scratch, s.pivot, static_cast<int>(width), groups);
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  const int threads = static_cast<int>(blockDim.x * blockDim.y);
  for (int g = thread; g < groups; g += threads)
    s.pivot[g] /= static_cast<float>(head.pixels * width);
  __syncthreads();
  group_moments<4>(t, s, scratch, static_cast<int>(width), groups, read);
  for (int g = thread; g < groups; g += threads) {
    // chunks of one group side by side
    const int64_t at = 3 * (((sample * runs + run) * groups + g) * chunks + chunk);
    partial[at] = s.pivot[g];
    partial[at + 1] = s.first[g];
    partial[at + 2] = s.second[g];
  }
}

// A block a group: mean and 1 / sqrt(variance + eps) from the sums of its chunks.
extern "C" __global__ void __launch_bounds__(FD_THREADS)
    film_norm_merge(const float* partial, float* norms, int64_t all_pixels, int64_t width,
                    int64_t chunks, int64_t share, float eps) {
  __shared__ Merged shared[FD_THREADS];
  const float* sums = partial + 3 * chunks * blockIdx.x;
  const double origin = sums[0];
  Merged m{0.0, 0.0};
  for (int64_t k = threadIdx.x; k < chunks; k += blockDim.x)
    m = fd_merge(m, origin, static_cast<double>(least(share, all_pixels - k * share) * width),
                 sums[3 * k], sums[3 * k + 1], sums[3 * k + 2]);
  shared[threadIdx.x] = m;
  for (unsigned int half = blockDim.x / 2; half > 0; half /= 2) {  // a power of two
    __syncthreads();
    if (threadIdx.x < half) {
      shared[threadIdx.x].first += shared[threadIdx.x + half].first;
      shared[threadIdx.x].second += shared[threadIdx.x + half].second;
    }
  }
  if (threadIdx.x == 0)
    reinterpret_cast<Norm*>(norms)[blockIdx.x] =
        fd_norm(shared[0], origin, static_cast<double>(all_pixels * width), eps);
}

// Blocks: sample, chunk of `share` pixels, run of `channels` channels, the last of them shorter.
extern "C" __global__ void __launch_bounds__(FD_THREADS)
    film_norm_apply(const void* x, const float* norms, const void* weight, const void* bias,
                    const void* scale, int64_t scale_stride, const void* shift,
                    int64_t shift_stride, const void* residual, void* out, int64_t all_channels,
                    int64_t all_pixels, int64_t runs, int64_t chunks, int64_t channels,
                    int64_t groups, int64_t width, int64_t share) {
  FD_DYNAMIC_SHARED(memory);
  const Place at_block = place_of(runs, chunks);
  const int64_t chunk = at_block.chunk, sample = at_block.sample;
  const int64_t first = at_block.run * channels;
  const Tile t = tile_of(sample, first, chunk * share, least(channels, all_channels - first),
                         least(share, all_pixels - chunk * share), all_channels, all_pixels);
  float* coefficient = reinterpret_cast<float*>(memory);
  const Film f{weight, bias, scale, shift, scale_stride, shift_stride};
  coefficients(f, coefficient, sample, first, t.channels, [&](int64_t c) {
    const uint32_t group = static_cast<uint32_t>(first + c) / static_cast<uint32_t>(width);
    return reinterpret_cast<const Norm*>(norms)[sample * groups + group];
  });
  apply<2>(t, coefficient, residual, out, [&](int64_t at, int64_t, float* v) {
    fd_load_pack<FD_DTYPE, FD_PACK>(x, at, FD_PACK, v);
  });
}
