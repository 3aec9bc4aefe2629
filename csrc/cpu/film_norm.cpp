// Group normalisation, FiLM, SiLU and residual: one pass for the sums, one that applies them.
//
// A sample that one thread owns is still in its cache for the second pass, so that memory sees one
// read and one write.
#include "film_sums.h"
#include "scratch.h"
#include "threads.h"

namespace fd {
namespace FD_ISA {
namespace {

// What the second pass does to channel c: (x - center) * slope + offset.
struct Affine {
  float *center, *slope, *offset;
};

constexpr int64_t kSlab = int64_t{1} << 19;  // bytes of a sample of which a core's cache holds two

// Where x and the result leave no room for each other in a cache, what is written need not be
// fetched first: a third of what memory moves. Every run must start where a line does.
bool streams(const FdFilmNormArgs& a) {
  constexpr int64_t kCaches = int64_t{16} << 20;
  const int64_t size = a.dtype == kFloat32 ? 4 : 2;
  const int64_t run = a.channels_last ? a.channels : a.pixels;
  return 2 * a.samples * a.channels * a.pixels * size >= kCaches && run * size % 64 == 0 &&
         reinterpret_cast<uintptr_t>(a.out) % 64 == 0;
}

#ifdef __AVX512BF16__
bool takes_pairs(const FdFilmNormArgs& a) {
  return a.channels_last && a.dtype == kBFloat16 && a.channels % 32 == 0;
}
#endif

// Mean and deviation of channels [begin, end), which lie in one group, from the moments of x - shift
// over it: `slope` gets 1 / deviation, `offset` what `center` leaves of the mean.
void normalise(const FdFilmNormArgs& a, int64_t begin, int64_t end, float shift,
               const Moments& moments, const Affine& out) {
  double mean = 0.0, rstd = 1.0;
  if (a.groups) {
    const double count = static_cast<double>(a.channels / a.groups * a.pixels);
    const double rest = moments.sum / count, spread = moments.square / count - rest * rest;
    mean = shift + rest;
    rstd = 1.0 / __builtin_sqrt((spread < 0.0 ? 0.0 : spread) + a.eps);  // NaN stays NaN
  }
  // a 16-bit result cannot tell x slope + (offset - mean slope) from (x - mean) slope + offset
  const float center = a.dtype == kFloat32 ? static_cast<float>(mean) : 0.0f;
  fill(out.center + begin, out.center + end, center);
  fill(out.slope + begin, out.slope + end, static_cast<float>(rstd));
  fill(out.offset + begin, out.offset + end, static_cast<float>(mean - center));
}

// Weight, bias and FiLM on top of that.
void modulate(const FdFilmNormArgs& a, int64_t sample, int64_t begin, int64_t end,
              const Affine& out) {
  const float unit = a.silu ? static_cast<float>(kSiluScale) : 1.0f;
  const auto row = [](const void* from, int dtype, int64_t at, int n, float absent) {
    if (!from) return vec_set(absent);
    if (dtype == kFloat32) return vec_load<kFloat32>(from, at, n);
    return dtype == kBFloat16 ? vec_load<kBFloat16>(from, at, n) : vec_load<kFloat16>(from, at, n);
  };
  for (int64_t c = begin; c < end; c += kWidth) {
    const int n = static_cast<int>(least(end - c, kWidth));
    Vec slope = vec_load<kFloat32>(out.slope, c, n) * row(a.weight, a.weight_dtype, c, n, 1.0f);
    Vec offset = row(a.bias, a.weight_dtype, c, n, 0.0f) -
                 vec_load<kFloat32>(out.offset, c, n) * slope;
    if (a.scale) {
      const Vec scale = row(a.scale, a.film_dtype, sample * a.scale_stride + c, n, 0.0f);
      const Vec factor = a.plus_one ? scale + 1.0f : scale;
      slope = slope * factor;
      offset = offset * factor;
    }
    offset = offset + row(a.shift, a.film_dtype, sample * a.shift_stride + c, n, 0.0f);
    vec_store<kFloat32>(slope * unit, out.slope, c, n);
    vec_store<kFloat32>(offset * unit, out.offset, c, n);
  }
}

template <int D, bool kSilu, bool kResidual>
inline void apply(const FdFilmNormArgs& a, int64_t at, int n, Vec center, Vec slope, Vec offset,
                  bool stream) {
  Vec v = vec_load<D>(a.x, at, n);
  if (D == kFloat32) v = v - center;
  v = v * slope + offset;
  if (kSilu) v = vec_silu_scaled<D != kFloat32>(v);
  if (kResidual) v = v + vec_load<D>(a.residual, at, n);
  if (stream && n == kWidth)
    vec_stream<D>(v, a.out, at);
  else
    vec_store<D>(v, a.out, at, n);
}

// Slope and offset in the order in which the second pass reads them.
void arrange(const FdFilmNormArgs& a, const Affine& by) {
#ifdef __AVX512BF16__
  for (int64_t c = 0; takes_pairs(a) && c < a.channels; c += 32) {
    separate(by.slope + c);
    separate(by.offset + c);
  }
#else
  (void)a, (void)by;
#endif
}

#ifdef __AVX512BF16__
// 32 K channels of some pixels. Slope and offset stay in registers: a core that loads one vector a
// cycle would spend a third of its time on loading them again for every pixel.
template <int K, bool kSilu, bool kResidual, bool kStream>
inline void apply_columns(const uint16_t* x, const uint16_t* residual, uint16_t* out,
                          int64_t pixels, int64_t stride, const float* slopes,
                          const float* offsets, int64_t ahead) {
  Vec slope[2 * K], offset[2 * K];
  for (int k = 0; k < 2 * K; ++k) {
    slope[k] = _mm512_load_ps(slopes + 16 * k);
    offset[k] = _mm512_load_ps(offsets + 16 * k);
  }
  for (int64_t i = 0; i < pixels * stride; i += stride) {
    Vec v[2 * K];
    for (int k = 0; k < K; ++k) {
      if (ahead) __builtin_prefetch(x + i + 32 * k + ahead, 0, 2);
      load_pairs(x + i + 32 * k, v[2 * k], v[2 * k + 1]);
    }
    for (int k = 0; k < 2 * K; ++k) v[k] = v[k] * slope[k] + offset[k];
    for (int k = 0; kSilu && k < 2 * K; ++k) v[k] = vec_silu_scaled<true>(v[k]);
    for (int k = 0; k < K; ++k) {
      if (kResidual) {
        Vec even, odd;
        load_pairs(residual + i + 32 * k, even, odd);
        v[2 * k] = v[2 * k] + even;
        v[2 * k + 1] = v[2 * k + 1] + odd;
      }
      store_pairs<kStream>(out + i + 32 * k, v[2 * k], v[2 * k + 1]);
    }
  }
}

// Pixels whose channels are a multiple of 32: loads and stores of 32 neighbours, split into the
// even and the odd ones, which a shift and a mask do where a widening load and two narrowing
// conversions would cost twice that.
template <bool kSilu, bool kResidual, bool kStream>
void apply_pairs(const FdFilmNormArgs& a, int64_t sample, int64_t begin, int64_t end,
                 const Affine& by) {
  // the next sample is asked for while this one computes, where a cache holds both
  const int64_t slab = a.pixels * a.channels, ahead = 2 * slab <= kSlab ? slab : 0;
  constexpr int64_t kRows = 16;  // few enough to stay in L1 from one block of channels to the next
  constexpr int kPairs = 2;
  const int64_t channels = a.channels, first = sample * a.pixels * channels;
  const uint16_t* x = static_cast<const uint16_t*>(a.x) + first;
  const uint16_t* residual = static_cast<const uint16_t*>(a.residual) + first;
  uint16_t* out = static_cast<uint16_t*>(a.out) + first;
  for (int64_t row = begin; row < end; row += kRows) {
    const int64_t rows = least(end - row, kRows), at = row * channels;
    int64_t c = 0;
    for (; c + 32 * kPairs <= channels; c += 32 * kPairs)
      apply_columns<kPairs, kSilu, kResidual, kStream>(x + at + c, residual + at + c, out + at + c, rows,
                                              channels, by.slope + c, by.offset + c, ahead);
    for (; c < channels; c += 32)
      apply_columns<1, kSilu, kResidual, kStream>(x + at + c, residual + at + c, out + at + c, rows,
                                         channels, by.slope + c, by.offset + c, ahead);
  }
  if (kStream) vec_stream_end();
}
#endif

// Pixels [begin, end) of a sample whose channels are the fastest axis.
template <int D, bool kSilu, bool kResidual>
void apply_pixels(const FdFilmNormArgs& a, int64_t sample, int64_t begin, int64_t end,
                  const Affine& by) {
#ifdef __AVX512BF16__
  if (D == kBFloat16 && takes_pairs(a)) {
    return streams(a) ? apply_pairs<kSilu, kResidual, true>(a, sample, begin, end, by)
                      : apply_pairs<kSilu, kResidual, false>(a, sample, begin, end, by);
  }
#endif
  const bool stream = streams(a);
  const int64_t channels = a.channels, whole = channels / kWidth * kWidth;
  const int rest = static_cast<int>(channels - whole);
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const int64_t at = (sample * a.pixels + pixel) * channels;
    for (int64_t c = 0; c < whole; c += kWidth)
      apply<D, kSilu, kResidual>(a, at + c, kWidth, vec_load<kFloat32>(by.center, c),
                                 vec_load<kFloat32>(by.slope, c), vec_load<kFloat32>(by.offset, c), stream);
    if (rest)
      apply<D, kSilu, kResidual>(a, at + whole, rest, vec_load<kFloat32>(by.center, whole, rest),
                                 vec_load<kFloat32>(by.slope, whole, rest),
                                 vec_load<kFloat32>(by.offset, whole, rest), stream);
  }
  if (stream) vec_stream_end();
}

// One channel of a sample whose pixels are the fastest axis.
template <int D, bool kSilu, bool kResidual>
void apply_channel(const FdFilmNormArgs& a, int64_t sample, int64_t channel, const Affine& by) {
  const bool stream = streams(a);
  const int64_t at = (sample * a.channels + channel) * a.pixels;
  const int64_t whole = a.pixels / kWidth * kWidth;
  const Vec center = vec_set(by.center[channel]), slope = vec_set(by.slope[channel]),
            offset = vec_set(by.offset[channel]);
  // the next group is asked for while this one computes: its sums would wait for memory
  const int64_t size = D == kFloat32 ? 4 : 2, next = a.groups ? a.channels / a.groups * a.pixels : 0;
  const char* ahead = static_cast<const char*>(a.x) + (at + next) * size;
  for (int64_t i = 0; i < whole; i += kWidth) {
    if (next) __builtin_prefetch(ahead + i * size, 0, 2);
    apply<D, kSilu, kResidual>(a, at + i, kWidth, center, slope, offset, stream);
  }
  if (whole < a.pixels)
    apply<D, kSilu, kResidual>(a, at + whole, static_cast<int>(a.pixels - whole), center, slope,
                               offset, stream);
  if (stream) vec_stream_end();
}

// --- the two layouts ----------------------------------------------------------------------

using Pixels = void (*)(const FdFilmNormArgs&, int64_t, int64_t, int64_t, const Affine&);
using Channel = void (*)(const FdFilmNormArgs&, int64_t, int64_t, const Affine&);

template <int D>
void choose(const FdFilmNormArgs& a, Pixels& pixels, Channel& channel) {
  if (a.silu && a.residual) {
    pixels = apply_pixels<D, true, true>, channel = apply_channel<D, true, true>;
  } else if (a.silu) {
    pixels = apply_pixels<D, true, false>, channel = apply_channel<D, true, false>;
  } else if (a.residual) {
    pixels = apply_pixels<D, false, true>, channel = apply_channel<D, false, true>;
  } else {
    pixels = apply_pixels<D, false, false>, channel = apply_channel<D, false, false>;
  }
}

// The affine map of a sample from the sums of its parts, which `part_sums` gives in order.
template <class PartSums>
void finish(const FdFilmNormArgs& a, int64_t sample, int64_t parts, const float* shift,
            const Affine& by, const PartSums& part_sums) {
  const int64_t each = channels_a_lane(a), lanes = a.channels / each;
  double* total = scratch<double>(2 * lanes);
  fill(total, total + 2 * lanes, 0.0);
  for (int64_t part = 0; part < parts; ++part) {
    const Sums sums = part_sums(part);
    for (int64_t i = 0; i < lanes; ++i) {
      total[i] += sums.sum[i];
      total[lanes + i] += sums.square[i];
    }
  }
  const int64_t a_group = a.channels / a.groups, lanes_a_group = a_group / each;
  for (int64_t g = 0; g < a.groups; ++g) {
    Moments moments{0.0, 0.0};
    for (int64_t i = g * lanes_a_group; i < (g + 1) * lanes_a_group; ++i) {
      moments.sum += total[i];
      moments.square += total[lanes + i];
    }
    normalise(a, g * a_group, (g + 1) * a_group, shift[g * a_group], moments, by);
  }
  modulate(a, sample, 0, a.channels, by);
  arrange(a, by);
}

constexpr double kCost = 0.2;  // ns an element, both passes

// The arrays of one sample, `channels` floats each.
struct Arrays {
  float *shift, *sum, *square;
  Affine affine;

