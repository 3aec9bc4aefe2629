// x' = x + gate * residual, then (weight * norm(x') + bias) * (1 + scale) + shift, token by token.
//
// Reads x and the residual, writes x' and the result, each once: a token comes from memory when its
// first sum is taken and lies in the first-level cache for the rest. Accumulates in float32 in 32
// running sums of fixed positions, so a token has the same bits in any batch and for any number of
// threads. Every result is rounded once.
//
// Not bound by memory as long as a core has a cache level to itself: of 16 elements in float32 the
// passes cost 7 additions and multiplications, 5 loads and a store. Between the passes stand a sum
// across a register and a root, 120 cycles in which a token could not go on; so several tokens go
// through each pass together.
#include "kernels.h"
#include "scratch.h"
#include "store.h"
#include "table.h"
#include "threads.h"

namespace fd {
namespace FD_ISA {
namespace {

constexpr int64_t kRoom = 4096;  // channels that stay in scratch; a longer token is read again
constexpr int64_t kTokens = 4;   // that go through each pass together, where there is room

FD_INLINE float multiply_add(float a, float b, float c) {
#ifdef __FMA__
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// An element of a tensor of that type.
template <int kDtype>
struct Element {
  using Type = uint16_t;
  FD_INLINE float load(Type x) {
    return kDtype == kBFloat16 ? fd_from_bf16(x) : fd_from_f16(x);
  }
  FD_INLINE Type store(float x) {
    return kDtype == kBFloat16 ? fd_to_bf16(x) : fd_to_f16(x);
  }
};
template <>
struct Element<kFloat32> {
  using Type = float;
  FD_INLINE float load(float x) { return x; }
  FD_INLINE float store(float x) { return x; }
};

// Sixteen floats; where the instruction set has no register for them, the compiler takes several.
typedef float Vec __attribute__((vector_size(64)));
constexpr int64_t kVec = 16;

// Two running vectors, so that an addition need not wait for the one before.
struct Sum {
  Vec part[2] = {};

  float total() const {
    alignas(64) float lane[kVec];
    const Vec both = part[0] + part[1];
    __builtin_memcpy(lane, &both, sizeof both);
    for (int64_t half = kVec / 2; half > 0; half /= 2)
      for (int64_t j = 0; j < half; ++j) lane[j] += lane[j + half];
    return lane[0];
  }
};

// Calls body(values, which part of a sum) for n values; `filler` fills up the last vector.
template <class Body>
inline void vectors(const float* x, int64_t n, float filler, const Body& body) {
  const auto whole = [&](int64_t at, int part) {
    Vec v;
    __builtin_memcpy(&v, x + at, sizeof v);
    body(v, part);
  };
  int64_t i = 0;
  for (; i + 2 * kVec <= n; i += 2 * kVec) {
    whole(i, 0);
    whole(i + kVec, 1);
  }
  if (i + kVec <= n) {
    whole(i, 0);
    i += kVec;
  }
  if (i == n) return;
  alignas(64) float last[kVec];
  for (int64_t j = 0; j < kVec; ++j) last[j] = i + j < n ? x[i + j] : filler;
  Vec v;
  __builtin_memcpy(&v, last, sizeof v);
  body(v, 1);
}

// Lines of memory that the next tokens will want, asked for while this one computes: a few at a
// time, since asking for more than some 30 at once stalls. A tenth of the time in float32; 16-bit
// tensors have half the lines, and lose by it.
template <class Type>
struct Ahead {
  const Type *x, *residual, *out;  // residual may be null

  void step() {
    if (sizeof(Type) < 4) return;
    __builtin_prefetch(x, 0);
    if (residual) __builtin_prefetch(residual, 0);
    __builtin_prefetch(out, 1);
    x += kVec;
    residual += residual ? kVec : 0;
    out += kVec;
  }
};

struct Statistics {
  float mean = 0.0f, rstd = 1.0f;
  float rest = 0.0f;  // what (x - mean) * rstd is off by, since the mean was rounded
};

template <int kDtype>
class Worker {
 public:
  explicit Worker(const FdModulateArgs& a)
      : a_(a),
        size_(a.samples * a.tokens * a.channels),
        whole_(a.channels <= kRoom),
        each_token_(varies(a.scale) || varies(a.shift) || varies(a.gate)),
        group_(whole_ && !each_token_ ? least(kTokens, kRoom / a.channels) : 1) {}

  void rows(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end;) {
      const int64_t sample = row / a_.tokens, token = row % a_.tokens;
      const int64_t n = least(least(end - row, a_.tokens - token), group_);
      // the coefficients of a sample serve all its tokens
      if (whole_ && (each_token_ || sample != ready_)) coefficients(sample, token, 0, a_.channels);
      ready_ = sample;
      together(row, n);
      row += n;
    }
  }

 private:
  using Type = typename Element<kDtype>::Type;

  bool varies(const FdChannels& c) const { return c.data && c.token_stride != 0; }

  void coefficients(int64_t sample, int64_t token, int64_t first, int64_t n) {
    const auto channels = [&](const FdChannels& c) {
      const int64_t at = sample * c.sample_stride + token * c.token_stride + first;
      return load_as_float(c.data, a_.film_dtype, at, n, wide_);
    };
    const auto fill = [n](float* to, const float* from, float otherwise) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) to[i] = from ? from[i] : otherwise;
    };
    if (a_.gate.data) fill(gate_, channels(a_.gate), 0.0f);
    if (!a_.out) return;
    const auto affine = [&](const void* p) {
      return p ? load_as_float(p, a_.affine_dtype, first, n, wide_) : nullptr;
    };
    fill(gain_, affine(a_.weight), 1.0f);
    fill(offset_, affine(a_.bias), 0.0f);
    if (a_.scale.data) {
      const float* scale = channels(a_.scale);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        gain_[i] *= 1.0f + scale[i];
        offset_[i] *= 1.0f + scale[i];
      }
    }
    if (a_.shift.data) {
      const float* shift = channels(a_.shift);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) offset_[i] += shift[i];
    }
  }

  // x' of elements [at, at + n), stored and as floats: where it was stored, or in scratch.
  const float* sum(int64_t at, int64_t n, float* scratch) const {
    const Type* x = static_cast<const Type*>(a_.x) + at;
    if (!a_.residual) {
      if constexpr (kDtype == kFloat32) return x;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) scratch[i] = Element<kDtype>::load(x[i]);
      return scratch;
    }
    const Type* h = static_cast<const Type*>(a_.residual) + at;
    Type* total = static_cast<Type*>(a_.total) + at;
    const bool gated = a_.gate.data != nullptr;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float wide = Element<kDtype>::load(h[i]), old = Element<kDtype>::load(x[i]);
      const float now = gated ? multiply_add(gate_[i], wide, old) : old + wide;
      total[i] = Element<kDtype>::store(now);
      if constexpr (kDtype != kFloat32) scratch[i] = now;
    }
    if constexpr (kDtype == kFloat32) return total;
    return scratch;
  }

  // Calls body(x', first, n) for the pieces of a token.
  template <class Body>
  void pieces(int64_t row, const float* kept, const Body& body) {
    if (whole_) {
      body(kept, 0, a_.channels);
      return;
    }
    for (int64_t first = 0; first < a_.channels; first += kRoom) {
      const int64_t n = least(a_.channels - first, kRoom);
      coefficients(row / a_.tokens, row % a_.tokens, first, n);
      body(sum(row * a_.channels + first, n, sum_), first, n);
    }
  }

  void together(int64_t row, int64_t count) {
    const float* kept[kTokens] = {};
    Statistics s[kTokens];
    const int64_t channels = a_.channels;
    const float share = 1.0f / static_cast<float>(channels);
    const auto each = [&](const auto& body) {
      for (int64_t k = 0; k < count; ++k) body(row + k, kept[k], s[k]);
    };
    each([&](int64_t r, const float*& x, Statistics&) {
      if (whole_) x = sum(r * channels, channels, sum_ + (r - row) * channels);
    });
    if (!a_.out) {
      each([&](int64_t r, const float* x, Statistics&) {
        pieces(r, x, [](const float*, int64_t, int64_t) {});
      });
      return;
    }
    if (a_.norm == kLayerNorm) {
      each([&](int64_t r, const float* x, Statistics& t) { t.mean = share * total(r, x); });
      each([&](int64_t r, const float* x, Statistics& t) { deviation(r, x, share, count, t); });
    } else if (a_.norm == kRmsNorm) {
      each([&](int64_t r, const float* x, Statistics& t) { deviation(r, x, share, count, t); });
    }
    each([&](int64_t r, const float* kept_row, Statistics& t) {
      pieces(r, kept_row, [&](const float* x, int64_t first, int64_t n) {
        Type* y = static_cast<Type*>(a_.out) + r * channels + first;
        const float mean = t.mean, rstd = t.rstd, rest = t.rest;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i)
          y[i] = Element<kDtype>::store(
              multiply_add(multiply_add(x[i] - mean, rstd, rest), gain_[i], offset_[i]));
      });
    });
  }

  float total(int64_t row, const float* kept) {
    Sum sum;
    pieces(row, kept, [&](const float* x, int64_t, int64_t n) {
      vectors(x, n, 0.0f, [&](const Vec& v, int part) { sum.part[part] += v; });
    });
    return sum.total();
  }

  // About the mean (0 for RMS). What the rounded mean leaves is summed too: a mean far above the
  // deviation costs no digits (Chan, Golub and LeVeque 1983, The American Statistician 37).
  void deviation(int64_t row, const float* kept, float share, int64_t count, Statistics& s) {
    Sum first, second;
    const float mean = s.mean;
    const int64_t at = row * a_.channels, later = least(at + count * a_.channels, size_);
    const auto* residual = static_cast<const Type*>(a_.residual);
    Ahead<Type> ahead{static_cast<const Type*>(a_.x) + later, residual ? residual + later : residual,
                      static_cast<const Type*>(a_.out) + at};
    pieces(row, kept, [&](const float* x, int64_t, int64_t n) {
      vectors(x, n, mean, [&](const Vec& value, int part) {
        ahead.step();
        const Vec v = value - mean;
        first.part[part] += v;
        second.part[part] += v * v;
      });
    });
    const float rest = a_.norm == kLayerNorm ? share * first.total() : 0.0f;
    const float variance = share * second.total() - rest * rest;
    // below zero by a rounding alone; a NaN must stay
    s.rstd = 1.0f / fd_sqrt((variance < 0.0f ? 0.0f : variance) + a_.eps);
    s.rest = -rest * s.rstd;
  }

  const FdModulateArgs& a_;
  const int64_t size_;
  const bool whole_, each_token_;
  const int64_t group_;
  int64_t ready_ = -1;  // sample whose coefficients are in scratch
  alignas(64) float sum_[kRoom];
  alignas(64) float gain_[kRoom];    // weight * (1 + scale)
  alignas(64) float offset_[kRoom];  // bias * (1 + scale) + shift
  alignas(64) float gate_[kRoom], wide_[kRoom];
};

template <int kDtype>
void run(const FdModulateArgs& a) {
  const double cost = 0.2 * static_cast<double>(a.channels) * (a.residual ? 2.0 : 1.0);
  parallel_for(a.samples * a.tokens, cost, [&](int64_t begin, int64_t end) {
    Worker<kDtype> worker(a);
    worker.rows(begin, end);
  });
}

}  // namespace

void modulate(const FdModulateArgs& a) {
  if (a.dtype == kFloat32) return run<kFloat32>(a);
  if (a.dtype == kBFloat16) return run<kBFloat16>(a);
  run<kFloat16>(a);
}

}  // namespace FD_ISA
}  // namespace fd
