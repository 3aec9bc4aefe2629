// Increments of torchsde's Brownian tree, bit for bit: torch's normals of many seeds, halved down a
// tree of values and added up, in one pass.
//
// A node's value is split by torch.randn of the node's own seed, some 45 of them an increment. Each
// seed is a generator of its own that has to be run from its start, so all stand beside each other
// and one piece of the tensor after the other goes through the whole tree in cache: what is stored is
// 2.5 KiB a seed and a piece for each value that waits, whatever the size. Which seeds, factors and
// moves make an increment is fastdiff/integrations/_brownian_tree.py's matter.
#include "kernels.h"
#include "table.h"
#include "threads.h"
#include "torch_normal.h"

namespace fd {
namespace FD_ISA {

#ifdef FD_TORCH_NOISE
namespace {

constexpr int kPiece = 2 * kState;  // values: whole states, whole blocks and whole vectors
constexpr int kPair = 2 * kWidth;   // values that box_muller gives

// The states of `count` generators after torch's manual_seed, from every seed of a stride. Each is a
// serial chain, and several at a time hide that.
inline void seed_states(const uint32_t* seeds, int64_t stride, int64_t count, uint32_t* states) {
  constexpr int kChains = 8;
  for (int64_t first = 0; first < count; first += kChains) {
    const int chains = static_cast<int>(least(kChains, count - first));
    uint32_t last[kChains] = {};
    for (int c = 0; c < chains; ++c) last[c] = seeds[(first + c) * stride];
    for (uint32_t i = 0; i < kState; ++i) {
      for (int c = 0; c < chains; ++c) states[(first + c) * kState + i] = last[c];
      for (int c = 0; c < kChains; ++c)
        last[c] = 1812433253u * (last[c] ^ (last[c] >> 30)) + (i + 1);
    }
  }
}

inline void copy_state(const uint32_t* from, uint32_t* to) {
  for (int i = 0; i < kState; i += kWidth) store(to + i, load(from + i));
}

// What a thread works in.
struct Room {
  uint32_t* states;  // (draws, kState)
  uint32_t* words;   // a state and what follows it
  uint32_t* tails;   // (draws, kPair): the words of the last values, where they come again
  float* values;     // (waiting, kPiece)
  float* sum;        // (kPiece,)

  static constexpr int64_t kWords = kState + 3 * kState;

  explicit Room(const FdTreeArgs& a) {
    const int64_t sizes[] = {a.draws * kState, kWords, a.draws * kPair, a.waiting * kPiece};
    int64_t all = kPiece;
    for (int64_t size : sizes) all += size;
    float* at = scratch<float>(static_cast<size_t>(all));  // every size is whole cache lines
    states = reinterpret_cast<uint32_t*>(at);
    words = states + sizes[0];
    tails = words + sizes[1];
    values = reinterpret_cast<float*>(tails + sizes[2]);
    sum = values + sizes[3];
  }

