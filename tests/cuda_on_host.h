// Runs a kernel of csrc/cuda on the host: each thread of a block is a fiber, and __syncthreads hands
// over to the next one. Slow and exact; for the tests, on machines without a CUDA device.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

struct FdIndex {
  unsigned int x, y;
};
static FdIndex gridDim, blockDim, blockIdx, threadIdx;

namespace fd_host {

static ucontext_t scheduler;
static std::vector<ucontext_t> fibers;
static std::vector<bool> done;
static unsigned int running;
static unsigned char* dynamic;  // shared memory whose size the launch gives

static void select(unsigned int t) {
  running = t;
  threadIdx = {t % blockDim.x, t / blockDim.x};
}

static void sync() {
  const unsigned int me = running;
  swapcontext(&fibers[me], &scheduler);
}

// The value of another thread of the warp; every thread of the block must come here.
static float exchange(float value, unsigned int lane) {
  static std::vector<float> values;
  values.resize(fibers.size());
  values[running] = value;
  sync();
  const float other = values[running ^ lane];
  sync();
  return other;
}

template <class T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), const uint64_t* words, std::index_sequence<I...>) {
  kernel(from_word<A>(words[I])...);
}

template <class... A>
struct Block {
  static void (*kernel)(A...);
  static const uint64_t* words;
  static void fiber() {
    call(kernel, words, std::index_sequence_for<A...>{});
    done[running] = true;
    swapcontext(&fibers[running], &scheduler);
  }
};
template <class... A>
void (*Block<A...>::kernel)(A...);
template <class... A>
const uint64_t* Block<A...>::words;

constexpr size_t kGuard = 4096;  // bytes after the dynamic shared memory, which must stay as they are

// geometry: grid x, grid y, block x, block y, bytes of dynamic shared memory; words: one a parameter,
// its bits from the low end. Gives the number of blocks that wrote beyond their shared memory.
template <class... A>
uint64_t launch(void (*kernel)(A...), const uint64_t* geometry, const uint64_t* words) {
  gridDim = {unsigned(geometry[0]), unsigned(geometry[1])};
  blockDim = {unsigned(geometry[2]), unsigned(geometry[3])};
  Block<A...>::kernel = kernel;
  Block<A...>::words = words;
  const unsigned int threads = blockDim.x * blockDim.y;
  const size_t stack = 64 << 10;
  static std::vector<char> stacks;
  stacks.resize(threads * stack);
  fibers.resize(threads);
  const size_t shared = geometry[4];
  std::vector<unsigned char> memory(shared + kGuard + 16);
  dynamic = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16;
  const std::vector<unsigned char> untouched(kGuard, 0xff);
  uint64_t beyond = 0;
  for (unsigned int y = 0; y < gridDim.y; ++y) {
    for (unsigned int x = 0; x < gridDim.x; ++x) {
      blockIdx = {x, y};
      std::memset(dynamic, 0xff, shared + kGuard);  // NaN, as what another block left may be
      done.assign(threads, false);
      for (unsigned int t = 0; t < threads; ++t) {
        getcontext(&fibers[t]);
        fibers[t].uc_stack.ss_sp = stacks.data() + t * stack;
        fibers[t].uc_stack.ss_size = stack;
        fibers[t].uc_link = &scheduler;
        makecontext(&fibers[t], Block<A...>::fiber, 0);
      }
      for (bool left = true; left;) {
        left = false;
        for (unsigned int t = 0; t < threads; ++t) {
          if (done[t]) continue;
          select(t);
          swapcontext(&scheduler, &fibers[t]);
          left = left || !done[t];
        }
      }
      beyond += std::memcmp(dynamic + shared, untouched.data(), kGuard) != 0;
    }
  }
  return beyond;
}

}  // namespace fd_host

#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __syncthreads() fd_host::sync()
#define __shfl_xor_sync(mask, value, lane) fd_host::exchange(value, lane)
#define FD_DYNAMIC_SHARED(name) unsigned char* const name = fd_host::dynamic
#define FD_EXPORT(kernel)                                                              \
  extern "C" uint64_t host_##kernel(const uint64_t* geometry, const uint64_t* words) { \
    return fd_host::launch(kernel, geometry, words);                                   \
  }
