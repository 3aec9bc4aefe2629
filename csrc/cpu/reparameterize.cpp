// z = mu + exp(logvar / 2) eps with counter noise, and KL(N(mu, exp(logvar)) || N(0, I)) a sample.
//
// Forward reads mu and logvar, writes z; backward reads both and grad_z, writes two gradients and
// draws eps anew instead of loading it. z is equal in bits on every backend; the KL is a sum, the
// same for any number of threads (fixed chunks, added in order) but not promised across backends.
// Each of its 16 running sums of a chunk is float32, everything above them float64.
//
// Both passes are bound by arithmetic, half of it the noise, so a piece asks for the memory of the
// next one and the bytes arrive while it computes. A few tensors at a time, with work in between:
// what is asked for beyond the 30 or so lines that may be under way at once stalls the piece. On
// tensors that are in no cache this takes a quarter off forward and a third off backward.
#include "../step.h"


#include "fill_normal.h"
#include "kernels.h"
#include "scratch.h"
#include "store.h"
#include "table.h"
#include "threads.h"

namespace fd {
namespace FD_ISA {
namespace {

constexpr int kPiece = 256;          // elements at a time of the forward pass, 3 tensors
constexpr int kBackwardPiece = 128;  // of the backward pass, 5 tensors
constexpr int kChunk = 1024;         // elements of one partial sum of the KL
constexpr int kLanes = 16;  // running sums of a chunk: one fixed order for every instruction set

struct alignas(64) Scratch {
  float mu[kPiece], logvar[kPiece], grad_z[kPiece];  // 16-bit inputs, converted
  float eps[kPiece], reduced[kPiece], sd[kPiece];
  float first[kPiece], second[kPiece];  // results on their way to a 16-bit tensor
  float sum[kPiece], weighted[kPiece];  // of the gradients of several draws
};

// The next piece of the batch, to be asked for.
struct Ahead {
  int64_t at, n, width;

  Ahead(int64_t next, int64_t total, int64_t piece, int dtype)
      : at(least(next, total)),
        n(least(total - at, piece)),
        width(dtype == kFloat32 ? 4 : 2) {}

  void read(const void* tensor) const {
    const char* p = static_cast<const char*>(tensor) + at * width;
    for (int64_t i = 0; i < n * width; i += 64) __builtin_prefetch(p + i, 0);
  }
  void write(void* tensor) const {
    char* p = static_cast<char*>(tensor) + at * width;
    for (int64_t i = 0; i < n * width; i += 64) __builtin_prefetch(p + i, 1);
  }
};

// float32 results go straight to their tensor, others through a scratch buffer and `finish`.
inline float* results(void* to, int dtype, int64_t at, float* scratch) {
  return dtype == kFloat32 ? static_cast<float*>(to) + at : scratch;
}

inline void finish(const float* from, int dtype, void* to, int64_t at, int n) {
  if (dtype != kFloat32) store_as(from, dtype, to, at, n);
}

// First half of exp(logvar / 2). As one loop the whole is a longer chain of operations than the
// processor looks ahead, and takes a third more time.
template <class Args>
inline void reduce(const Args& a, const float* logvar, int n, Scratch& s) {
#pragma omp simd
  for (int i = 0; i < n; ++i)
    s.reduced[i] = fd_exp_reduce(0.5f * fd_clamp(logvar[i], a.low, a.high), s.sd[i]);
}

// sd^2 - 1 is exact where the variance is near 1, so a posterior at the prior costs no digits.
FD_INLINE float kl_term(float mu, float logvar, float sd) {
  return mu * mu + ((sd * sd - 1.0f) - logvar);
}

inline void add_kl(const FdReparameterizeArgs& a, const float* mu, const float* logvar,
                   const float* sd, int n, float* lane) {
  const auto term = [&](int i) {
    return kl_term(mu[i], fd_clamp(logvar[i], a.low, a.high), sd[i]);
  };
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) lane[j] += term(i + j);
  }
  for (int j = 0; i < n; ++i, ++j) lane[j] += term(i);
}

// Normals of one of the draws of a sample.
template <class Args>
inline void draw(const Args& a, int64_t sample, int64_t number, int64_t first, int n, float* eps) {
  fill_normal(static_cast<uint64_t>(a.seeds[sample]), a.stream, a.step,
              number * fd_draw_stride(a.size) + first, n, eps);
}

// The sums over the draws, in their order, of grad_z and of grad_z eps sd; the first eps is drawn.
inline void add_gradients(const FdReparameterizeBackwardArgs& a, int64_t sample, int64_t first,
                          int n, Scratch& s) {
  for (int64_t k = 0; k < a.draws; ++k) {
    if (k > 0) draw(a, sample, k, first, n, s.eps);
    const int64_t at = (sample * a.draws + k) * a.size + first;
    const float* g = load_as_float(a.grad_z, a.in_dtype, at, n, s.grad_z);
    if (k == 0) {
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        s.sd[i] = fd_exp_finish(s.reduced[i], s.sd[i]);
        s.sum[i] = g[i];
        s.weighted[i] = g[i] * (s.sd[i] * s.eps[i]);
      }
    } else {
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        s.sum[i] += g[i];
        s.weighted[i] += g[i] * (s.sd[i] * s.eps[i]);
      }
    }
  }
}

}  // namespace