  static constexpr int64_t kCount = 6;
  Arrays(float* memory, int64_t channels)
      : shift(memory), sum(memory + channels), square(memory + 2 * channels),
        affine{memory + 3 * channels, memory + 4 * channels, memory + 5 * channels} {}
};

void channels_fastest(const FdFilmNormArgs& a, Pixels apply) {
  const Parts parts(a.pixels);
  const int64_t channels = a.channels;
  const double cost = kCost * static_cast<double>(a.pixels * channels);
  const int64_t threads = max_threads();
  if (a.groups && (a.samples % threads == 0 || a.samples >= 4 * threads)) {
    parallel_for(a.samples, cost, [&](int64_t begin, int64_t end) {
      const Arrays arrays(scratch<float>(Arrays::kCount * channels), channels);
      for (int64_t sample = begin; sample < end; ++sample) {
        middles(a, sample, arrays.shift);
        finish(a, sample, parts.count, arrays.shift, arrays.affine, [&](int64_t part) {
          const Sums sums{arrays.sum, arrays.square};
          add_part(a, sample, parts.begin(part), parts.begin(part + 1), arrays.shift, sums);
          return sums;
        });
        apply(a, sample, 0, a.pixels, arrays.affine);
      }
    });
    return;
  }

  // few samples: the parts of each are shared out
  const int64_t units = a.samples * parts.count, a_part = 2 * channels;
  const double part_cost = cost / static_cast<double>(2 * parts.count);
  float* memory = scratch<float>(a.samples * Arrays::kCount * channels + units * a_part);
  float* sums_of = memory + a.samples * Arrays::kCount * channels;
  const auto arrays_of = [&](int64_t sample) {
    return Arrays(memory + sample * Arrays::kCount * channels, channels);
  };
  const auto part_of = [&](int64_t unit) {
    float* at = sums_of + unit * a_part;
    return Sums{at, at + channels};
  };
  for (int64_t sample = 0; sample < a.samples && a.groups; ++sample)
    middles(a, sample, arrays_of(sample).shift);
  if (a.groups) {
    parallel_for(units, part_cost, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t sample = unit / parts.count, part = unit % parts.count;
        add_part(a, sample, parts.begin(part), parts.begin(part + 1), arrays_of(sample).shift,
                 part_of(unit));
      }
    });
  }
  for (int64_t sample = 0; sample < a.samples; ++sample) {
    const Arrays arrays = arrays_of(sample);
    if (a.groups) {
      finish(a, sample, parts.count, arrays.shift, arrays.affine,
             [&](int64_t part) { return part_of(sample * parts.count + part); });
    } else {
      normalise(a, 0, channels, 0.0f, {}, arrays.affine);
      modulate(a, sample, 0, channels, arrays.affine);
      arrange(a, arrays.affine);
    }
  }
  parallel_for(units, part_cost, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t sample = unit / parts.count, part = unit % parts.count;
      apply(a, sample, parts.begin(part), parts.begin(part + 1), arrays_of(sample).affine);
    }
  });
}

