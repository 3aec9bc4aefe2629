// What one instruction set offers: a table of kernels, filled by table.cpp, chosen in bindings.cpp.
//
// Every source in csrc/cpu but bindings.cpp is compiled once per instruction set, with FD_ISA
// naming the namespace, so the sets cannot share a symbol.
#pragma once

#include <cstdint>

#include "../half.h"

// True in a forked child: libgomp would wait there for threads that only the parent has, for ever.
extern "C" bool fd_forked;

// Positions in NORMS of fastdiff/reference/modulate.py.
enum FdNorm : int { kNoNorm = 0, kLayerNorm = 1, kRmsNorm = 2 };

struct FdStepArgs {
  // inputs; a null pointer says absent. output/uncond/variance have type `output_dtype` and their
  // own distance between samples; everything else is float32 with `size` elements a sample.
  const float* x;
  const void* output;
  const void* uncond;
  const void* variance;
  int64_t output_stride, uncond_stride, variance_stride;
  int output_dtype;
  float* y;  // read and written
  float* history[4];
  const float* row_floats;  // packed rows
  const int32_t* row_ints;
  const int64_t* rows;  // one row index a sample, or null for `row`
  int64_t row;
  const int64_t* seeds;
  const float* guidance;  // one weight a sample, or null for `guidance_all`
  float guidance_all;
  const float* scale;  // one factor of the guided output a sample, or null
  const float* clip;  // one bound a sample, or null for `clip_all`; below zero: no clipping
  float clip_all;
  float* out;
  void* model_input;
  int model_input_dtype;
  int64_t samples, size;
  int64_t channels;  // 0: memory order is logical order; else channels are the fastest axis
};

struct FdRescaleArgs {
  const void* output;
  const void* uncond;
  int dtype;  // of these two
  int64_t output_stride, uncond_stride;  // between samples
  int64_t samples, size;
  const float* guidance;  // one value a sample; so are phi and out
  const float* phi;
  float* out;
};

struct FdNoiseArgs {
  const int64_t* seeds;
  uint32_t step, stream;
  int64_t samples, size, channels;
  void* out;
  int out_dtype;
};

struct FdAddNoiseArgs {
  const void* x0;
  int dtype;           // of x0, x and target
  const float* alpha;  // one value a sample; so is sigma
  const float* sigma;
  const int64_t* seeds;
  uint32_t step, stream;
  int64_t samples, size, channels;
  int target_kind;  // FdTarget of step.h
  void* x;
  void* target;  // null where it is x0 itself
};

struct FdBrownianArgs {
  const int64_t* seeds;
  const int32_t* counters;  // of the draws; so many as weights
  const float* weights;
  int64_t draws;
  uint32_t stream;
  const float* x;  // like out, or null
  float scale;     // out = x + scale * sum, or the sum itself without x
  int64_t samples, size, channels;
  void* out;  // float32 where x is given
  int out_dtype;
};

struct FdThresholdArgs {
  const float* x;
  int64_t samples, size;
  int64_t rank;   // of the lower of the two order statistics, from 0
  double weight;  // of the upper one
  float most;     // the quantile is limited to [1, most] where x is divided by it
  float* quantile;  // one a sample
  float* out;       // like x and maybe x itself, or null
};

struct FdReparameterizeArgs {
  const void* mu;
  const void* logvar;
  int in_dtype;
  const int64_t* seeds;
  uint32_t step, stream;
  float low, high;  // bounds of logvar
  int64_t draws;    // of each sample
  int64_t samples, size;
  void* z;
  float* kl;  // one value a sample, or null
};

struct FdReparameterizeBackwardArgs {
  const void* grad_z;      // null: no gradient through z
  const float* grad_kl;    // one value a sample; null: no gradient through kl
  const void* mu;
  const void* logvar;
  int in_dtype;
  const int64_t* seeds;
  uint32_t step, stream;
  float low, high;
  int64_t draws;
  int64_t samples, size;
  void* grad_mu;
  void* grad_logvar;
};

struct FdFilmNormArgs {
  const void* x;
  const void* residual;  // like x, or null
  void* out;
  int dtype;  // of these three
  const void* weight;  // one value a channel, or null; so is bias
  const void* bias;
  int weight_dtype;
  const void* scale;  // one value a channel of each sample, or null; so is shift
  const void* shift;
  int film_dtype;
  int64_t scale_stride, shift_stride;  // between samples
  int64_t samples, channels, pixels;
  bool channels_last;
  int64_t groups;  // 0: no normalisation
  double eps;
  bool plus_one, silu;
};

// A tensor of one value a channel that differs by sample and may differ by token.
struct FdChannels {
  const void* data;  // null: absent
  int64_t sample_stride, token_stride;
};

struct FdModulateArgs {
  const void* x;
  const void* residual;  // or null
  int dtype;             // of x, residual, out and total, which are contiguous
  FdChannels scale, shift, gate;
  int film_dtype;  // of those three
  const void* weight;
  const void* bias;
  int affine_dtype;  // of those two
  int norm;          // FdNorm
  float eps;
  int64_t samples, tokens, channels;
  void* out;    // null: only the sum is wanted
  void* total;  // x + gate * residual; null without a residual
};

struct FdTorchNoiseArgs {
  void* state;  // what torch.Generator.get_state() returns; advanced
  void* out;
  int out_dtype;
  int64_t size;  // at least 16
};

// What becomes of a value in a Brownian tree.
enum FdTreeMove { kTreeLeft = 0, kTreeRight = 1, kTreeBoth = 2, kTreeLeaf = 3 };

struct FdTreeArgs {
  const uint32_t* seeds;  // (draws, samples): of the root and of every value that is split, in order
  const float* factors;   // (draws, 3): share, inverse and spread; of the root its spread comes first
  const uint8_t* moves;   // (steps,) of FdTreeMove, depth first and left before right
  int64_t draws, steps;
  int64_t waiting;  // the most values that there are at once
  float sign, divisor;
  int64_t samples, size;  // size at least 16
  float* out;             // (samples, size)
};

struct FdKernels {
  const char* name;
  void (*noise)(const FdNoiseArgs&);
  void (*reverse_step)(const FdStepArgs&);
  void (*guidance_rescale)(const FdRescaleArgs&);
  void (*reparameterize)(const FdReparameterizeArgs&);
  void (*reparameterize_backward)(const FdReparameterizeBackwardArgs&);
  void (*film_norm)(const FdFilmNormArgs&);
  void (*modulate)(const FdModulateArgs&);
  void (*brownian)(const FdBrownianArgs&);
  void (*add_noise)(const FdAddNoiseArgs&);
  void (*dynamic_threshold)(const FdThresholdArgs&);
  // false, with nothing written: this instruction set cannot, or the state is none of torch's own
  bool (*torch_noise)(const FdTorchNoiseArgs&);
  bool (*brownian_tree)(const FdTreeArgs&);  // false likewise
};
