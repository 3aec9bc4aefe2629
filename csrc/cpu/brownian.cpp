// Increments of a Brownian path: a weighted sum of counter normals, and x + scale * sum.
//
// Draws outweigh memory by far (some 30 of them an element), so the sum stays in the first cache:
// one piece is drawn and added up as often as there are weights, then written once. Which draws
// and weights make an increment is fastdiff/reference/brownian.py's matter. A sum starts at +0 and
// takes its terms in the order given, mul and add: equal in bits on every backend.
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

constexpr int64_t kPiece = 4 * kGroup;

// The sums of 64 * batches elements, at most kPiece, from a block on. Element order costs a
// shuffle, so it comes once, after the sum.
inline void sum_blocks(const FdBrownianArgs& a, uint64_t seed, uint64_t first_block, int batches,
                       float* out) {
  Words4 words;
  alignas(64) Normals4 sum;
  const int blocks = batches * kBatch;
  for (auto& part : sum) fill(part, part + blocks, 0.0f);
  for (int64_t k = 0; k < a.draws; ++k) {
    const uint32_t counter = static_cast<uint32_t>(a.counters[k]);
    const float weight = a.weights[k];
    const PhiloxDraw draw(seed, counter);
    for (int b = 0; b < batches; ++b)
      philox_batch(draw, seed, a.stream, counter, first_block + static_cast<uint64_t>(b) * kBatch,
                   words, b * kBatch);
    for (int pair = 0; pair < 4; pair += 2) {
#pragma omp simd
      for (int i = 0; i < blocks; ++i) {
        float z0, z1;
        fd_box_muller(words[pair][i], words[pair + 1][i], z0, z1);
        sum[pair][i] = fd_add_term(sum[pair][i], weight, z0);
        sum[pair + 1][i] = fd_add_term(sum[pair + 1][i], weight, z1);
      }
    }
  }
  for (int b = 0; b < batches; ++b) interleave(sum, b * kBatch, out + 4 * b * kBatch);
}

// The sums of the logical elements [first, first + n) of one sample.
inline void sum_normals(const FdBrownianArgs& a, uint64_t seed, int64_t first, int64_t n,
                        float* out) {
  constexpr int64_t kWidth = 4 * kBatch;
  const int64_t end = first + n;
  int64_t at = first / 4 * 4;
  while (at < end) {
    const int64_t count = least((end - at + kWidth - 1) / kWidth * kWidth, kPiece);
    const uint64_t block = static_cast<uint64_t>(at) / 4;
    const int batches = static_cast<int>(count / kWidth);
    if (at >= first && at + count <= end) {
      sum_blocks(a, seed, block, batches, out + (at - first));
    } else {
      float edge[kPiece];
      sum_blocks(a, seed, block, batches, edge);
      for (int64_t e = most(at, first); e < least(at + count, end); ++e)
        out[e - first] = edge[e - at];
    }
    at += count;
  }
}

}  // namespace

void brownian(const FdBrownianArgs& a) {
  const int64_t pieces = (a.size + kPiece - 1) / kPiece;
  const int64_t pixels = a.channels > 0 ? a.size / a.channels : 0;
  const double cost = 0.6 * kPiece * static_cast<double>(a.draws);
  parallel_for(a.samples * pieces, cost, [&](int64_t begin, int64_t end) {
    alignas(64) float sum[kPiece];
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t sample = unit / pieces, first = unit % pieces * kPiece;
      const int64_t n = least(a.size - first, kPiece), at = sample * a.size + first;
      const uint64_t seed = static_cast<uint64_t>(a.seeds[sample]);
      if (a.channels > 0) {
        channels_last(first, n, a.channels, pixels, sum,
                      [&](int64_t from, int64_t count, float* to) {
                        sum_normals(a, seed, from, count, to);
                      });
      } else {
        sum_normals(a, seed, first, n, sum);
      }
      if (a.x) {
        float* out = static_cast<float*>(a.out) + at;
        const float* x = a.x + at;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) out[i] = fd_add_term(x[i], a.scale, sum[i]);
      } else {
        store_as(sum, a.out_dtype, a.out, at, n);
      }
    }
  });
}

}  // namespace FD_ISA
}  // namespace fd
