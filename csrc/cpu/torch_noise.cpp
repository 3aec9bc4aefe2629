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

#if defined(__AVX2__) && defined(__FMA__)
#define FD_TORCH_NOISE
#include <immintrin.h>

#include "scratch.h"
#include "threads.h"
#include "vec.h"
#endif

namespace fd {
namespace FD_ISA {

#ifdef FD_TORCH_NOISE
namespace {

constexpr int kState = 624, kLag = 397;  // of MT19937
constexpr int kBlock = 16;               // values of one Box-Muller block

// What Generator.get_state() begins with.
struct TorchState {
  uint64_t seed;
  int32_t left;  // 1 + words of the state that are not used yet
  int32_t seeded;
  uint64_t next;  // position of the first of those
  uint64_t words[kState];
};

// The same vectors, whatever vec.h builds them from.
typedef int32_t Ints __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef uint32_t Uints __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));

inline Uints load(const uint32_t* p) { return *reinterpret_cast<const Uints*>(p); }
inline void store(uint32_t* p, Uints v) { *reinterpret_cast<Uints*>(p) = v; }

#ifdef __AVX512F__
// Neighbouring vectors in turn, `k` words past aligned ones, of aligned loads alone: one that lies
// across two cache lines takes twice as long.
struct Window {
  Uints now;
  explicit Window(const uint32_t* first) : now(load(first)) {}
  template <int k>
  Uints at(const uint32_t* p) {
    const Uints then = load(p + kWidth);
    const Uints found = (Uints)_mm512_alignr_epi32((__m512i)then, (__m512i)now, k);
    now = then;
    return found;
  }
};

inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec root(Vec a) { return _mm512_sqrt_ps(a); }
// Of two vectors the lower halves and the upper ones.
inline void halves(Vec a, Vec b, Vec& low, Vec& high) {
  low = _mm512_shuffle_f32x4(a, b, 0x44);
  high = _mm512_shuffle_f32x4(a, b, 0xee);
}
inline Vec where(Uints bits, uint32_t bit, Vec set, Vec clear) {
  const __mmask16 mask = _mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(bit));
  return _mm512_mask_blend_ps(mask, clear, set);
}
#else
struct Window {
  explicit Window(const uint32_t*) {}
  template <int k>
  Uints at(const uint32_t* p) {
    return load(p + k);
  }
};

inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline Vec root(Vec a) { return (Vec)_mm256_sqrt_ps((__m256)a); }
// A block is two vectors already.
inline void halves(Vec a, Vec b, Vec& low, Vec& high) {
  low = a;
  high = b;
}
inline Vec where(Uints bits, uint32_t bit, Vec set, Vec clear) {
  const Uints moved = bits << __builtin_clz(bit);  // the sign bit chooses
  return (Vec)_mm256_blendv_ps((__m256)clear, (__m256)set, (__m256)moved);
}
#endif

inline Vec to_floats(Uints v) { return __builtin_convertvector((Ints)v, Vec); }

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
    constexpr int kPast = kLag % kWidth, kAhead = kLag - kPast;
    Window here(words_), ahead(words_ + kAhead);
    for (uint32_t *p = words_, *stop = words_ + made; p < stop; p += kWidth) {
      const Uints low = here.at<1>(p), lag = ahead.at<kPast>(p + kAhead);
      const Uints mixed = (load(p) & 0x80000000u) | (low & 0x7fffffffu);
      store(p + kState, lag ^ (mixed >> 1) ^ ((0u - (low & 1u)) & 0x9908b0dfu));
    }
  }

  alignas(64) uint32_t words_[kState + kRoom];
  int64_t next_, end_ = kState;
  int64_t wanted_;  // and not made yet
};

// Low 24 bits of a word as torch hands it out.
inline Uints uniform(const uint32_t* p) {
  Uints y = load(p);
  y ^= y >> 11;
  y ^= (y << 7) & 0x9d2c5680u;
  y ^= (y << 15) & 0xefc60000u;
  return (y ^ (y >> 18)) & 0xffffffu;
}

