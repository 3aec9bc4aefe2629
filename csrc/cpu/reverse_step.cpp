// One row of a StepTable over a batch: guidance, conversion, clipping, the affine combinations of
// at most eleven tensors with counter noise among them, the history push and the next model input,
// in one pass over memory.
//
// Reads each present input once, writes each present output once. Accumulates in float32, in the
// fixed order of ../step.h: results are bits, not tolerances.
//
// Any row is the same loop over blocks of a few vectors: in each, the row's tensors are walked with
// x, m, d and the sums in registers. What a row lacks costs a branch that always goes the same way,
// shared by the elements of a block, so no row needs code of its own.
#include "../step.h"

#include "fill_normal.h"
#include "kernels.h"
#include "store.h"
#include "table.h"
#include "threads.h"
#include "vec.h"

namespace fd {
namespace FD_ISA {
namespace {

constexpr int kChunk = 1024;       // elements of the scratch that noise and 16-bit tensors need
constexpr int64_t kFar = 1 << 18;  // elements of a tensor that has left the second-level cache
constexpr int kVectors = 4;        // of a block: x, m, d, two sums and a term fill 24 registers
constexpr int kBlock = kVectors * kWidth;

struct Scratch {
  float m[kChunk], u[kChunk], v[kChunk], n1[kChunk], n2[kChunk];
};

// `kMost` whole vectors, or the first `n` elements of one.
template <int kMost>
struct Vectors {
  Vec v[kMost];

  Vectors() {
#pragma GCC unroll 4
    for (Vec& e : v) e = vec_set(0.0f);
  }
  static int width(int n) { return kMost > 1 ? kWidth : n; }

  void load(const float* from, int n) {
#pragma GCC unroll 4
    for (int k = 0; k < kMost; ++k) v[k] = vec_load<kFloat32>(from, k * kWidth, width(n));
  }
  void store(float* to, int n) const {
#pragma GCC unroll 4
    for (int k = 0; k < kMost; ++k) vec_store<kFloat32>(v[k], to, k * kWidth, width(n));
  }
  // Past the caches, to the start of a cache line.
  void stream(float* to) const {
#pragma GCC unroll 4
    for (int k = 0; k < kMost; ++k) vec_stream<kFloat32>(v[k], to, k * kWidth);
  }
  // fd_add_term, since this source is compiled without contraction. A zero coefficient says that
  // the term is absent: it may hold NaN.
  void add(float c, const Vectors& term) {
    if (c == 0.0f) return;
    const Vec by = vec_set(c);
#pragma GCC unroll 4
    for (int k = 0; k < kMost; ++k) v[k] = v[k] + by * term.v[k];
  }
  void scale(float c) {
#pragma GCC unroll 4
    for (Vec& e : v) e = vec_set(c) * e;
  }
  void clip(float bound) {
#pragma GCC unroll 4
    for (Vec& e : v) e = vec_clamp(e, bound);
  }
  void guide(const float* uncond, float weight, int n) {
    Vectors u;
    u.load(uncond, n);
#pragma GCC unroll 4
    for (int k = 0; k < kMost; ++k) v[k] = u.v[k] + vec_set(weight) * (v[k] - u.v[k]);
  }
};

// A tensor that is read for the sums alone, with its coefficients in x' and y'.
struct Term {
  const float* at;
  float in_x, in_y;
};

// One row over a piece of one sample. A coefficient of zero says that a term is absent.
struct Piece {
  const float *x, *output, *u;  // null: not read; u: for guidance
  float weight, scale;          // m = scale * guide(output, u, weight)
  bool scales;
  float p, q, bound;  // d = clip(p x + q m); bound below zero: no clipping
  bool converts;
  float x_in[2], m_in[2], d_in[2];  // coefficients in x' and y'
  Term early[1], late[7];           // in the order of summation, before m and after d
  int earlies, lates;
  float push_x, push_d;
  bool streams;             // x' goes past the caches
  bool pushes_d;            // d itself, not a sum
  float *out, *y, *pushed;  // the last two null: not written
  void* model_input;        // or null
  int model_input_dtype;
  int64_t at;  // of the piece in model_input
  float c_in;