// A group is one run of memory.
void pixels_fastest(const FdFilmNormArgs& a, Channel apply) {
  const int64_t groups = a.groups ? a.groups : a.channels, a_group = a.channels / groups;
  const int64_t count = a_group * a.pixels;
  parallel_for(a.samples * groups, kCost * static_cast<double>(count),
               [&](int64_t begin, int64_t end) {
                 const Arrays arrays(scratch<float>(Arrays::kCount * a.channels), a.channels);
                 for (int64_t unit = begin; unit < end; ++unit) {
                   const int64_t sample = unit / groups, first = unit % groups * a_group;
                   const int64_t at = unit * count;
                   const float shift = a.groups ? middle_of_run(a, at, count) : 0.0f;
                   const Moments moments =
                       a.groups ? group_sums(a, at, count, shift) : Moments{0.0, 0.0};
                   normalise(a, first, first + a_group, shift, moments, arrays.affine);
                   modulate(a, sample, first, first + a_group, arrays.affine);
                   for (int64_t c = first; c < first + a_group; ++c)
                     apply(a, sample, c, arrays.affine);
                 }
               });
}

}  // namespace

void film_norm(const FdFilmNormArgs& a) {
  Pixels pixels;
  Channel channel;
  if (a.dtype == kFloat32)
    choose<kFloat32>(a, pixels, channel);
  else if (a.dtype == kBFloat16)
    choose<kBFloat16>(a, pixels, channel);
  else
    choose<kFloat16>(a, pixels, channel);
  if (a.channels_last)
    channels_fastest(a, pixels);
  else
    pixels_fastest(a, channel);
}

}  // namespace FD_ISA
}  // namespace fd