// sqrt(-2 log(1 - k / 2^24))
inline Vec radius(Vec k) {
  constexpr uint32_t kRootHalf = 0x3f3504f3u;  // mantissas in [sqrt(1/2), sqrt(2))
  const Uints bits = (Uints)(16777216.0f - k) - (kRootHalf + (24u << 23));
  const Vec e = __builtin_convertvector((Ints)bits >> 23, Vec);
  const Vec x = (Vec)((bits & 0x7fffffu) + kRootHalf) - 1.0f, z = x * x;
  Vec y = fma(vec_set(7.0376836292e-2f), x, vec_set(-1.1514610310e-1f));
  y = fma(y, x, vec_set(1.1676998740e-1f));
  y = fma(y, x, vec_set(-1.2420140846e-1f));
  y = fma(y, x, vec_set(1.4249322787e-1f));
  y = fma(y, x, vec_set(-1.6668057665e-1f));
  y = fma(y, x, vec_set(2.0000714765e-1f));
  y = fma(y, x, vec_set(-2.4999993993e-1f));
  y = fma(y, x, vec_set(3.3333331174e-1f));
  y = fma(y * x, z, e * -2.12194440e-4f);
  y = fma(z, vec_set(-0.5f), y);
  return root(-2.0f * fma(e, vec_set(0.693359375f), x + y));
}

inline void sines(Vec k, Vec& sine, Vec& cosine) {
  const Vec angle = k * (6.2831855f / 16777216.0f);
  // twice the quarter turn that is nearest
  const Uints turn = ((Uints)__builtin_convertvector(angle * 1.27323954473516f, Ints) + 1u) & ~1u;
  const Vec t = to_floats(turn);
  Vec x = fma(t, vec_set(-0.78515625f), angle);
  x = fma(t, vec_set(-2.4187564849853515625e-4f), x);
  x = fma(t, vec_set(-3.77489497744594108e-8f), x);
  const Vec z = x * x;
  Vec c = fma(vec_set(2.443315711809948e-5f), z, vec_set(-1.388731625493765e-3f));
  c = fma(c, z, vec_set(4.166664568298827e-2f));
  c = fma(c * z, z, -0.5f * z) + 1.0f;
  Vec s = fma(vec_set(-1.9515295891e-4f), z, vec_set(8.3321608736e-3f));
  s = fma(s, z, vec_set(-1.6666654611e-1f));
  s = fma(s * z, x, x);
  sine = (Vec)((Uints)where(turn, 2u, c, s) ^ ((turn << 29) & 0x80000000u));
  cosine = (Vec)((Uints)where(turn, 2u, s, c) ^ (((turn + 2u) << 29) & 0x80000000u));
}

// The 2 kWidth values of as many words: one block or two.
inline void box_muller(const uint32_t* words, Vec& first, Vec& second) {
  Vec u1, u2, sine, cosine;
  halves(to_floats(uniform(words)), to_floats(uniform(words + kWidth)), u1, u2);
  const Vec r = radius(u1);
  sines(u2, sine, cosine);
  // adding zero makes -0 positive, as torch's shift by its mean does
  halves(fma(r, cosine, vec_set(0.0f)), fma(r, sine, vec_set(0.0f)), first, second);
}

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

// Where share i of `shares` begins, out of `blocks`: equal times, for whoever draws a share has to walk
// past all before it, at `kWalk` of the price of drawing them.
inline int64_t first_block(int64_t i, int64_t shares, int64_t blocks) {
  constexpr double kWalk = 0.12;
  double part = 1.0, all = 1.0;
  for (int64_t k = 0; k < shares; ++k) {
    all *= 1.0 - kWalk;
    if (k < i) part *= 1.0 - kWalk;
  }
  return static_cast<int64_t>(static_cast<double>(blocks) * ((1.0 - part) / (1.0 - all)));
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