  // Words `made`, behind the state of this draw, which then stands after the first `used` of them.
  const uint32_t* next(int64_t draw, int64_t made, int64_t used) {
    copy_state(states + draw * kState, words);
    advance(words, made);
    copy_state(words + used, states + draw * kState);
    return words + kState;
  }
};

// The value `now` split by the normals of these words: left, right, or right and behind it left.
template <int move>
inline void split(const uint32_t* words, const float* factors, float* now, int64_t count) {
  const Vec share = vec_set(factors[0]), inverse = vec_set(factors[1]), spread = vec_set(factors[2]);
  for (int64_t i = 0; i < count; i += kPair) {
    Vec normals[2];
    box_muller(words + i, normals[0], normals[1]);
    for (int k = 0; k < 2; ++k) {
      float* at = now + i + k * kWidth;
      const Vec value = vec_load<kFloat32>(at, 0);
      const Vec left = share * value * inverse + spread * normals[k];
      vec_store<kFloat32>(move == kTreeLeft ? left : value - left, at, 0);
      if (move == kTreeBoth) vec_store<kFloat32>(left, at + kPiece, 0);
    }
  }
}

// The sum of the leaves; `words_of` gives the words of a draw, which are asked for in order.
template <class WordsOf>
inline void walk(const FdTreeArgs& a, const WordsOf& words_of, const Room& room, int64_t count) {
  float* now = room.values;
  const uint32_t* words = words_of(0);
  for (int64_t i = 0; i < count; i += kPair) {
    Vec first, second;
    box_muller(words + i, first, second);
    vec_store<kFloat32>(first * vec_set(a.factors[0]), now + i, 0);
    vec_store<kFloat32>(second * vec_set(a.factors[0]), now + i, kWidth);
  }
  bool begun = false;
  for (int64_t step = 0, draw = 1; step < a.steps; ++step) {
    if (a.moves[step] == kTreeLeaf) {
      for (int64_t i = 0; i < count; i += kWidth) {
        const Vec leaf = vec_load<kFloat32>(now, i);
        vec_store<kFloat32>(begun ? vec_load<kFloat32>(room.sum, i) + leaf : leaf, room.sum, i);
      }
      begun = true;
      now -= kPiece;
      continue;
    }
    words = words_of(draw);
    const float* factors = a.factors + 3 * draw++;
    if (a.moves[step] == kTreeLeft) {
      split<kTreeLeft>(words, factors, now, count);
    } else if (a.moves[step] == kTreeRight) {
      split<kTreeRight>(words, factors, now, count);
    } else {
      split<kTreeBoth>(words, factors, now, count);
      now += kPiece;
    }
  }
}

inline void write(const FdTreeArgs& a, const float* sum, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth)
    vec_store<kFloat32>(vec_load<kFloat32>(sum, i) * vec_set(a.sign) / vec_set(a.divisor), out, i);
}

// Pieces [begin, end) of one tensor, and with the last one the values that torch draws again where
// 16 does not divide the size: from 16 words behind one for every value.
inline void run(const FdTreeArgs& a, int64_t sample, int64_t begin, int64_t end) {
  Room room(a);
  float* out = a.out + sample * a.size;
  seed_states(a.seeds + sample, a.samples, a.draws, room.states);
  for (int64_t draw = 0; draw < a.draws; ++draw)
    for (int64_t piece = 0; piece < begin; ++piece) room.next(draw, kPiece, kPiece);
  const int64_t blocks = a.size / kBlock * kBlock;
  bool again = false;
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t at = piece * kPiece, count = least(kPiece, blocks - at);
    again = at + count == blocks && blocks != a.size;
    const int64_t wanted = again ? a.size - at + kBlock : count;
    const int64_t made = (wanted + kState - 1) / kState * kState;
    const auto words_of = [&](int64_t draw) {
      const uint32_t* words = room.next(draw, made, least(made, kPiece));
      if (again) {
        uint32_t* tail = room.tails + draw * kPair;
        for (int i = 0; i < kPair; ++i) tail[i] = i < kBlock ? words[a.size - at + i] : 0;
      }
      return words;
    };
    walk(a, words_of, room, count);
    write(a, room.sum, out + at, count);
  }
  if (!again) return;
  walk(a, [&](int64_t draw) { return room.tails + draw * kPair; }, room, kBlock);
  write(a, room.sum, out + a.size - kBlock, kBlock);
}

}  // namespace

bool brownian_tree(const FdTreeArgs& a) {
  if (a.size < kBlock) return false;
  const int64_t pieces = (a.size / kBlock * kBlock + kPiece - 1) / kPiece;
  const double cost = 0.75 * kPiece * static_cast<double>(a.draws);  // nanoseconds a piece
  const int64_t shares = worthwhile_threads(pieces, cost);
  for (int64_t i = 0; i < a.samples; ++i)
    parallel_for(shares, cost * static_cast<double>(pieces), [&](int64_t from, int64_t to) {
      run(a, i, first_block(from, shares, pieces), first_block(to, shares, pieces));
    });
  return true;
}
#else
bool brownian_tree(const FdTreeArgs&) { return false; }
#endif

}  // namespace FD_ISA
}  // namespace fd
