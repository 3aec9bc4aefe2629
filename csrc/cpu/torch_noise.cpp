// The normals of torch.randn on the CPU, bit for bit, from the state of a torch.Generator.
//
// The stream (torch 2.13, ATen/native/cpu/DistributionTemplates.h): words of MT19937, 16 a block;
// the low 24 bits of words 0 to 7 give the radii and those of words 8 to 15 the angles of 8
// Box-Muller pairs. With a size that 16 does not divide, the last 16 values come again from 16 fresh
// words; float32 has by then used up a word for every value of the unfinished block, and the 16-bit
// types none. The logarithm and the sines are those of Cephes, whose polynomials torch's build
// contracts: which products round on their own below is a fact of that build, which
// fastdiff/integrations/_torch_noise.py checks before it relies on it.
//
// The recurrence is serial but takes an eighth of the time: each thread walks it from the start up to
// its own share, without scratch memory and without waiting, and shares shrink along the stream.
#include "kernels.h"
#include "table.h"
#include "threads.h"
#include "torch_normal.h"

namespace fd {
namespace FD_ISA {

#ifdef FD_TORCH_NOISE
namespace {

// What Generator.get_state() begins with.
struct TorchState {
  uint64_t seed;
  int32_t left;  // 1 + words of the state that are not used yet
  int32_t seeded;
  uint64_t next;  // position of the first of those
  uint64_t words[kState];
};

// The words of a generator in order, from where it stands.
class Words {
 public:
  // `wanted` words will be asked for in all.
  Words(const TorchState& state, int64_t wanted) {
    for (int i = 0; i < kState; ++i) words_[i] = static_cast<uint32_t>(state.words[i]);
    next_ = state.left == 1 ? kState : static_cast<int64_t>(state.next);
    wanted_ = wanted - (end_ - next_);
  }

  // The next n words, n at most 2 kWidth; they stay until the next call.
  const uint32_t* take(int64_t n) {
    if (next_ + n > end_) refill();
    const uint32_t* found = words_ + next_;
    next_ += n;
    return found;
  }

  void skip(int64_t n) {
    while (next_ + n > end_) {
      n -= end_ - next_;
      next_ = end_;
      refill();
    }
    next_ += n;
  }

  void save(TorchState& state) const {
    const int64_t at = (next_ - 1) / kState * kState;  // torch makes a block when it needs one
    for (int i = 0; i < kState; ++i) state.words[i] = words_[at + i];
    state.next = next_ - at;
    state.left = static_cast<int32_t>(kState + 1 - state.next);
  }

 private:
  static constexpr int kRoom = 8 * kState;  // 20 KiB: in cache beside what is written

  // Room is a multiple of kState, so that the words always begin with a whole state of torch's.
  void refill() {
    const int64_t gone = end_ - kState;
    for (int i = 0; i < kState; i += kWidth) store(words_ + i, load(words_ + gone + i));
    next_ -= gone;
    const int64_t made = least(kRoom, (wanted_ + kState - 1) / kState * kState);
    wanted_ -= made;
    end_ = kState + made;
    advance(words_, made);
  }

  alignas(64) uint32_t words_[kState + kRoom];
  int64_t next_, end_ = kState;
  int64_t wanted_;  // and not made yet
};

// `blocks` blocks to out[at...]
template <int D>
inline void draw(Words& words, void* out, int64_t at, int64_t blocks) {
  constexpr int kValues = 2 * kWidth;
  Vec first, second;
  const int64_t end = at + blocks * kBlock;
  for (; at + kValues <= end; at += kValues) {
    box_muller(words.take(kValues), first, second);
    vec_store<D>(first, out, at);
    vec_store<D>(second, out, at + kWidth);
  }
  if (at < end) {  // one block where two fill the vectors
    uint32_t padded[kValues] = {};
    const uint32_t* found = words.take(kBlock);
    for (int i = 0; i < kBlock; ++i) padded[i] = found[i];
    box_muller(padded, first, second);
    vec_store<D>(first, out, at);
  }
}

template <int D>
void fill(const FdTorchNoiseArgs& a) {
  TorchState& state = *static_cast<TorchState*>(a.state);
  const int64_t blocks = a.size / kBlock, rest = a.size % kBlock;
  const int64_t unused = D == kFloat32 ? rest : 0;
  constexpr double kCost = 11.0;  // nanoseconds a block
  const int64_t shares = worthwhile_threads(blocks, kCost);
  TorchState end;  // others may still read the state when the last share is done
  parallel_for(shares, kCost * static_cast<double>(blocks), [&](int64_t from, int64_t to) {
    const int64_t begin = first_block(from, shares, blocks);
    const int64_t stop = first_block(to, shares, blocks);
    const bool last = to == shares;
    Words words(state, stop * kBlock + (last && rest ? unused + kBlock : 0));
    words.skip(begin * kBlock);
    draw<D>(words, a.out, begin * kBlock, stop - begin);
    if (!last) return;
    if (rest) {
      words.skip(unused);
      draw<D>(words, a.out, a.size - kBlock, 1);
    }
    words.save(end);
  });
  state.next = end.next;
  state.left = end.left;
  for (int i = 0; i < kState; ++i) state.words[i] = end.words[i];
}

}  // namespace

bool torch_noise(const FdTorchNoiseArgs& a) {
  const TorchState& state = *static_cast<const TorchState*>(a.state);
  const bool spent = state.left == 1;
  const bool begun = state.left > 1 && state.left <= kState && state.next + state.left == kState + 1;
  if (!(spent || begun) || a.size < kBlock) return false;
  if (a.out_dtype == kFloat32)
    fill<kFloat32>(a);
  else if (a.out_dtype == kBFloat16)
    fill<kBFloat16>(a);
  else
    fill<kFloat16>(a);
  return true;
}
#else
bool torch_noise(const FdTorchNoiseArgs&) { return false; }
#endif

}  // namespace FD_ISA
}  // namespace fd
