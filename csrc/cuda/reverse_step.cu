// One row of a StepTable over a batch, in one pass over memory: reads each present input once,
// writes each present output once. Accumulates in float32, in the fixed order of ../step.h.
//
// What a row uses is known when the kernel is compiled (macros below), so that an absent term costs
// no instruction and the loads of the present ones are under way together; a branch a term would
// wait for each load before the next begins. With FD_ROWS each sample has its own row: the macros
// then say what any row may use, and a branch, uniform over a sample, what this one does.
//
//   FD_ROWS                    each sample has its own row
//   FD_A, FD_B                 terms of x' and y', bit k for FdTerm k
//   FD_P, FD_Q                 the converted prediction reads x, m
//   FD_EVALUATES               there is a model output
//   FD_PUSH                    0: nothing; bit 0: d may be pushed, bit 1: a sum of
//   FD_PUSH_X, FD_PUSH_D       x, d
//   FD_GUIDED, FD_SCALED, FD_CLIP, FD_LEARNED
//   FD_OUTPUT_DTYPE            of output, uncond, variance
//   FD_INPUT_DTYPE             of model_input, or -1 where none is written
// and those of elements.h.
#include "step.h"

#include "cuda/elements.h"

#define FD_USED (FD_A | FD_B)
#define FD_HAS(term) ((FD_USED >> (term)) & 1)
#define FD_DRAWS (FD_HAS(kN2) ? 2 : FD_HAS(kN1) ? 1 : 0)

struct Row {
  float a[kTerms], b[kTerms];
  float p, q, c_in, lv_scale, lv_shift;
  int push;
  uint32_t stream[2], counter[2];
  bool evaluates, learned;

  FD_MEMBER bool in_x(int term) const {
    return ((FD_A >> term) & 1) && (!FD_ROWS || a[term] != 0.0f);
  }
  FD_MEMBER bool in_y(int term) const {
    return ((FD_B >> term) & 1) && (!FD_ROWS || b[term] != 0.0f);
  }
  FD_MEMBER bool uses(int term) const { return in_x(term) || in_y(term); }
  FD_MEMBER bool pushes() const { return FD_PUSH && (!FD_ROWS || push >= 0); }
  FD_MEMBER bool pushes_x() const { return pushes() && FD_PUSH_X; }
  FD_MEMBER bool pushes_d() const { return pushes() && FD_PUSH_D; }
  FD_MEMBER bool converts() const { return pushes_d() || uses(kD); }
  FD_MEMBER bool by_x() const { return FD_P && (!FD_ROWS || p != 0.0f); }
  FD_MEMBER bool by_m() const { return FD_Q && (!FD_ROWS || q != 0.0f); }
  FD_MEMBER bool reads_x() const { return uses(kX) || pushes_x() || (converts() && by_x()); }
  FD_MEMBER bool reads_m() const {
    return FD_EVALUATES && evaluates && (uses(kM) || (converts() && by_m()));
  }
  FD_MEMBER bool reads_v() const { return FD_LEARNED && learned && uses(kN1); }
  FD_MEMBER bool writes_y() const {
    if (!FD_ROWS) return FD_B != 0;
    bool any = false;
#pragma unroll
    for (int k = 0; k < kTerms; ++k) any = any || in_y(k);
    return any;
  }
};

FD_INLINE Row load_row(const float* f, const int32_t* info) {
  Row r;
#pragma unroll
  for (int k = 0; k < kTerms; ++k) {
    r.a[k] = (FD_A >> k) & 1 ? f[kA + k] : 0.0f;
    r.b[k] = (FD_B >> k) & 1 ? f[kB + k] : 0.0f;
  }
  r.p = f[kP];
  r.q = f[kQ];
  r.c_in = f[kCIn];
  r.lv_scale = f[kLvScale];
  r.lv_shift = f[kLvShift];
  r.push = info[kPush];
  r.stream[0] = static_cast<uint32_t>(info[kStream1]);
  r.counter[0] = static_cast<uint32_t>(info[kCounter1]);
  r.stream[1] = static_cast<uint32_t>(info[kStream2]);
  r.counter[1] = static_cast<uint32_t>(info[kCounter2]);
  r.evaluates = !FD_ROWS || (info[kFlags] & kEvaluates) != 0;
  r.learned = !FD_ROWS || (info[kFlags] & kLearnedVariance) != 0;
  return r;
}

struct Tensors {
  const float* x;
  const void* output;
  const void* uncond;
  const void* variance;
  int64_t output_stride, uncond_stride, variance_stride;
  float* y;
  float* history;
  int64_t history_stride;
  float* out;
  void* model_input;
  const float* scales;
  const float* push;  // the coefficients of a push, of the first row
  const int64_t* rows;
  int64_t row;
};

