// z = mu + exp(logvar / 2) eps with counter noise, and KL(N(mu, exp(logvar)) || N(0, I)) a sample.
//
// Forward reads mu and logvar, writes z; backward reads both and grad_z, writes two gradients and
// draws eps anew instead of loading it. z is equal in bits on every backend; the KL is a sum, the
// same for any number of threads (fixed chunks, added in order) but not promised across backends.
// Accumulates in float32 inside a chunk, in float64 over the chunks.
#include "../step.h"

#include <vector>

#include "fill_normal.h"
#include "kernels.h"
#include "store.h"
#include "table.h"
#include "threads.h"

namespace fd {
namespace FD_ISA {
namespace {

constexpr int kChunk = 1024;
constexpr int kLanes = 16;  // partial sums of a chunk: one fixed order for every instruction set

struct Scratch {
  float mu[kChunk], logvar[kChunk], eps[kChunk], a[kChunk], b[kChunk];
};

// sum of (mu^2 + exp(logvar) - 1 - logvar) over the chunk; `sd` holds exp(logvar / 2)
float kl_of_chunk(const float* mu, const float* logvar, const float* sd, int n) {
  float lane[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      const float m = mu[i + j], lv = logvar[i + j], s = sd[i + j];
      lane[j] += (m * m + s * s) - (1.0f + lv);
    }
  }
  for (int j = 0; i < n; ++i, ++j) {
    const float m = mu[i], lv = logvar[i], s = sd[i];
    lane[j] += (m * m + s * s) - (1.0f + lv);
  }
  float sum = 0.0f;
  for (int j = 0; j < kLanes; ++j) sum += lane[j];
  return sum;
}

}  // namespace

void reparameterize(const FdReparameterizeArgs& a) {
  const int64_t chunks = (a.size + kChunk - 1) / kChunk;
  std::vector<float> partial(a.kl ? static_cast<size_t>(a.samples * chunks) : 0);
  parallel_for(a.samples * chunks, 2.0 * kChunk, [&](int64_t begin, int64_t end) {
    Scratch s;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t sample = unit / chunks, first = unit % chunks * kChunk;
      const int n = static_cast<int>(a.size - first < kChunk ? a.size - first : kChunk);
      const int64_t at = sample * a.size + first;
      const float* mu = load_as_float(a.mu, a.in_dtype, at, n, s.mu);
      const float* logvar = load_as_float(a.logvar, a.in_dtype, at, n, s.logvar);
      fill_normal(static_cast<uint64_t>(a.seeds[sample]), a.stream, a.step, first, n, s.eps);
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        s.a[i] = fd_exp(0.5f * logvar[i]);
        s.b[i] = fd_add_term(mu[i], s.a[i], s.eps[i]);
      }
      store_as(s.b, a.in_dtype, a.z, at, n);
      if (a.kl) partial[static_cast<size_t>(unit)] = kl_of_chunk(mu, logvar, s.a, n);
    }
  });
  if (!a.kl) return;
  for (int64_t sample = 0; sample < a.samples; ++sample) {
    double sum = 0.0;
    for (int64_t c = 0; c < chunks; ++c) sum += partial[static_cast<size_t>(sample * chunks + c)];
    a.kl[sample] = static_cast<float>(0.5 * sum);
  }
}

// dz/dmu = 1, dz/dlogvar = eps sd / 2; dkl/dmu = mu, dkl/dlogvar = (sd^2 - 1) / 2.
void reparameterize_backward(const FdReparameterizeBackwardArgs& a) {
  const int64_t chunks = (a.size + kChunk - 1) / kChunk;
  parallel_for(a.samples * chunks, 2.0 * kChunk, [&](int64_t begin, int64_t end) {
    Scratch s;
    float grad_z[kChunk];
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t sample = unit / chunks, first = unit % chunks * kChunk;
      const int n = static_cast<int>(a.size - first < kChunk ? a.size - first : kChunk);
      const int64_t at = sample * a.size + first;
      const float* mu = load_as_float(a.mu, a.in_dtype, at, n, s.mu);
      const float* logvar = load_as_float(a.logvar, a.in_dtype, at, n, s.logvar);
      const float kl = a.grad_kl ? a.grad_kl[sample] : 0.0f;
      if (a.grad_z) {
        const float* g = load_as_float(a.grad_z, a.in_dtype, at, n, grad_z);
        fill_normal(static_cast<uint64_t>(a.seeds[sample]), a.stream, a.step, first, n, s.eps);
#pragma omp simd
        for (int i = 0; i < n; ++i) {
          const float sd = fd_exp(0.5f * logvar[i]);
          s.a[i] = g[i] + kl * mu[i];
          s.b[i] = 0.5f * (g[i] * (sd * s.eps[i]) + kl * (sd * sd - 1.0f));
        }
      } else {
#pragma omp simd
        for (int i = 0; i < n; ++i) {
          const float sd = fd_exp(0.5f * logvar[i]);
          s.a[i] = kl * mu[i];
          s.b[i] = 0.5f * (kl * (sd * sd - 1.0f));
        }
      }
      store_as(s.a, a.in_dtype, a.grad_mu, at, n);
      store_as(s.b, a.in_dtype, a.grad_logvar, at, n);
    }
  });
}

}  // namespace FD_ISA
}  // namespace fd
