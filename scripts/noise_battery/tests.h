// Tests that read any number of words; each prints one statistic with a known distribution.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

constexpr int kBuffer = 1 << 18;  // words a call of add()

// One buffer in so many is read by a test that takes long: `most` uses of `bytes` bytes are enough.
inline uint64_t every(int log2_bytes, uint64_t bytes, uint64_t most) {
  const uint64_t one_in = (uint64_t{1} << log2_bytes) / bytes / most;
  return one_in ? one_in : 1;
}

// name, kind (chi2, z or poisson), statistic, and degrees of freedom or mean
inline void report(const char* name, int number, const char* kind, double value, double of) {
  std::printf("%s-%d\t%s\t%.17g\t%.17g\n", name, number, kind, value, of);
}

inline double chi_square(const std::vector<uint64_t>& seen, const std::vector<double>& share) {
  double total = 0, sum = 0;
  for (uint64_t n : seen) total += static_cast<double>(n);
  for (size_t i = 0; i < seen.size(); ++i) {
    const double want = total * share[i], off = static_cast<double>(seen[i]) - want;
    sum += off * off / want;
  }
  return sum;
}

// Counts of cells, in 32 bits so that they stay in the cache.
class Histogram {
 public:
  explicit Histogram(size_t cells)
      : share(cells, 1.0 / static_cast<double>(cells)), seen_(cells), recent_(cells) {}

  std::vector<double> share;

  void count(uint32_t cell) { ++recent_[cell]; }

  // once a buffer
  void end_buffer() {
    if (++buffers_ % 8192 == 0) flush();
  }

  void print(const char* name, int number) {
    flush();
    report(name, number, "chi2", chi_square(seen_, share), static_cast<double>(seen_.size() - 1));
  }

 private:
  void flush() {
    for (size_t i = 0; i < seen_.size(); ++i) seen_[i] += recent_[i], recent_[i] = 0;
  }

  std::vector<uint64_t> seen_;
  std::vector<uint32_t> recent_;
  uint64_t buffers_ = 0;
};

// Each of 32 bits is set half the time.
class Bits {
 public:
  void add(const uint32_t* w) {
    uint32_t ones[32] = {};
    for (int bit = 0; bit < 32; ++bit)
      for (int i = 0; i < kBuffer; ++i) ones[bit] += w[i] >> bit & 1;
    for (int bit = 0; bit < 32; ++bit) ones_[bit] += ones[bit];
    words_ += kBuffer;
  }
  void print() const {
    double sum = 0;
    for (uint64_t n : ones_) {
      const double z = (2.0 * static_cast<double>(n) - words_) / std::sqrt(words_);
      sum += z * z;
    }
    report("bits", 32, "chi2", sum, 32);
  }

 private:
  uint64_t ones_[32] = {};
  double words_ = 0;
};

// 16 bits from `shift` on, all values equally often.
class Halves {
 public:
  explicit Halves(int shift) : shift_(shift), cells_(1 << 16) {}
  void add(const uint32_t* w) {
    for (int i = 0; i < kBuffer; ++i) cells_.count(w[i] >> shift_ & 0xffff);
    cells_.end_buffer();
  }
  void print() { cells_.print("half", shift_); }

 private:
  int shift_;
  Histogram cells_;
};

// Pairs of bytes of two words, `lag` words apart and without overlap.
class Pairs {
 public:
  Pairs(int lag, int shift) : lag_(lag), shift_(shift), cells_(1 << 16) {}
  void add(const uint32_t* w) {
    for (int from = 0; from < kBuffer; from += 2 * lag_)
      for (int i = from; i < from + lag_; ++i)
        cells_.count((w[i] >> shift_ & 255) << 8 | (w[i + lag_] >> shift_ & 255));
    cells_.end_buffer();
  }
  void print() { cells_.print(shift_ ? "pairs-of-high-bytes" : "pairs-of-low-bytes", lag_); }

 private:
  int lag_, shift_;
  Histogram cells_;
};

// Hamming weights of 8 words, `stride` words apart, in four classes each.
class Weights {
 public:
  explicit Weights(int stride) : stride_(stride), cells_(1 << 16) {
    double class_share[4] = {}, choose = 1;
    for (int weight = 0; weight <= 32; ++weight) {
      class_share[class_of(weight)] += std::ldexp(choose, -32);
      choose = choose * (32 - weight) / (weight + 1);
    }
    for (size_t cell = 0; cell < cells_.share.size(); ++cell) {
      cells_.share[cell] = 1;
      for (int k = 0; k < 8; ++k) cells_.share[cell] *= class_share[cell >> 2 * k & 3];
    }
  }
  void add(const uint32_t* w) {
    for (int from = 0; from < kBuffer; from += 8 * stride_)
      for (int i = from; i < from + stride_; ++i) {
        uint32_t cell = 0;
        for (int k = 0; k < 8; ++k)
          cell = cell << 2 | class_of(__builtin_popcount(w[i + k * stride_]));
        cells_.count(cell);
      }
    cells_.end_buffer();
  }
  void print() { cells_.print("weights", stride_); }

 private:
  static uint32_t class_of(int weight) { return (weight > 14) + (weight > 16) + (weight > 18); }

  int stride_;
  Histogram cells_;
};

