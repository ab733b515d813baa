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

template <typename T>
METAADAMW_INLINE typename Lanes<T>::type& lanes_at(T* x) {
  return *reinterpret_cast<typename Lanes<T>::type*>(x);
}
template <typename T>
METAADAMW_INLINE const typename Lanes<T>::type& lanes_at(const T* x) {
  return *reinterpret_cast<const typename Lanes<T>::type*>(x);
}

// Sums by lane, in float64. They become one number at the end of a chunk only: additions that wait for one another are slow.
template <class R>
using LaneSums = double[R::kSums][kLanes];

// Adds what the lanes of a block hold to those of its chunk.
template <class R, typename V>
METAADAMW_INLINE void add_lanes(const V (&sums)[R::kSums], int begin, int end, LaneSums<R>& totals) {
  for (int s = begin; s < end; ++s) {
    lanes_at(totals[s]) += __builtin_convertvector(sums[s], typename Lanes<double>::type);
  }
}

// Adds the sums [begin, end) of n <= kBlock elements to `totals`, of those before `most`; of the operands only those are read that
// these are of. Products
// and lanes are in the arithmetic type, over kBlock / kLanes = 64 additions at most; everything after that is float64.
template <class R, int most, typename T>
METAADAMW_CLONES void sum_block(const typename R::template Measured<T>& measured, const T* const* operands, int n, int begin,
                                int end, LaneSums<R>& totals) {
  using Vector = typename Lanes<T>::type;
  const typename R::template Measured<T> s = measured;
  const T* at[R::kOperands] = {};
  for (int k = 0; k < R::kOperands; ++k) {
    if (kRead<R, most> >> k & 1) at[k] = operands[k];
  }
  Vector sums[R::kSums] = {};
  const int ahead = kPrefetch;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vector x[R::kOperands] = {};
    for (int k = 0; k < R::kOperands; ++k) {
      if (kRead<R, most> >> k & 1) {
        __builtin_prefetch(at[k] + i + ahead);
        x[k] = lanes_at(at[k] + i);
      }
    }
    accumulate<R, most, T>(s, sums, x);
  }
  if (i < n) {  // the tail, padded with zeros, which add nothing to any sum
    Vector tail[R::kOperands] = {};
    for (int k = 0; k < R::kOperands; ++k) {
      if (kRead<R, most> >> k & 1) std::memcpy(&tail[k], at[k] + i, (n - i) * sizeof(T));
    }
    accumulate<R, most, T>(s, sums, tail);
  }
  add_lanes<R>(sums, begin, end, totals);
}

// The sums of the first two operands over a block of each half of a chunk, with the bits of two calls of sum_block.
template <class R, typename T>
METAADAMW_CLONES void sum_pair(const typename R::template Measured<T>& measured, const T* first, const T* second, int64_t half,
                               int end, LaneSums<R> (&totals)[2]) {
  using Vector = typename Lanes<T>::type;
  Vector sums[2][R::kSums] = {};
  const int ahead = kPrefetch;
  for (int i = 0; i < kBlock; i += kLanes) {
    for (const int k : {0, 1}) {
      const T *y = first + k * half + i, *z = second + k * half + i;
      __builtin_prefetch(y + ahead);
      __builtin_prefetch(z + ahead);
      Vector x[R::kOperands] = {};
      x[0] = lanes_at(y);
      x[1] = lanes_at(z);
      accumulate<R, 0, T>(measured, sums[k], x);
    }
  }
  for (const int k : {0, 1}) {
    add_lanes<R>(sums[k], 0, end, totals[k]);
  }
}

// The sums [begin, end) of a chunk are those of its two halves, so that these can be read side by side: two streams of each operand
// come from memory 4 % faster than one. A chunk of one block has one half.
template <class R>
class ChunkSums {
 public:
  ChunkSums(int64_t count, int begin, int end)
      : half_((count + 2 * kBlock - 1) / (2 * kBlock) * kBlock), halves_(count > half_ ? 2 : 1), begin_(begin), end_(end) {
    for (int k = 0; k < halves_; ++k) {
      std::memset(sums_[k][begin], 0, (end - begin) * sizeof sums_[k][begin]);
    }
  }
  int64_t half() const { return half_; }
  LaneSums<R>& of_block(int64_t first) { return sums_[first >= half_]; }
  LaneSums<R> (&of_halves())[2] { return sums_; }
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
  LaneSums<R> sums_[2];
};

}  // namespace
}  // namespace metaadamw
