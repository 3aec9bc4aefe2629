// Sums over the threads of a block that share a sample.
#pragma once

#include "cuda/elements.h"

// In one fixed order; every thread of the block calls it, with room for one value each.
template <class T>
FD_DEVICE T sum_of_row(T value, T* shared) {
  T* mine = shared + threadIdx.y * blockDim.x;
  mine[threadIdx.x] = value;
  for (unsigned int stride = blockDim.x / 2; stride > 0; stride /= 2) {
    __syncthreads();
    if (threadIdx.x < stride) mine[threadIdx.x] += mine[threadIdx.x + stride];
  }
  __syncthreads();
  const T sum = mine[0];
  __syncthreads();  // before the next call writes
  return sum;
}
