// One OpenMP region a call: equal contiguous shares of the work, none at all for small tensors.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fd {
namespace FD_ISA {
namespace {

inline int64_t max_threads() {
#ifdef _OPENMP
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

// Calls body(begin, end) so that the calls together cover [0, units) once.
template <class Body>
inline void parallel_for(int64_t units, double cost, const Body& body) {
#ifdef _OPENMP
  const int threads = static_cast<int>(worthwhile_threads(units, cost));
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t n = omp_get_num_threads(), i = omp_get_thread_num();
      const int64_t begin = units * i / n, end = units * (i + 1) / n;
      if (begin < end) body(begin, end);
    }
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
