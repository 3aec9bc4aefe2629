// Orders in which the words of fastdiff's noise are read, and generators known to be bad.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "normal.h"

constexpr int kCounters = 1024;        // counters a call
constexpr int kWords = 4 * kCounters;  // words a call

struct Counters {
  uint32_t word[4][kCounters];  // counter in, words out
  uint32_t key[2][kCounters];

  void set(int i, uint64_t seed, uint32_t stream, uint32_t step, uint64_t block) {
    word[0][i] = static_cast<uint32_t>(block);
    word[1][i] = static_cast<uint32_t>(block >> 32);
    word[2][i] = step;
    word[3][i] = stream;
    key[0][i] = static_cast<uint32_t>(seed);
    key[1][i] = static_cast<uint32_t>(seed >> 32);
  }

  // 10 rounds are the library's own function; fewer are a control that a good battery refuses.
  void draw(int rounds) {
    if (rounds == 10) {
      for (int i = 0; i < kCounters; ++i)
        fd_philox4x32_10(word[0][i], word[1][i], word[2][i], word[3][i], key[0][i], key[1][i]);
      return;
    }
    for (int r = 0; r < rounds; ++r)
      for (int i = 0; i < kCounters; ++i) {
        const uint32_t n = static_cast<uint32_t>(r);
        fd_philox_round(word[0][i], word[1][i], word[2][i], word[3][i],
                        key[0][i] + n * 0x9E3779B9u, key[1][i] + n * 0xBB67AE85u);
      }
  }
};

enum Order { kElements, kSteps, kSeeds, kMixed, kLcg64, kXorshift128, kUnknown };

inline Order order_of(const char* name) {
  const char* names[] = {"elements", "steps", "seeds", "mixed", "lcg64", "xorshift128"};
  int order = 0;
  while (order < kUnknown && std::strcmp(name, names[order])) ++order;
  return static_cast<Order>(order);
}

// A source of kWords words a call: raw ones, or made of normals where the name has "normals-".
class Feed {
 public:
  Feed(const char* name, uint64_t seed, int rounds)
      : of_normals(!std::strncmp(name, "normals-", 8)),
        order(order_of(name + (of_normals ? 8 : 0))),
        seed_(seed),
        rounds_(rounds) {}

  const bool of_normals;
  const Order order;

  void next(uint32_t* out) {
    if (order >= kLcg64) return control(out);
    if (of_normals) {
      mapped(out);
      return mapped(out + kWords / 2);
    }
    place();
    counters_.draw(rounds_);
    write(counters_.word, out);
  }

  const float* normals() const { return z_; }  // the kWords of them behind the latest half

 private:
  // The next kCounters counters, in the order of the feed.
  void place() {
    for (int i = 0; i < kCounters; ++i) {
      const uint64_t at = group_ * kCounters + static_cast<uint64_t>(i), low = at % kCounters;
      if (order == kElements)
        counters_.set(i, seed_, 0, 0, at);
      else if (order == kSteps)
        counters_.set(i, seed_, 1, static_cast<uint32_t>(at), at >> 32);
      else if (order == kSeeds)
        counters_.set(i, seed_ + at, 0, 0, 0);
      else
        // 8 streams, 8 neighbouring steps, 16 neighbouring seeds; then 256 blocks, 64 steps, seeds
        counters_.set(i, seed_ + (low >> 6) + 16 * (group_ >> 11), low & 7,
                      static_cast<uint32_t>((low >> 3 & 7) + 8 * (group_ >> 8 & 7)), group_ & 255);
    }
    ++group_;
  }

  // `elements` in the order of the elements of a tensor; the others word by word, so that what
  // follows each other differs in the counter's other places alone.
  template <class T>
  void write(const T (&word)[4][kCounters], T* out) const {
    if (order != kElements) {
      std::memcpy(out, word, sizeof(word));
      return;
    }
    for (int i = 0; i < kCounters; ++i)
      for (int k = 0; k < 4; ++k) out[4 * i + k] = word[k][i];
  }

  // Normals through their distribution function; two make a word, 16 bits each: a float32 near 1
  // has no more than 25 bits of its uniform.
  void mapped(uint32_t* out) {
    place();
    counters_.draw(rounds_);
    static float z[4][kCounters];
    for (int k = 0; k < 4; k += 2)
      for (int i = 0; i < kCounters; ++i)
        fd_box_muller(counters_.word[k][i], counters_.word[k + 1][i], z[k][i], z[k + 1][i]);
    write(z, z_);
    for (int i = 0; i < kWords; i += 2) out[i / 2] = uniform16(z_[i]) << 16 | uniform16(z_[i + 1]);
  }

  static uint32_t uniform16(float z) {
    return static_cast<uint32_t>(32768.0 * std::erfc(-0.7071067811865476 * z));
  }

  // Known failures: an LCG modulo 2^64 (by birthday spacings and low bits), a linear recurrence of
  // 128 bits (by ranks).
  void control(uint32_t* out) {
    for (int i = 0; i < kWords; ++i) {
      if (order == kLcg64) {
        if (i % 2 == 0) lcg_ = lcg_ * 6364136223846793005u + 1442695040888963407u;
        out[i] = static_cast<uint32_t>(lcg_ >> (i % 2 == 0 ? 32 : 0));
        continue;
      }
      uint32_t* s = xorshift_;
      const uint32_t t = s[3] ^ s[3] << 11;
      s[3] = s[2], s[2] = s[1], s[1] = s[0];
      out[i] = s[0] = s[0] ^ s[0] >> 19 ^ t ^ t >> 8;
    }
  }

  uint64_t seed_;
  int rounds_;
  uint64_t group_ = 0;
  Counters counters_;
  float z_[kWords];
  uint64_t lcg_ = 42;
  uint32_t xorshift_[4] = {123456789, 362436069, 521288629, 88675123};
};