// Bits that two words, `lag` apart, have in common: half of them, for each lag up to 64.
class Correlations {
 public:
  void add(const uint32_t* w) {
    for (int lag = 1; lag <= 64; ++lag) {
      uint64_t sum = 0;
      for (int i = 0; i < kBuffer - 64; ++i)
        sum += static_cast<uint64_t>(__builtin_popcount(w[i] ^ w[i + lag]));
      differ_[lag - 1] += static_cast<int64_t>(sum) - 16 * (kBuffer - 64);
    }
    pairs_ += kBuffer - 64;
  }
  void print() const {
    double sum = 0;
    for (int64_t off : differ_) sum += static_cast<double>(off) * static_cast<double>(off);
    report("correlations", 64, "chi2", sum / (8 * pairs_), 64);
  }

 private:
  int64_t differ_[64] = {};
  double pairs_ = 0;
};

// Birthday spacings of 2^22 numbers of 64 bits (Marsaglia, Tsang 2002): equal spacings between
// neighbours are Poisson of mean n^3 / (4 2^64) = 1.
class Birthdays {
 public:
  explicit Birthdays(int log2_bytes) : every_(every(log2_bytes, 8 * kDays, 64)) {}
  void add(const uint32_t* w) {
    if (calls_++ % every_) return;
    for (int i = 0; i < kBuffer; i += 2)
      days_.push_back(static_cast<uint64_t>(w[i]) << 32 | w[i + 1]);
    if (days_.size() < kDays) return;
    std::sort(days_.begin(), days_.end());
    for (size_t i = kDays - 1; i > 0; --i) days_[i] -= days_[i - 1];
    std::sort(days_.begin() + 1, days_.end());
    for (size_t i = 2; i < kDays; ++i) equal_ += days_[i] == days_[i - 1];
    days_.clear();
    ++years_;
  }
  void print() const {
    if (years_) report("birthdays", 64, "poisson", equal_, years_);
  }

 private:
  static constexpr size_t kDays = 1 << 22;
  std::vector<uint64_t> days_;
  uint64_t every_, calls_ = 0;
  double equal_ = 0, years_ = 0;
};

// Ranks over GF(2) of random square matrices: full, one less, two less, lower.
template <int kSize>
class Ranks {
 public:
  Ranks(int log2_bytes, uint64_t most) : every_(every(log2_bytes, 4 * kMatrix, most)) {}
  void add(const uint32_t* w) {
    if (calls_++ % every_) return;
    for (int i = 0; i < kBuffer; i += kMatrix) ++seen_[std::min(3, kSize - rank(w + i))];
  }
  void print() const {
    // P(rank = n - k) = 2^(-k^2) prod_{j > k} (1 - 2^-j) / prod_{j <= k} (1 - 2^-j), n large
    std::vector<double> share = {0.28878809508660242, 0.57757619017320484, 0.12835026448293441, 0};
    share[3] = 1 - share[0] - share[1] - share[2];
    uint64_t matrices = 0;
    for (uint64_t n : seen_) matrices += n;
    // the rarest class needs five or so for its sum of squares to be a chi2
    if (matrices >= 1000) report("ranks", kSize, "chi2", chi_square(seen_, share), 3);
  }

 private:
  static constexpr int kRow = kSize / 32, kMatrix = kSize * kRow;

  static int rank(const uint32_t* w) {
    static uint32_t m[kSize][kRow];
    std::copy(w, w + kMatrix, &m[0][0]);
    int rank = 0;
    for (int column = 0; column < kSize; ++column) {
      const uint32_t bit = 1u << column % 32;
      int pivot = rank;
      while (pivot < kSize && !(m[pivot][column / 32] & bit)) ++pivot;
      if (pivot == kSize) continue;
      if (pivot != rank) std::swap(m[pivot], m[rank]);
      for (int row = pivot + 1; row < kSize; ++row)
        if (m[row][column / 32] & bit)
          for (int k = 0; k < kRow; ++k) m[row][k] ^= m[rank][k];
      ++rank;
    }
    return rank;
  }

  uint64_t every_, calls_ = 0;
  std::vector<uint64_t> seen_ = std::vector<uint64_t>(4);
};

// Normals beyond 3 to 6.5, on both sides, where 16 bits of the uniform say nothing.
class Tails {
 public:
  void add(const float* z, int count) {
    for (int k = 0; k < kEdges; ++k) {
      uint64_t out = 0;
      for (int i = 0; i < count; ++i) out += std::fabs(z[i]) > kFirst + kWidth * k;
      beyond_[k] += out;
    }
    count_ += count;
  }
  void print() const {
    for (int k = 0; k < kEdges; ++k) {
      const double share = std::erfc((kFirst + kWidth * k) / std::sqrt(2.0));
      const int name = static_cast<int>(10 * (kFirst + kWidth * k) + 0.5);
      const double n = static_cast<double>(beyond_[k]), want = share * count_;
      if (want < 1000)
        report("tails", name, "poisson", n, want);
      else
        report("tails", name, "z", (n - want) / std::sqrt(want * (1 - share)), 1);
    }
  }

 private:
  static constexpr int kEdges = 8;
  static constexpr float kFirst = 3.0f, kWidth = 0.5f;
  uint64_t beyond_[kEdges] = {};
  double count_ = 0;
};
