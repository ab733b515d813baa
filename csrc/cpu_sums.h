// Sums over blocks and chunks of elements on the CPU, in an order that depends on neither the instruction set nor the threads.
#pragma once

#include "cpu_blocks.h"
#include "sums.h"

namespace metaadamw {
namespace {

// How many elements ahead of the loops memory is asked for. Four streams are more than the hardware follows well, but how far ahead
// pays is its own affair: 512 on an Intel Xeon with AVX-512, 13 % faster than none; on an AMD EPYC (Zen 4) 64 is the best, 2 %
// faster than torch's update, and with 512 it takes a third more time.
inline int prefetch_distance() {
#ifdef METAADAMW_HAS_CLONES
  return __builtin_cpu_is("intel") ? 512 : 64;
#else
  return 64;
#endif
}
const int kPrefetch = prefetch_distance();

constexpr int kLanes = 16;  // of one accumulator, on every instruction set: sums do not depend on the machine

template <typename T>
struct Lanes {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T)), aligned(sizeof(T)), may_alias));
};

// Sums by lane, in float64. They become one number at the end of a chunk only: additions that wait for one another are slow.
using LaneSums = double[kSums][kLanes];

// Adds what the lanes of a block hold to those of its chunk.
template <typename V>
METAADAMW_INLINE void add_lanes(const V (&sums)[kSums], int begin, int end, LaneSums& totals) {
  using Doubles = typename Lanes<double>::type;
  for (int s = begin; s < end; ++s) {
    *reinterpret_cast<Doubles*>(totals[s]) += __builtin_convertvector(sums[s], Doubles);
  }
}

// Adds the sums [begin, end) of n <= kBlock elements to `totals`. Products and lanes are in the arithmetic type, over kBlock /
// kLanes = 64 additions at most; everything after that is float64.
template <bool counts, typename T>
METAADAMW_INLINE void block_sums(const T* g, const T* m, const T* p, const T* v, int n, int begin, int end, LaneSums& totals) {
  using Vector = typename Lanes<T>::type;
  Vector sums[kSums] = {};
  const int ahead = kPrefetch;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (const T* stream : {g, m, p, v}) {
      __builtin_prefetch(stream + i + ahead);
    }
    accumulate<counts, Vector>(sums, *reinterpret_cast<const Vector*>(g + i), *reinterpret_cast<const Vector*>(m + i),
                               *reinterpret_cast<const Vector*>(p + i), *reinterpret_cast<const Vector*>(v + i));
  }
  if (i < n) {  // the tail, padded with zeros, which add nothing to any sum
    Vector tail[4] = {};
    const T* operands[4] = {g, m, p, v};
    for (int k = 0; k < 4; ++k) {
      std::memcpy(&tail[k], operands[k] + i, (n - i) * sizeof(T));
    }
    accumulate<counts, Vector>(sums, tail[0], tail[1], tail[2], tail[3]);
  }
  add_lanes(sums, begin, end, totals);
}

#define METAADAMW_BLOCK_SUMS(T, counts)                                                                                      \
  METAADAMW_CLONES void block_sums_##T##_##counts(const T* g, const T* m, const T* p, const T* v, int n, int begin, int end, \
                                                  LaneSums& totals) {                                                        \
    block_sums<counts, T>(g, m, p, v, n, begin, end, totals);                                                                \
  }
METAADAMW_BLOCK_SUMS(float, false)
METAADAMW_BLOCK_SUMS(float, true)
METAADAMW_BLOCK_SUMS(double, false)
METAADAMW_BLOCK_SUMS(double, true)
#undef METAADAMW_BLOCK_SUMS

void sum_block(const float* g, const float* m, const float* p, const float* v, int n, int begin, int end, LaneSums& totals) {
  (end > kUpdateSums ? block_sums_float_true : block_sums_float_false)(g, m, p, v, n, begin, end, totals);
}
void sum_block(const double* g, const double* m, const double* p, const double* v, int n, int begin, int end, LaneSums& totals) {
  (end > kUpdateSums ? block_sums_double_true : block_sums_double_false)(g, m, p, v, n, begin, end, totals);
}

// The sums of gradient and momentum over a block of each half of a chunk, with the bits of two block_sums.
template <typename T>
METAADAMW_INLINE void pair_sums(const T* g, const T* m, int64_t half, LaneSums (&totals)[2]) {
  using Vector = typename Lanes<T>::type;
  Vector sums[2][kSums] = {};
  const int ahead = kPrefetch;
  for (int i = 0; i < kBlock; i += kLanes) {
    for (const int k : {0, 1}) {
      const T *x = g + k * half + i, *y = m + k * half + i;
      __builtin_prefetch(x + ahead);
      __builtin_prefetch(y + ahead);
      accumulate<false, Vector>(sums[k], *reinterpret_cast<const Vector*>(x), *reinterpret_cast<const Vector*>(y), Vector{},
                                Vector{});
    }
  }
  for (const int k : {0, 1}) {
    add_lanes(sums[k], kGradSquared, kMomentumSquared + 1, totals[k]);
  }
}
METAADAMW_CLONES void sum_pair(const float* g, const float* m, int64_t half, LaneSums (&totals)[2]) {
  pair_sums(g, m, half, totals);
}
METAADAMW_CLONES void sum_pair(const double* g, const double* m, int64_t half, LaneSums (&totals)[2]) {
  pair_sums(g, m, half, totals);
}

// The sums [begin, end) of a chunk are those of its two halves, so that these can be read side by side: two streams of each operand
// come from memory 4 % faster than one. A chunk of one block has one half.
class ChunkSums {
 public:
  ChunkSums(int64_t count, int begin, int end)
      : half_((count + 2 * kBlock - 1) / (2 * kBlock) * kBlock), halves_(count > half_ ? 2 : 1), begin_(begin), end_(end) {
    for (int k = 0; k < halves_; ++k) {
      std::memset(sums_[k][begin], 0, (end - begin) * sizeof sums_[k][begin]);
    }
  }
  int64_t half() const { return half_; }
  LaneSums& of_block(int64_t first) { return sums_[first >= half_]; }
  LaneSums (&of_halves())[2] { return sums_; }
  // Lanes of both halves, then lanes of lanes, always in this order.
  void add_to(double* totals) {
    for (int s = begin_; s < end_; ++s) {
      double (&lanes)[kLanes] = sums_[0][s];
      for (int lane = 0; lane < kLanes && halves_ == 2; ++lane) {
        lanes[lane] += sums_[1][s][lane];
      }
      for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int lane = 0; lane < width; ++lane) {
          lanes[lane] += lanes[lane + width];
        }
      }
      totals[s] += lanes[0];
    }
  }

 private:
  int64_t half_;
  int halves_, begin_, end_;
  LaneSums sums_[2];
};

}  // namespace
}  // namespace metaadamw
