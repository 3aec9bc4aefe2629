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

// A converted prediction and the sum that reads it, in one loop: d stays in a register on its way
// to the history. kBefore terms of x' come before d in the order of summation, kAfter behind it.
struct Converted {
  const float* x;
  const float* m;
  float p, q, bound, weight;  // weight of d in x'; bound below zero: no clipping
  float* pushed;              // null: d is not kept
};

template <int kBefore, int kAfter, bool kClip, bool kPushes>
void convert_fixed(const Converted& v, const Terms& terms, float* out, int n) {
  const float* t[kBefore + kAfter > 0 ? kBefore + kAfter : 1];
  float c[kBefore + kAfter > 0 ? kBefore + kAfter : 1];
  for (int k = 0; k < kBefore + kAfter; ++k) {
    t[k] = terms.tensor[k];
    c[k] = terms.coefficient[k];
  }
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    float d = fd_add_term(fd_add_term(0.0f, v.p, v.x[i]), v.q, v.m[i]);
    if (kClip) d = fd_clip(d, v.bound);
    float acc = 0.0f;
    for (int k = 0; k < kBefore; ++k) acc = fd_add_term(acc, c[k], t[k][i]);
    acc = fd_add_term(acc, v.weight, d);
    for (int k = kBefore; k < kBefore + kAfter; ++k) acc = fd_add_term(acc, c[k], t[k][i]);
    out[i] = acc;
    if (kPushes) v.pushed[i] = d;
  }
}

using ConvertFunction = void (*)(const Converted&, const Terms&, float*, int);

template <int kBefore, int kAfter>
ConvertFunction pick(bool clips, bool pushes) {
  if (clips) return pushes ? convert_fixed<kBefore, kAfter, true, true>
                           : convert_fixed<kBefore, kAfter, true, false>;
  return pushes ? convert_fixed<kBefore, kAfter, false, true>
                : convert_fixed<kBefore, kAfter, false, false>;
}

constexpr int kMostBefore = 2, kMostAfter = 3;

// The loop for these numbers of terms, which `converts_in_registers` has found to be there.
ConvertFunction find_convert(int before, int after, bool clips, bool pushes) {
  switch (before * (kMostAfter + 1) + after) {
    case 0: return pick<0, 0>(clips, pushes);
    case 1: return pick<0, 1>(clips, pushes);
    case 2: return pick<0, 2>(clips, pushes);
    case 3: return pick<0, 3>(clips, pushes);
    case 4: return pick<1, 0>(clips, pushes);
    case 5: return pick<1, 1>(clips, pushes);
    case 6: return pick<1, 2>(clips, pushes);
    case 7: return pick<1, 3>(clips, pushes);
    case 8: return pick<2, 0>(clips, pushes);
    case 9: return pick<2, 1>(clips, pushes);
    case 10: return pick<2, 2>(clips, pushes);
    default: return pick<2, 3>(clips, pushes);
  }
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
  // tensors that fit in the second-level cache need no hint
  const bool far = a.samples * a.size >= kFar;
  fill_normal(seed, s, step, first, n, to, [&](int stage) {
    if (far) ahead.ask(stage, kStages, kChunk);
  });
}

bool uses(const float* row, FdTerm term) { return row[kA + term] != 0.0f || row[kB + term] != 0.0f; }

bool writes_y(const float* row) {
  for (int k = 0; k < kTerms; ++k)
    if (row[kB + k] != 0.0f) return true;
  return false;
}

// Whether d needs no scratch: x' reads it, y' is not written, and the row has no more terms than
// the solvers' rows have: x and m before d, history and a draw behind it.
bool converts_in_registers(const float* row) {
  int before = 0, after = 0;
  for (int k = 0; k < kTerms; ++k)
    if (k != kD && row[kA + k] != 0.0f) ++(k < kD ? before : after);
  return row[kA + kD] != 0.0f && row[kP] != 0.0f && row[kQ] != 0.0f && before <= kMostBefore &&
         after <= kMostAfter && !writes_y(row);
}

void write_model_input(const FdStepArgs& a, const float* row, const float* x, int64_t at, int n,
                       Scratch& s) {
  if (!a.model_input) return;
  const float c_in = row[kCIn];
#pragma omp simd
  for (int i = 0; i < n; ++i) s.out[i] = c_in * x[i];
  store_as(s.out, a.model_input_dtype, a.model_input, at, n);
}

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
  const float bound = a.clip ? a.clip[sample] : a.clip_all;

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

  const auto gather = [&](int start, bool with_d, Terms& terms) {
    const auto add = [&](int term, const float* tensor) { terms.add(row[start + term], tensor); };
    add(kX, a.x + at);
    add(kY, a.y ? a.y + at : nullptr);
    add(kM, m);
    const int before = terms.count;
    if (with_d) add(kD, s.d);
    for (int k = 0; k < 4; ++k) add(kH0 + k, a.history[k] ? a.history[k] + at : nullptr);
    add(kN1, s.n1);
    add(kN2, s.n2);
    add(kU, u);
    return before;
  };
  const bool converts = push >= 0 || uses(row, kD);
  float* out = a.out + at;
  if (converts_in_registers(row)) {
    Terms others;
    const int before = gather(kA, false, others);
    const ConvertFunction convert =
        find_convert(before, others.count - before, bound >= 0.0f, push >= 0);
    float* pushed = push >= 0 ? a.history[push] + at : nullptr;
    convert({a.x + at, m, row[kP], row[kQ], bound, row[kA + kD], pushed}, others, out, n);
    write_model_input(a, row, out, at, n, s);
    return;
  }

  Terms to_x, to_y;
  gather(kA, true, to_x);
  gather(kB, true, to_y);
  if (converts) {
    Terms convert;
    convert.add(row[kP], a.x + at);
    convert.add(row[kQ], m);
    combine(convert, s.d, n);
    if (bound >= 0.0f) {
#pragma omp simd
      for (int i = 0; i < n; ++i) s.d[i] = fd_clip(s.d[i], bound);
    }
  }
  // y' first: x' may be written over x, which y' still reads, so x' waits in scratch then
  if (to_y.count > 0) {
    combine(to_x, s.out, n);
    combine(to_y, a.y + at, n);
    store_as(s.out, kFloat32, a.out, at, n);
  } else {
    combine(to_x, out, n);
  }
  if (push >= 0) store_as(s.d, kFloat32, a.history[push], at, n);
  write_model_input(a, row, out, at, n, s);
}

// A row that needs no scratch: x' from float32 tensors as they lie, for all samples alike.
bool direct(const FdStepArgs& a, const float* row, const int32_t* info) {
  const bool guided = a.uncond && (a.guidance || a.guidance_all != 1.0f);
  const bool converts = info[kPush] >= 0 || uses(row, kD);
  const bool scratch =
      (converts && !converts_in_registers(row)) || uses(row, kN1) || uses(row, kN2);
  return !a.rows && !scratch && !guided && !writes_y(row) && !a.model_input &&
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