// One pack of one sample: the elements [at, at + count) of its memory.
FD_INLINE void step_pack(const Tensors& t, const Row& r, int64_t sample, int64_t size, int64_t at,
                         int count, float weight, float bound, const float (*n)[FD_PACK]) {
  float x[FD_PACK], m[FD_PACK], u[FD_PACK], v[FD_PACK], y[FD_PACK], h[4][FD_PACK];
  const int64_t here = sample * size + at;
  const bool guides = FD_GUIDED && r.evaluates && weight != 1.0f;

  if (r.reads_x()) fd_load_pack<kFloat32, FD_PACK>(t.x, here, count, x);
  if (r.reads_m())
    fd_load_pack<FD_OUTPUT_DTYPE, FD_PACK>(t.output, sample * t.output_stride + at, count, m);
  if ((guides && r.reads_m()) || (r.evaluates && r.uses(kU)))
    fd_load_pack<FD_OUTPUT_DTYPE, FD_PACK>(t.uncond, sample * t.uncond_stride + at, count, u);
  if (r.reads_v())
    fd_load_pack<FD_OUTPUT_DTYPE, FD_PACK>(t.variance, sample * t.variance_stride + at, count, v);
  if (r.uses(kY)) fd_load_pack<kFloat32, FD_PACK>(t.y, here, count, y);
#pragma unroll
  for (int k = 0; k < 4; ++k)
    if (r.uses(kH0 + k))
      fd_load_pack<kFloat32, FD_PACK>(t.history + k * t.history_stride, here, count, h[k]);

  float to_x[FD_PACK], to_y[FD_PACK], d[FD_PACK], input[FD_PACK];
#pragma unroll
  for (int i = 0; i < FD_PACK; ++i) {
    if (guides && r.reads_m()) m[i] = fd_guide(m[i], u[i], weight);
    if (FD_SCALED && r.reads_m()) m[i] = t.scales[sample] * m[i];
    if (r.converts()) {
      float c = 0.0f;
      if (r.by_x()) c = fd_add_term(c, r.p, x[i]);
      if (r.by_m()) c = fd_add_term(c, r.q, m[i]);
      d[i] = FD_CLIP && bound >= 0.0f ? fd_clip(c, bound) : c;
    }
    float n1 = n[0][i];
    if (r.reads_v()) n1 = fd_exp(r.lv_scale * v[i] + r.lv_shift) * n1;

    float by_x = 0.0f, by_y = 0.0f;
    const auto add = [&](int term, float value) {
      if (r.in_x(term)) by_x = fd_add_term(by_x, r.a[term], value);
      if (r.in_y(term)) by_y = fd_add_term(by_y, r.b[term], value);
    };
    add(kX, x[i]);
    add(kY, y[i]);
    add(kM, m[i]);
    add(kD, d[i]);
#pragma unroll
    for (int k = 0; k < 4; ++k) add(kH0 + k, h[k][i]);
    add(kN1, n1);
    if (FD_HAS(kN2)) add(kN2, n[FD_DRAWS - 1][i]);
    add(kU, u[i]);
    to_x[i] = by_x;
    to_y[i] = by_y;
    input[i] = r.c_in * by_x;
  }

  if (r.pushes() && FD_PUSH != 1) {
    // read here and not with the row, whose coefficients fill the registers as it is
    const float* push = t.push + (FD_ROWS ? t.rows[sample] : t.row) * kRowFloats;
    const float by_x = push[0], by_d = push[kPushD - kPushX];
    if (!FD_ROWS || by_x != 0.0f || by_d != 1.0f) {
#pragma unroll
      for (int i = 0; i < FD_PACK; ++i) {
        float sum = 0.0f;
        if (FD_PUSH_X && (!FD_ROWS || by_x != 0.0f)) sum = fd_add_term(sum, by_x, x[i]);
        if (FD_PUSH_D && (!FD_ROWS || by_d != 0.0f)) sum = fd_add_term(sum, by_d, d[i]);
        d[i] = sum;
      }
    }
  }
  fd_store_pack<kFloat32, FD_PACK>(t.out, here, count, to_x);
  if (r.writes_y()) fd_store_pack<kFloat32, FD_PACK>(t.y, here, count, to_y);
  if (r.pushes())
    fd_store_pack<kFloat32, FD_PACK>(t.history + r.push * t.history_stride, here, count, d);
  if constexpr (FD_INPUT_DTYPE >= 0)
    fd_store_pack<FD_INPUT_DTYPE, FD_PACK>(t.model_input, here, count, input);
}

// two blocks a multiprocessor at the least, so at most 128 registers
extern "C" __global__ void __launch_bounds__(256, 2)
    reverse_step(const float* x, const void* output, const void* uncond, const void* variance,
                 int64_t output_stride, int64_t uncond_stride, int64_t variance_stride, float* y,
                 float* history, int64_t history_stride, const float* row_floats,
                 const int32_t* row_ints, const int64_t* rows, int64_t row, const int64_t* seeds,
                 const float* guidance, float guidance_all, const float* scales,
                 const float* clip, float clip_all, float* out, void* model_input,
                 int64_t samples, int64_t size, int64_t channels,
                 int64_t pixels) {
  const FdShape shape{size, channels, pixels};
  const Tensors tensors{x,          output, uncond, variance,       output_stride,
                        uncond_stride, variance_stride, y, history, history_stride,
                        out,        model_input, scales, row_floats + kPushX,
                        rows,       row};
  const FdWalk walk = fd_walk();
  const int64_t units = fd_units(shape);
  Row r;
  if (!FD_ROWS) r = load_row(row_floats + row * kRowFloats, row_ints + row * kRowInts);
  for (int64_t sample = walk.sample; sample < samples; sample += walk.sample_stride) {
    if (FD_ROWS) {
      const int64_t own = rows[sample];
      r = load_row(row_floats + own * kRowFloats, row_ints + own * kRowInts);
    }
    const uint64_t seed = FD_DRAWS ? static_cast<uint64_t>(seeds[sample]) : 0;
    const float weight = guidance ? guidance[sample] : guidance_all;
    const float bound = clip ? clip[sample] : clip_all;
    const auto draw = [&](int k, int64_t block, float* z) {
      if (!r.uses(kN1 + k)) return;
      fd_normal4(seed, r.stream[k], r.counter[k], static_cast<uint64_t>(block), z[0], z[1], z[2],
                 z[3]);
    };
    const auto body = [&](int64_t at, int count, const float (*n)[FD_PACK]) {
      step_pack(tensors, r, sample, size, at, count, weight, bound, n);
    };
    for (int64_t unit = walk.unit; unit < units; unit += walk.unit_stride)
      fd_for_unit<FD_DRAWS>(shape, unit, draw, body);
  }
}
