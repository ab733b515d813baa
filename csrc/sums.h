// The sums of a rule R by number: which ones a call wants, and where they go.
#pragma once

#include "table.h"

namespace metaadamw {

// The sums that one call of `measure` returns: those that `mask` has a bit for, in their order.
template <class R>
struct Columns {
  int count = 0;
  int sum[R::kSums];

  explicit Columns(int mask) {
    for (int s = 0; s < R::kSums; ++s) {
      if (mask >> s & 1) sum[count++] = s;
    }
  }
};

// Of the sums that an update makes, the ones of what it leaves: they are carried over to the next call of `measure`.
template <class R>
METAADAMW_INLINE constexpr bool is_carried(int sum) {
  return sum >= R::kFirstLeft && sum < R::kUpdateSums;
}
template <class R>
constexpr int kCarriedSums = R::kUpdateSums - R::kFirstLeft;
template <class R>
constexpr int kCarriedMask = (1 << R::kUpdateSums) - (1 << R::kFirstLeft);

// The operands (bit i: operand i) that the sums of a mask, or the sums [begin, end), read.
template <class R>
METAADAMW_INLINE constexpr int reads_of(int mask) {
  int operands = 0;
  for (int s = 0; s < R::kSums; ++s) {
    operands |= mask >> s & 1 ? R::reads(s) : 0;
  }
  return operands;
}
template <class R>
METAADAMW_INLINE constexpr int reads_of(int begin, int end) {
  return reads_of<R>((1 << end) - (1 << begin));
}

// The operands that sums read at all.
template <class R>
constexpr int kRead = reads_of<R>(0, R::kSums);

// Where an update writes its sums: [T, kCarriedSums] of what it leaves or, before them, also those of what it found, [T,
// kUpdateSums].
template <class R>
struct NewSums {
  double* data;  // null if nobody wants them
  int columns;

  METAADAMW_INLINE bool found() const { return columns > kCarriedSums<R>; }
  METAADAMW_INLINE int first() const { return R::kUpdateSums - columns; }
  METAADAMW_INLINE double& at(int64_t t, int sum) const { return data[t * columns + sum - first()]; }
};

// All sums of elements x.
template <class R, bool counts, typename V>
METAADAMW_INLINE void accumulate(V (&sums)[R::kSums], const V (&x)[R::kOperands]) {
  R::accumulate_found(sums, x);
  R::accumulate_left(sums, x);
  if constexpr (counts) {
    R::accumulate_counts(sums, x);
  }
}

}  // namespace metaadamw