void reparameterize(const FdReparameterizeArgs& a) {
  const int64_t chunks = (a.size + kChunk - 1) / kChunk, total = a.samples * a.size;
  double* partial = scratch<double>(a.kl ? static_cast<size_t>(a.samples * chunks) : 0);
  parallel_for(a.samples * chunks, (1.0 + a.draws) * kChunk, [&](int64_t begin, int64_t end) {
    Scratch s;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t sample = unit / chunks, start = unit % chunks * kChunk;
      const int64_t stop = least(start + kChunk, a.size);
      float lane[kLanes] = {};
      for (int64_t first = start; first < stop; first += kPiece) {
        const int n = static_cast<int>(least(stop - first, kPiece));
        const int64_t at = sample * a.size + first;
        const Ahead ahead(at + n, total, kPiece, a.in_dtype);
        ahead.read(a.mu);
        ahead.read(a.logvar);
        draw(a, sample, 0, first, n, s.eps);
        if (a.draws == 1) ahead.write(a.z);
        const float* mu = load_as_float(a.mu, a.in_dtype, at, n, s.mu);
        const float* logvar = load_as_float(a.logvar, a.in_dtype, at, n, s.logvar);
        int64_t to = sample * a.draws * a.size + first;
        float* z = results(a.z, a.in_dtype, to, s.first);
        reduce(a, logvar, n, s);
#pragma omp simd
        for (int i = 0; i < n; ++i) {
          s.sd[i] = fd_exp_finish(s.reduced[i], s.sd[i]);
          z[i] = fd_add_term(mu[i], s.sd[i], s.eps[i]);
        }
        if (a.kl) add_kl(a, mu, logvar, s.sd, n, lane);
        finish(z, a.in_dtype, a.z, to, n);
        for (int64_t k = 1; k < a.draws; ++k) {
          draw(a, sample, k, first, n, s.eps);
          to += a.size;
          z = results(a.z, a.in_dtype, to, s.first);
#pragma omp simd
          for (int i = 0; i < n; ++i) z[i] = fd_add_term(mu[i], s.sd[i], s.eps[i]);
          finish(z, a.in_dtype, a.z, to, n);
        }
      }
      if (!a.kl) continue;
      double sum = 0.0;
      for (int j = 0; j < kLanes; ++j) sum += lane[j];
      partial[unit] = sum;
    }
  });
  if (!a.kl) return;
  for (int64_t sample = 0; sample < a.samples; ++sample) {
    double sum = 0.0;
    for (int64_t c = 0; c < chunks; ++c) sum += partial[sample * chunks + c];
    a.kl[sample] = static_cast<float>(0.5 * sum);
  }
}

// dz/dmu = 1, dz/dlogvar = eps sd / 2; dkl/dmu = mu, dkl/dlogvar = (sd^2 - 1) / 2.
void reparameterize_backward(const FdReparameterizeBackwardArgs& a) {
  constexpr int64_t kStep = kBackwardPiece;
  const int64_t pieces = (a.size + kStep - 1) / kStep, total = a.samples * a.size;
  parallel_for(a.samples * pieces, (1.0 + a.draws) * kStep, [&](int64_t begin, int64_t end) {
    Scratch s;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t sample = unit / pieces, first = unit % pieces * kStep;
      const int n = static_cast<int>(least(a.size - first, kStep));
      const int64_t at = sample * a.size + first;
      const Ahead ahead(at + n, total, kStep, a.in_dtype);
      ahead.read(a.mu);
      ahead.read(a.logvar);
      if (a.grad_z) {
        draw(a, sample, 0, first, n, s.eps);
        if (a.draws == 1) ahead.read(a.grad_z);
      }
      const float kl = a.grad_kl ? a.grad_kl[sample] : 0.0f;
      const float* mu = load_as_float(a.mu, a.in_dtype, at, n, s.mu);
      const float* logvar = load_as_float(a.logvar, a.in_dtype, at, n, s.logvar);
      float* grad_mu = results(a.grad_mu, a.in_dtype, at, s.first);
      float* grad_logvar = results(a.grad_logvar, a.in_dtype, at, s.second);
      reduce(a, logvar, n, s);
      ahead.write(a.grad_mu);
      const auto slope = [&](int i, float value) {
        return fd_beyond(logvar[i], a.low, a.high) ? 0.0f : 0.5f * value;
      };
      if (a.grad_z && a.draws == 1) {
        const float* g = load_as_float(a.grad_z, a.in_dtype, at, n, s.grad_z);
#pragma omp simd
        for (int i = 0; i < n; ++i) {
          const float sd = fd_exp_finish(s.reduced[i], s.sd[i]);
          grad_mu[i] = g[i] + kl * mu[i];
          grad_logvar[i] = slope(i, g[i] * (sd * s.eps[i]) + kl * (sd * sd - 1.0f));
        }
      } else if (a.grad_z) {
        add_gradients(a, sample, first, n, s);
#pragma omp simd
        for (int i = 0; i < n; ++i) {
          grad_mu[i] = s.sum[i] + kl * mu[i];
          grad_logvar[i] = slope(i, s.weighted[i] + kl * (s.sd[i] * s.sd[i] - 1.0f));
        }
      } else {
#pragma omp simd
        for (int i = 0; i < n; ++i) {
          const float sd = fd_exp_finish(s.reduced[i], s.sd[i]);
          grad_mu[i] = kl * mu[i];
          grad_logvar[i] = slope(i, kl * (sd * sd - 1.0f));
        }
      }
      ahead.write(a.grad_logvar);
      finish(grad_mu, a.in_dtype, a.grad_mu, at, n);
      finish(grad_logvar, a.in_dtype, a.grad_logvar, at, n);
    }
  });
}

}  // namespace FD_ISA
}  // namespace fd