  template <int kMost, bool kTwo>
  void block(int64_t i, int n) const;
  template <bool kTwo>
  void run(int64_t n) const;
};

template <int kMost, bool kTwo>
void Piece::block(int64_t i, int n) const {
  using V = Vectors<kMost>;
  V state, m, d, to_x, to_y;
  const auto add = [&](const float* in, const V& term) {
    to_x.add(in[0], term);
    if (kTwo) to_y.add(in[1], term);
  };
  const auto add_all = [&](const Term* terms, int count) {
    for (int k = 0; k < count; ++k) {
      V term;
      term.load(terms[k].at + i, n);
      to_x.add(terms[k].in_x, term);
      if (kTwo) to_y.add(terms[k].in_y, term);
    }
  };
  if (x) state.load(x + i, n);
  if (output) {
    m.load(output + i, n);
    if (u) m.guide(u + i, weight, n);
    if (scales) m.scale(scale);
  }
  if (converts) {
    d.add(p, state);
    d.add(q, m);
    if (bound >= 0.0f) d.clip(bound);
  }
  // every sum before the first store: x' may lie over x, and a push over the slot that was read
  add(x_in, state);
  add_all(early, earlies);
  add(m_in, m);
  add(d_in, d);
  add_all(late, lates);
  if (pushed) {
    if (!pushes_d) {
      V sum;
      sum.add(push_x, state);
      sum.add(push_d, d);
      d = sum;
    }
    d.store(pushed + i, n);
  }
  if (kTwo) to_y.store(y + i, n);
  if (kMost > 1 && streams)
    to_x.stream(out + i);
  else
    to_x.store(out + i, n);
  if (model_input) {
    alignas(64) float input[kMost * kWidth];
    to_x.scale(c_in);
    to_x.store(input, n);
    store_as(input, model_input_dtype, model_input, at + i, kMost > 1 ? kMost * kWidth : n);
  }
}

template <bool kTwo>
void Piece::run(int64_t n) const {
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) block<kVectors, kTwo>(i, kWidth);
  for (; i < n; i += kWidth) block<1, kTwo>(i, n - i < kWidth ? static_cast<int>(n - i) : kWidth);
}

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

// Where x and x' leave no room for each other in a cache, what is written need not be fetched
// first: a sixth less time for a row that reads two tensors. Not where x' lies over x, which has
// been fetched, nor for a push, whose slot is mostly the oldest that the row reads.
bool streams(const FdStepArgs& a, const float* to) {
  constexpr int64_t kCaches = int64_t{16} << 20;
  return 8 * a.samples * a.size >= kCaches && a.out != a.x &&
         reinterpret_cast<uintptr_t>(to) % 64 == 0;
}

void step_chunk(const FdStepArgs& a, int64_t sample, int64_t first, int n, Scratch& s) {
  const int64_t row_index = a.rows ? a.rows[sample] : a.row;
  const float* row = a.row_floats + row_index * kRowFloats;
  const int32_t* info = a.row_ints + row_index * kRowInts;
  const int64_t at = sample * a.size + first;

  Piece p{};
  p.out = a.out + at;
  p.streams = streams(a, p.out);
  const int push = info[kPush];
  if (push >= 0) {
    p.pushed = a.history[push] + at;
    p.push_x = row[kPushX];
    p.push_d = row[kPushD];
    p.pushes_d = p.push_x == 0.0f && p.push_d == 1.0f;
  }
  p.converts = uses(row, kD) || p.push_d != 0.0f;
  p.p = row[kP];
  p.q = row[kQ];
  p.bound = a.clip ? a.clip[sample] : a.clip_all;
  if (uses(row, kX) || p.push_x != 0.0f || (p.converts && p.p != 0.0f)) p.x = a.x + at;

  const float* uncond = nullptr;
  if (info[kFlags] & kEvaluates) {
    if (uses(row, kM) || (p.converts && p.q != 0.0f))
      p.output = load_as_float(a.output, a.output_dtype, sample * a.output_stride + first, n, s.m);
    const float weight = a.guidance ? a.guidance[sample] : a.guidance_all;
    const bool guides = p.output && weight != 1.0f;  // as fd_guide
    if (a.uncond && (guides || uses(row, kU)))
      uncond = load_as_float(a.uncond, a.output_dtype, sample * a.uncond_stride + first, n, s.u);
    if (guides) p.u = uncond;
    p.weight = weight;
    p.scales = a.scale != nullptr;
    if (p.scales) p.scale = a.scale[sample];
  }

  if (uses(row, kN1)) {
    const int64_t width = a.output_dtype == kFloat32 ? 4 : 2;
    const char* output = static_cast<const char*>(a.output);
    const Ahead ahead{
        {reinterpret_cast<const char*>(a.x + at + n),
         output ? output + (sample * a.output_stride + first + n) * width : nullptr},
        a.out == a.x || p.streams ? nullptr : reinterpret_cast<char*>(a.out + at + n),
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

  const auto coefficients = [&](FdTerm term, float* in) {
    in[0] = row[kA + term];
    in[1] = row[kB + term];
  };
  const auto add = [&](int term, const float* t, Term* terms, int& count) {
    const float in_x = row[kA + term], in_y = row[kB + term];
    if (in_x != 0.0f || in_y != 0.0f) terms[count++] = {t, in_x, in_y};
  };
  coefficients(kX, p.x_in);
  coefficients(kM, p.m_in);
  coefficients(kD, p.d_in);
  add(kY, a.y + at, p.early, p.earlies);
  for (int k = 0; k < 4; ++k) add(kH0 + k, a.history[k] + at, p.late, p.lates);
  add(kN1, s.n1, p.late, p.lates);
  add(kN2, s.n2, p.late, p.lates);
  add(kU, uncond, p.late, p.lates);
  p.model_input = a.model_input;
  p.model_input_dtype = a.model_input_dtype;
  p.at = at;
  p.c_in = row[kCIn];
  if (writes_y(row)) {
    p.y = a.y + at;
    p.run<true>(n);
  } else {
    p.run<false>(n);
  }
}

// A row that fills no scratch, for all samples alike.
bool straight(const FdStepArgs& a, const float* row, const int32_t* info) {
  return !a.rows && !uses(row, kN1) && !uses(row, kN2) &&
         (!(info[kFlags] & kEvaluates) || a.output_dtype == kFloat32);
}

}  // namespace

void reverse_step(const FdStepArgs& a) {
  const int64_t any = a.rows && a.samples > 0 ? a.rows[0] : a.row;
  const float* row = a.row_floats + any * kRowFloats;
  const bool whole = straight(a, row, a.row_ints + any * kRowInts);
  // pieces that stay in L1 where scratch is filled and read again, long runs where none is
  int64_t per_chunk = whole ? 16 * kChunk : kChunk;
  // whole pixels a chunk, and a multiple of 64 of them where they fit, so that no normal of the
  // channels' runs is computed twice
  if (!whole && a.channels > 0 && a.channels <= kChunk) {
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
                 vec_stream_end();
               });
}

}  // namespace FD_ISA
}  // namespace fd
