// One row of a StepTable over a batch: guidance, conversion, clipping, the affine combination of
// at most eleven tensors with counter noise among them, the history push and the next model input,
// in one pass over memory.
//
// Reads each present input once, writes each present output once; scratch stays in L1.
// Accumulates in float32, in the fixed order of ../step.h: results are bits, not tolerances.
#include "../step.h"

#include "fill_normal.h"
#include "kernels.h"
#include "store.h"
#include "table.h"
#include "threads.h"

namespace fd {
namespace FD_ISA {
namespace {

constexpr int kChunk = 1024;
constexpr int64_t kFar = 1 << 18;  // elements of a tensor that has left the second-level cache

struct Terms {
  const float* tensor[kTerms];
  float coefficient[kTerms];
  int count = 0;

  void add(float c, const float* t) {
    if (c != 0.0f) {
      tensor[count] = t;
      coefficient[count++] = c;
    }
  }
};

// The number of terms is a template argument so that coefficients and partial sums stay in
// registers: one load a term, no pass over scratch. `out` may be one of the tensors.
template <int kCount>
void combine_fixed(const Terms& terms, float* out, int n) {
  const float* t[kCount > 0 ? kCount : 1];
  float c[kCount > 0 ? kCount : 1];
  for (int k = 0; k < kCount; ++k) {
    t[k] = terms.tensor[k];
    c[k] = terms.coefficient[k];
  }
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    float acc = 0.0f;
#pragma GCC unroll 11
    for (int k = 0; k < kCount; ++k) acc = fd_add_term(acc, c[k], t[k][i]);
    out[i] = acc;
  }
}

void combine(const Terms& terms, float* out, int n) {
  using Function = void (*)(const Terms&, float*, int);
  static constexpr Function kByCount[kTerms + 1] = {
      combine_fixed<0>, combine_fixed<1>, combine_fixed<2>,  combine_fixed<3>,
      combine_fixed<4>, combine_fixed<5>, combine_fixed<6>,  combine_fixed<7>,
      combine_fixed<8>, combine_fixed<9>, combine_fixed<10>, combine_fixed<11>};
  kByCount[terms.count](terms, out, n);
}

struct Scratch {
  float m[kChunk], u[kChunk], v[kChunk], d[kChunk], n1[kChunk], n2[kChunk], out[kChunk];
};

// Lines of memory that the next chunk will want. Drawing noise keeps the arithmetic units busy for
// most of a microsecond a chunk, in which the loads of the next one can be under way; without a
// hint the two take turns. A prefetch cannot fault, so the end of a tensor needs no care.
struct Ahead {
  const char* read[2];
  char* write;
  int64_t bytes[2];

