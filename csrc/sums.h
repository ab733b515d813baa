// The sums that describe one tensor, in the order of the columns of `optimizer.statistics`.
//
// V is the type of one accumulator: float or double in a GPU thread, a vector of lanes on the CPU.
#pragma once

#include "adamw.h"

namespace metaadamw {

enum Sum { kGradSquared, kGradMomentum, kMomentumSquared, kParamSquared, kSecondMomentSquared, kGradNonzero, kMomentumNonzero };
constexpr int kSums = 7;

// The sums that one call of tensor_stats returns.
struct Columns {
  int count = 0;
  int sum[kSums];

  Columns(bool params, bool exp_avg_sqs, bool count_nonzero) {
    const bool wanted[kSums] = {true, true, true, params, exp_avg_sqs, count_nonzero, count_nonzero};
    for (int s = 0; s < kSums; ++s) {
      if (wanted[s]) sum[count++] = s;
    }
  }
};

// The sums that the update makes, of what it finds in g and m and of what it leaves in p and v: all but the counts.
constexpr int kUpdateSums = kSecondMomentSquared + 1;

// Of these, the ones of what it leaves: they are carried over to the next statistics, which then do not read p and v.
METAADAMW_INLINE constexpr bool is_carried(int sum) { return sum == kParamSquared || sum == kSecondMomentSquared; }
constexpr int kCarriedSums = kUpdateSums - kParamSquared;

// Where the update writes its sums, [T, 2] or [T, 5]: Σp², Σv² of what it leaves, and before them Σg², Σg·m, Σm² of what it found.
struct NewSums {
  double* data;  // null if nobody wants them
  int columns;

  METAADAMW_INLINE bool found() const { return columns > 2; }
  METAADAMW_INLINE int first() const { return kUpdateSums - columns; }
  METAADAMW_INLINE double& at(int64_t t, int sum) const { return data[t * columns + sum - first()]; }
};

template <typename V>
METAADAMW_INLINE void accumulate_found(V (&sums)[kSums], V g, V m) {
  sums[kGradSquared] += g * g;
  sums[kGradMomentum] += g * m;
  sums[kMomentumSquared] += m * m;
}

template <typename V>
METAADAMW_INLINE void accumulate_left(V (&sums)[kSums], V p, V v) {
  sums[kParamSquared] += p * p;
  sums[kSecondMomentSquared] += v * v;
}

// counts = false leaves the last two untouched: only the `enhanced` features want them.
template <bool counts, typename V>
METAADAMW_INLINE void accumulate(V (&sums)[kSums], V g, V m, V p, V v) {
  accumulate_found(sums, g, m);
  accumulate_left(sums, p, v);
  if constexpr (counts) {
    const V zero = V{};
    const V one = zero + 1;
    sums[kGradNonzero] += g != zero ? one : zero;
    sums[kMomentumNonzero] += m != zero ? one : zero;
  }
}

}  // namespace metaadamw
