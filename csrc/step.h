// The arithmetic of one element of one table row, shared by the CPU and the CUDA kernel.
//
// The order of operations is part of the numerics contract: every backend does exactly these
// float32 multiplications and additions in this order, so float32 results are equal as bits.
// A sum starts at +0 and takes its terms as `acc = acc + c * t` in the order of `Term`; a term
// whose coefficient is zero is not read (its tensor may hold NaN) and changes no bit.
#pragma once

#include "normal.h"

// Terms of a row in their order of summation. Coefficients lie in the same order.
enum FdTerm : int {
  kX = 0,   // the state
  kY = 1,   // the anchor state
  kM = 2,   // the model output after guidance
  kD = 3,   // the converted prediction clip(p x + q m)
  kH0 = 4,  // history slots kH0 .. kH0 + 3
  kN1 = 8,  // first noise draw
  kN2 = 9,  // second noise draw
  kU = 10,  // the unconditional model output
  kTerms = 11
};

// One row of a packed table, float32[kRowFloats] and int32[kRowInts]. Keep equal to table.py.
enum FdRowFloat : int {
  kP = 0,         // d = clip(kP x + kQ m)
  kQ = 1,
  kA = 2,         // kTerms coefficients of x'
  kB = 13,        // kTerms coefficients of y'
  kCIn = 24,      // model_input = kCIn x'
  kLvScale = 25,  // first draw is multiplied by exp(kLvScale v + kLvShift)
  kLvShift = 26,
  kPushX = 27,    // the history takes kPushX x + kPushD d
  kPushD = 28,
  kRowFloats = 32
};
enum FdRowInt : int {
  kFlags = 0,
  kPush = 1,     // history slot that receives d, or -1
  kStream1 = 2,
  kCounter1 = 3,
  kStream2 = 4,
  kCounter2 = 5,
  kRowInts = 8
};
enum FdRowFlag : int {
  kEvaluates = 1,        // the row reads the model output
  kLearnedVariance = 2,  // the row reads v
};

FD_INLINE float fd_guide(float cond, float uncond, float weight) {
  // weight 1 must give the conditional output itself, so that guided and unguided requests of
  // one batch keep the bits that they have alone
  return weight == 1.0f ? cond : uncond + weight * (cond - uncond);
}

FD_INLINE float fd_clip(float d, float bound) {
  return d < -bound ? -bound : (d > bound ? bound : d);  // NaN passes through
}

// exp(x) = scale * exp(r): the two halves of fd_exp, for a kernel that runs them as two loops.
FD_INLINE float fd_exp_reduce(float x, float& scale) {
  const float low = -86.0f > x ? -86.0f : x;  // one max and one min, NaN passes through
  const float c = 88.0f < low ? 88.0f : low;
  const float shifted = c * 1.4426950216293335f + 12582912.0f;  // 1.5 * 2^23 rounds to an integer
  const float k = shifted - 12582912.0f;
  scale = fd_as_float((fd_as_uint(shifted) - 0x4B400000u + 127u) << 23);
  return (c - k * 0.693359375f) - k * -2.12194440e-4f;
}

FD_INLINE float fd_exp_finish(float r, float scale) {
  float q = 0.0013814539415761828f;
  q = q * r + 0.00836874544620514f;
  q = q * r + 0.04166838899254799f;
  q = q * r + 0.1666652113199234f;
  q = q * r + 0.4999999403953552f;
  const float poly = (q * (r * r) + r) + 1.0f;
  return poly * scale;
}

// exp(x) to 2 ulp by mul and add; saturates at exp(-86) and exp(88), NaN passes through.
FD_INLINE float fd_exp(float x) {
  float scale;
  const float r = fd_exp_reduce(x, scale);
  return fd_exp_finish(r, scale);
}

FD_INLINE float fd_clamp(float x, float low, float high) {
  const float raised = low > x ? low : x;  // NaN passes through
  return high < raised ? high : raised;
}

// Where the slope of fd_clamp is 0; not at the bounds, as torch.clamp has it, and not for NaN.
FD_INLINE bool fd_beyond(float x, float low, float high) { return x < low || x > high; }

// Elements from one of several draws of a sample to the next: each starts at a Philox block.
FD_INLINE int64_t fd_draw_stride(int64_t size) { return (size + 3) / 4 * 4; }

// What a model is asked to predict; positions in PREDICTIONS of fastdiff/reference/diffusion.py.
enum FdTarget : int { kEpsilon = 0, kSample = 1, kVPrediction = 2, kFlow = 3 };

template <int kTarget>
FD_INLINE float fd_target(float x0, float eps, float alpha, float sigma) {
  if (kTarget == kVPrediction) return alpha * eps - sigma * x0;
  return kTarget == kFlow ? eps - x0 : kTarget == kEpsilon ? eps : x0;
}

FD_INLINE float fd_add_term(float acc, float coefficient, float term) {
  return acc + coefficient * term;
}