  void ask(int part, int parts, int n) const {
    for (int k = 0; k < 2; ++k) {
      const int64_t begin = n * bytes[k] * part / parts, end = n * bytes[k] * (part + 1) / parts;
      for (int64_t i = begin; read[k] && i < end; i += 64) __builtin_prefetch(read[k] + i, 0);
    }
    const int64_t begin = int64_t{4} * n * part / parts, end = int64_t{4} * n * (part + 1) / parts;
    for (int64_t i = begin; write && i < end; i += 64) __builtin_prefetch(write + i, 1);
  }
};

void draw(const FdStepArgs& a, int64_t sample, int32_t stream, int32_t counter, int64_t first,
          int n, const Ahead& ahead, float* to) {
  const uint64_t seed = static_cast<uint64_t>(a.seeds[sample]);
  const uint32_t s = static_cast<uint32_t>(stream), step = static_cast<uint32_t>(counter);
  if (a.channels > 0) {
    ahead.ask(0, 1, n);
    fill_normal_channels_last(seed, s, step, first, n, a.channels, a.size / a.channels, to);
    return;
  }
  // tensors that fit in the cache need no hint, and short runs of noise cost a tenth more
  const bool far = a.samples * a.size >= kFar;
  const int piece = far ? kChunk / 4 : kChunk;
  for (int at = 0; at < n; at += piece) {
    if (far) ahead.ask(at / piece, kChunk / piece, kChunk);
    fill_normal(seed, s, step, first + at, n - at < piece ? n - at : piece, to + at);
  }
}

bool uses(const float* row, FdTerm term) { return row[kA + term] != 0.0f || row[kB + term] != 0.0f; }

void step_chunk(const FdStepArgs& a, int64_t sample, int64_t first, int n, Scratch& s) {
  const int64_t row_index = a.rows ? a.rows[sample] : a.row;
  const float* row = a.row_floats + row_index * kRowFloats;
  const int32_t* info = a.row_ints + row_index * kRowInts;
  const int64_t at = sample * a.size + first;

  const float* m = nullptr;
  const float* u = nullptr;
  if (info[kFlags] & kEvaluates) {
    m = load_as_float(a.output, a.output_dtype, sample * a.output_stride + first, n, s.m);
    if (a.uncond) {
      u = load_as_float(a.uncond, a.output_dtype, sample * a.uncond_stride + first, n, s.u);
      const float weight = a.guidance ? a.guidance[sample] : a.guidance_all;
      if (weight != 1.0f) {
        const float* cond = m;
#pragma omp simd
        for (int i = 0; i < n; ++i) s.m[i] = fd_guide(cond[i], u[i], weight);
        m = s.m;
      }
    }
  }

  const int push = info[kPush];
  if (push >= 0 || uses(row, kD)) {
    Terms convert;
    convert.add(row[kP], a.x + at);
    convert.add(row[kQ], m);
    combine(convert, s.d, n);
    const float bound = a.clip ? a.clip[sample] : a.clip_all;
    if (bound >= 0.0f) {
#pragma omp simd
      for (int i = 0; i < n; ++i) s.d[i] = fd_clip(s.d[i], bound);
    }
  }

  if (uses(row, kN1)) {
    const int64_t width = a.output_dtype == kFloat32 ? 4 : 2;
    const char* output = static_cast<const char*>(a.output);
    const Ahead ahead{
        {reinterpret_cast<const char*>(a.x + at + n),
         output ? output + (sample * a.output_stride + first + n) * width : nullptr},
        a.out == a.x ? nullptr : reinterpret_cast<char*>(a.out + at + n),
        {4, width}};
    draw(a, sample, info[kStream1], info[kCounter1], first, n, ahead, s.n1);
    if (info[kFlags] & kLearnedVariance) {
      const float* v = load_as_float(a.variance, a.output_dtype,
                                     sample * a.variance_stride + first, n, s.v);
      const float scale = row[kLvScale], shift = row[kLvShift];
#pragma omp simd
      for (int i = 0; i < n; ++i) s.n1[i] = fd_exp(scale * v[i] + shift) * s.n1[i];
    }
  }
  if (uses(row, kN2)) draw(a, sample, info[kStream2], info[kCounter2], first, n, Ahead{}, s.n2);

  Terms to_x, to_y;
  const auto add = [&](int term, const float* tensor) {
    to_x.add(row[kA + term], tensor);
    to_y.add(row[kB + term], tensor);
  };
  add(kX, a.x + at);
  add(kY, a.y ? a.y + at : nullptr);
  add(kM, m);
  add(kD, s.d);
  for (int k = 0; k < 4; ++k) add(kH0 + k, a.history[k] ? a.history[k] + at : nullptr);
  add(kN1, s.n1);
  add(kN2, s.n2);
  add(kU, u);

  // y' first: x' may be written over x, which y' still reads, so x' waits in scratch then
  float* out = a.out + at;
  if (to_y.count > 0) {
    combine(to_x, s.out, n);
    combine(to_y, a.y + at, n);
    store_as(s.out, kFloat32, a.out, at, n);
  } else {
    combine(to_x, out, n);
  }
  if (push >= 0) store_as(s.d, kFloat32, a.history[push], at, n);
  if (a.model_input) {
    const float c_in = row[kCIn];
#pragma omp simd
    for (int i = 0; i < n; ++i) s.out[i] = c_in * out[i];
    store_as(s.out, a.model_input_dtype, a.model_input, at, n);
  }
}

// A row that needs no scratch: x' from float32 tensors as they lie, for all samples alike.
bool direct(const FdStepArgs& a, const float* row, const int32_t* info) {
  const bool guided = a.uncond && (a.guidance || a.guidance_all != 1.0f);
  const bool scratch = info[kPush] >= 0 || uses(row, kD) || uses(row, kN1) || uses(row, kN2);
  bool writes_y = false;
  for (int k = 0; k < kTerms; ++k) writes_y = writes_y || row[kB + k] != 0.0f;
  return !a.rows && !scratch && !guided && !writes_y && !a.model_input &&
         (!(info[kFlags] & kEvaluates) || a.output_dtype == kFloat32);
}

}  // namespace

void reverse_step(const FdStepArgs& a) {
  const int64_t any = a.rows && a.samples > 0 ? a.rows[0] : a.row;
  const float* row = a.row_floats + any * kRowFloats;
  const bool straight = direct(a, row, a.row_ints + any * kRowInts);
  // pieces that stay in L1 where scratch is filled and read again, long runs where none is
  int64_t per_chunk = straight ? 16 * kChunk : kChunk;
  // whole pixels a chunk, and a multiple of 64 of them where they fit, so that no normal of the
  // channels' runs is computed twice
  if (!straight && a.channels > 0 && a.channels <= kChunk) {
    const int64_t pixels = kChunk / a.channels;
    per_chunk = (pixels >= 64 ? pixels / 64 * 64 : pixels) * a.channels;
  }
  const int64_t chunks = (a.size + per_chunk - 1) / per_chunk;
  const double cost = uses(row, kN1) || uses(row, kN2) ? 1.2 : 0.25;  // ns an element
  parallel_for(a.samples * chunks, cost * static_cast<double>(per_chunk),
               [&](int64_t begin, int64_t end) {
                 Scratch scratch;
                 for (int64_t unit = begin; unit < end; ++unit) {
                   const int64_t sample = unit / chunks, first = unit % chunks * per_chunk;
                   const int64_t left = a.size - first;
                   step_chunk(a, sample, first,
                              static_cast<int>(left < per_chunk ? left : per_chunk), scratch);
                 }
               });
}

}  // namespace FD_ISA
}  // namespace fd
