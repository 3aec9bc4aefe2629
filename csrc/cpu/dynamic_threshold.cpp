// The quantile of |x| of each sample, exactly, and x limited and divided by it.
//
// Without its sign bit a float32 is ordered as its bits are, so an order statistic is found by
// counting: a histogram of the upper 12 bits, the elements of the one bucket that matters written
// side by side, and the same again among them. Two passes over memory, and one to limit. The
// result does not depend on the number of threads: it is exact.
#include "../normal.h"

#include "kernels.h"
#include "scratch.h"
#include "table.h"
#include "threads.h"

namespace fd {
namespace FD_ISA {
namespace {

constexpr uint32_t kAbs = 0x7fffffffu, kInfinity = 0x7f800000u;
constexpr int kUpper = 19, kMiddle = 7;  // bits below the first and the second digit
constexpr int kBuckets = 4096;
constexpr int kCopies = 4;  // neighbours tend to one bucket: they count in different copies
constexpr int64_t kMostParts = 64;
constexpr int64_t kCounted = int64_t{1} << 31;  // elements of a part, whose counts have 32 bits

struct Counts {
  uint32_t bucket[kCopies][kBuckets];
  uint32_t most;
};

inline void count(const uint32_t* x, int64_t n, Counts& c) {
  fill(&c.bucket[0][0], &c.bucket[0][0] + kCopies * kBuckets, 0u);
  uint32_t most[kCopies] = {};
  int64_t i = 0;
  for (; i + kCopies <= n; i += kCopies) {
    for (int k = 0; k < kCopies; ++k) {
      const uint32_t bits = x[i + k] & kAbs;
      ++c.bucket[k][bits >> kUpper];
      most[k] = most[k] > bits ? most[k] : bits;
    }
  }
  for (; i < n; ++i) {
    const uint32_t bits = x[i] & kAbs;
    ++c.bucket[0][bits >> kUpper];
    most[0] = most[0] > bits ? most[0] : bits;
  }
  for (int b = 0; b < kBuckets; ++b)
    for (int k = 1; k < kCopies; ++k) c.bucket[0][b] += c.bucket[k][b];
  c.most = most[0];
  for (const uint32_t m : most) c.most = c.most > m ? c.most : m;
}

inline void gather(const uint32_t* x, int64_t n, uint32_t digit, uint32_t* to, int64_t room) {
  int64_t found = 0;
  for (int64_t i = 0; i < n && found < room; ++i) {
    const uint32_t bits = x[i] & kAbs;
    to[found] = bits;
    found += bits >> kUpper == digit;
  }
}

// The element of rank `rank` among n, which have the same bits from `shift + kBits` on; they come
// back as those that share the next digit.
template <int kShift, int kBits, class Count>
inline uint32_t digit_by(uint32_t* x, int64_t& n, int64_t& rank) {
  Count counts[1 << kBits] = {};
  constexpr uint32_t kMask = (1u << kBits) - 1;
  for (int64_t i = 0; i < n; ++i) ++counts[x[i] >> kShift & kMask];
  uint32_t digit = 0;
  while (rank >= counts[digit]) rank -= counts[digit++];
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = x[i];
    x[kept] = bits;
    kept += (bits >> kShift & kMask) == digit;
  }
  n = kept;
  return digit << kShift;
}

template <int kShift, int kBits>
inline uint32_t digit_of(uint32_t* x, int64_t& n, int64_t& rank) {
  return n < kCounted ? digit_by<kShift, kBits, uint32_t>(x, n, rank)
                      : digit_by<kShift, kBits, int64_t>(x, n, rank);
}

// What all threads work on: the slices of one sample and what was counted in them.
struct Sample {
  const uint32_t* x;
  int64_t size, parts;
  const Counts* counts;

