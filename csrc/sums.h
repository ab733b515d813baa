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

// The sums of what an update leaves: they are carried over to the next call of `measure`.
template <class R>
METAADAMW_INLINE constexpr bool is_carried(int sum) {
  return sum >= R::kFirstLeft && sum < R::kEndLeft;
}
template <class R>
constexpr int kCarriedSums = R::kEndLeft - R::kFirstLeft;
template <class R>
constexpr int kCarriedMask = (1 << R::kEndLeft) - (1 << R::kFirstLeft);

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

// The operands that the sums [0, end) read; R::kFirstExtra of them at least.
template <class R, int end>
constexpr int kRead = reads_of<R>(0, end > R::kFirstExtra ? end : R::kFirstExtra);

// Where an update writes its sums: [T, kCarriedSums] of what it leaves, or of what it finds the first of kFoundWidths.
template <class R>
struct NewSums {
  double* data;  // null if nobody wants them
  int columns;

  METAADAMW_INLINE bool found() const { return R::kFoundSums > kCarriedSums<R> && columns > kCarriedSums<R>; }
  METAADAMW_INLINE int first() const { return found() ? 0 : R::kFirstLeft; }
  METAADAMW_INLINE int end() const { return first() + columns; }
  METAADAMW_INLINE double& at(int64_t t, int sum) const { return data[t * columns + sum - first()]; }

  static bool can_be_found(int64_t columns) {
    for (int width : R::kFoundWidths) {
      if (columns == width) return true;
    }
    return false;
  }
};

// The sums [0, end) of elements x; R::kFirstExtra of them at least.
template <class R, int end, typename T, typename V>
METAADAMW_INLINE void accumulate(const typename R::template Measured<T>& measured, V (&sums)[R::kSums],
                                 const V (&x)[R::kOperands]) {
  R::accumulate_found(measured, sums, x);
  if constexpr (end > R::kFirstExtra) {
    R::template accumulate_extra<end>(measured, sums, x);
  }
}

}  // namespace metaadamw
