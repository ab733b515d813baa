// AVGrad's rule (docs/algorithm.md section 12): AdamW with the mean of v over all steps in v's place. Operands,
// vectors and moments are AdamW's; where amsgrad has the maximum, there is the mean, in every row. It has no statistics, only
// gradients to be clipped.
#pragma once

#include "adamw.h"

namespace metaadamw {

struct AVGrad : AdamW {
  static constexpr int kAverage = kMaximum;
  static constexpr const char* kLists[] = {"grads", "exp_avgs", "params", "exp_avg_sqs", "average_sqs"};
  static constexpr bool kLastIsOptional = false;
  static constexpr int kOptionalLists = 0;
  static constexpr int kWithout[] = {0};

  template <typename T>
  struct Scalars : AdamW::Scalars<T> {
    T step;
  };

  template <typename T>
  static METAADAMW_INLINE Scalars<T> scalars(const Update& update, int64_t t) {
    return {AdamW::scalars<T>(update, t), static_cast<T>(update.at(kStep, t))};
  }

  // A <- A + (v - A)/k;  p <- d*p - step_size*m_hat / (sqrt(A_hat) + eps), where A_hat has v's bias correction.
  template <bool, typename T, typename V>
  static METAADAMW_INLINE void update(const Scalars<T>& s, V (&x)[kOperands]) {
    moments(s, x[kGrad], x[kMomentum], x[kSecondMoment]);
    x[kAverage] += (x[kSecondMoment] - x[kAverage]) / s.step;
    x[kParam] = moved(s, x[kParam], x[kMomentum], x[kAverage]);
  }

  enum Sum { kGradSquared, kSums };
  static constexpr int kFirstLeft = 0, kEndLeft = 0, kFoundSums = 0, kFirstExtra = kSums;  // its update makes none
  static constexpr int kFoundWidths[] = {0};
  static constexpr bool kAllNeedGradient = true;
  static METAADAMW_INLINE constexpr int reads(int) { return 1 << kGrad; }

  template <typename T, typename V>
  static METAADAMW_INLINE void accumulate_found(const Measured<T>&, V (&sums)[kSums], const V (&x)[kOperands]) {
    sums[kGradSquared] += x[kGrad] * x[kGrad];
  }
  template <typename V>
  static METAADAMW_INLINE void accumulate_left(V (&)[kSums], const V (&)[kOperands]) {}
};

}  // namespace metaadamw