  int64_t begin(int64_t p) const { return size * p / parts; }
  int64_t of(uint32_t digit) const {
    int64_t n = 0;
    for (int64_t p = 0; p < parts; ++p) n += counts[p].bucket[0][digit];
    return n;
  }
  // All elements of one bucket, side by side; there is room for one more.
  void collect(uint32_t digit, uint32_t* to) const {
    int64_t offset[kMostParts + 1] = {};
    for (int64_t p = 0; p < parts; ++p) offset[p + 1] = offset[p] + counts[p].bucket[0][digit];
    parallel_for(parts, 0.5 * static_cast<double>(size / parts), [&](int64_t from, int64_t end) {
      for (int64_t p = from; p < end; ++p)
        gather(x + begin(p), begin(p + 1) - begin(p), digit, to + offset[p],
               offset[p + 1] - offset[p]);
    });
  }
};

// The elements of rank `rank` (from 0) and of the rank after it, the last one being its own.
void order_statistics(const Sample& sample, int64_t rank, float* found) {
  static thread_local Kept kept;  // `counts` lives in the thread's other memory
  int64_t within = rank;
  uint32_t digit = 0;
  while (within >= sample.of(digit)) within -= sample.of(digit++);
  const int64_t n = sample.of(digit);
  uint32_t* all = static_cast<uint32_t*>(kept.room(static_cast<size_t>(2 * n + 2) * 4));
  uint32_t* some = all + n + 1;
  sample.collect(digit, all);
  for (int64_t i = 0; i < n; ++i) some[i] = all[i];
  int64_t left = n, place = within;
  uint32_t value = digit << kUpper;
  value |= digit_of<kMiddle, kUpper - kMiddle>(some, left, place);
  value |= digit_of<0, kMiddle>(some, left, place);
  found[0] = found[1] = fd_as_float(value);

  int64_t up_to = 0;
  uint32_t above = kAbs;
  for (int64_t i = 0; i < n; ++i) {
    up_to += all[i] <= value;
    above = all[i] > value && all[i] < above ? all[i] : above;
  }
  if (within + 1 < up_to || rank + 1 == sample.size) return;
  if (up_to == n) {  // the next one lies in another bucket
    do ++digit;
    while (sample.of(digit) == 0);
    const int64_t m = sample.of(digit);
    all = static_cast<uint32_t*>(kept.room(static_cast<size_t>(m + 1) * 4));
    sample.collect(digit, all);
    for (int64_t i = 0; i < m; ++i) above = all[i] < above ? all[i] : above;
  }
  found[1] = fd_as_float(above);
}

}  // namespace

void dynamic_threshold(const FdThresholdArgs& a) {
  const int64_t wanted = most(least(max_threads(), a.size / 65536), a.size / kCounted + 1);
  const int64_t parts = least(wanted, kMostParts);
  Counts* counts = scratch<Counts>(static_cast<size_t>(parts));
  for (int64_t i = 0; i < a.samples; ++i) {
    const float* x = a.x + i * a.size;
    const Sample sample{reinterpret_cast<const uint32_t*>(x), a.size, parts, counts};
    parallel_for(parts, 0.8 * static_cast<double>(a.size / parts), [&](int64_t from, int64_t to) {
      for (int64_t p = from; p < to; ++p)
        count(sample.x + sample.begin(p), sample.begin(p + 1) - sample.begin(p), counts[p]);
    });
    uint32_t largest = 0;
    for (int64_t p = 0; p < parts; ++p)
      largest = largest > counts[p].most ? largest : counts[p].most;
    float s = fd_as_float(kAbs);
    if (largest <= kInfinity) {
      float found[2];
      order_statistics(sample, a.rank, found);
      // as torch interpolates: from the nearer end
      const double low = found[0], high = found[1], w = a.weight;
      const double rise = low == high ? 0.0 : high - low;  // two infinities
      s = static_cast<float>(w < 0.5 ? low + w * rise : high - rise * (1.0 - w));
      if (a.out) s = s < 1.0f ? 1.0f : (s > a.most ? a.most : s);
    }
    a.quantile[i] = s;
    if (!a.out) continue;
    float* out = a.out + i * a.size;
    constexpr int64_t kPiece = 16384;
    parallel_for((a.size + kPiece - 1) / kPiece, 0.3 * kPiece, [&](int64_t from, int64_t to) {
      const int64_t end = least(to * kPiece, a.size);
#pragma omp simd
      for (int64_t k = from * kPiece; k < end; ++k) {
        const float limited = x[k] < -s ? -s : (x[k] > s ? s : x[k]);
        out[k] = s == s ? limited / s : s;
      }
    });
  }
}

}  // namespace FD_ISA
}  // namespace fd
