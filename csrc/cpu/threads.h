// One OpenMP region a call: equal contiguous shares of the work, none at all for small tensors.
#pragma once

#include <cstdint>

#include "kernels.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <thread>
#include <vector>
#endif

namespace fd {
namespace FD_ISA {
namespace {

inline int64_t max_threads() {
  if (fd_forked) return 1;
#if defined(__SANITIZE_THREAD__)
  return 4;
#elif defined(_OPENMP)
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

// Threads for so many units, at least 1. `cost` is the time of one unit in nanoseconds, roughly: a
// thread must be worth the 5 us or so of waking it.
inline int64_t worthwhile_threads(int64_t units, double cost) {
  constexpr double kWorthAThread = 6000.0;
  const double shares = static_cast<double>(units) * cost / kWorthAThread;
  int64_t threads = max_threads();
  if (shares < static_cast<double>(threads)) threads = static_cast<int64_t>(shares);
  if (threads > units) threads = units;
  return threads < 1 ? 1 : threads;
}

// Calls body(begin, end) with share i of n.
template <class Body>
inline void run_share(int64_t units, int64_t n, int64_t i, const Body& body) {
  const int64_t begin = units * i / n, end = units * (i + 1) / n;
  if (begin < end) body(begin, end);
}

// Calls body(begin, end) so that the calls together cover [0, units) once.
template <class Body>
inline void parallel_for(int64_t units, double cost, const Body& body) {
#if defined(__SANITIZE_THREAD__)
  // ThreadSanitizer does not see how libgomp's threads wait for each other, but sees these do
  const int64_t threads = worthwhile_threads(units, cost);
  if (threads > 1) {
    std::vector<std::thread> team;
    for (int64_t i = 0; i < threads; ++i)
      team.emplace_back([&, i] { run_share(units, threads, i, body); });
    for (std::thread& one : team) one.join();
    return;
  }
#elif defined(_OPENMP)
  const int threads = static_cast<int>(worthwhile_threads(units, cost));
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    run_share(units, omp_get_num_threads(), omp_get_thread_num(), body);
    return;
  }
#else
  (void)cost;
#endif
  if (units > 0) body(0, units);
}

}  // namespace
}  // namespace FD_ISA
}  // namespace fd
