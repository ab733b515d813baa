// AdamW's rule with what online learning needs (docs/algorithm.md section 13): a moving average of the parameter, and the sums by
// which the scales of the update before are judged. The update is AdamW's, bit for bit. Compiled by the host compiler and by nvcc,
// with the same bits, as adamw.h.
#pragma once

#include "adamw.h"

namespace metaadamw {

struct OnlineAdamW : AdamW {
  // AdamW's operands keep their numbers but for the last, the running maximum, which a row may lack. The average may be missing as
  // a list: it then counts as zeros and is not stored.
  enum Operand { kAverage = kSecondMoment + 1, kMaximum, kOperands };
  static constexpr const char* kLists[] = {"grads", "exp_avgs", "params", "exp_avg_sqs", "ema_params", "max_exp_avg_sqs"};
  static constexpr int kOptionalLists = 1 << kAverage | 1 << kMaximum;
  static constexpr int kWithout[] = {1 << kAverage | 1 << kMaximum, 1 << kMaximum, 1 << kAverage, 0};
  static constexpr int kWritten = AdamW::kWritten | 1 << kAverage | 1 << kMaximum;

  // AdamW's, the average's decay, and of the update before what makes its moments a direction: the same three rows are the vectors
  // of `measure`.
  enum Vector { kAverageDecay = AdamW::kVectors, kFirstOfLast, kMeasureVectors = 3, kVectors = kFirstOfLast + kMeasureVectors };

  template <typename T>
  struct Scalars : AdamW::Scalars<T> {
    T average_weight;
  };

  template <typename T>
  static METAADAMW_INLINE Scalars<T> scalars(const Update& update, int64_t t) {
    return {AdamW::scalars<T>(update, t), static_cast<T>(1.0 - update.at(kAverageDecay, t))};
  }

  // As AdamW::update; then e <- e + (1 - decay)*(p - e).
  template <bool amsgrad, typename T, typename V>
  static METAADAMW_INLINE void update(const Scalars<T>& s, V (&x)[kOperands]) {
    moments(s, x[kGrad], x[kMomentum], x[kSecondMoment]);
    V v = x[kSecondMoment];
    if constexpr (amsgrad) {
      v = x[kMaximum] = nan_maximum(x[kMaximum], v);
    }
    x[kParam] = moved(s, x[kParam], x[kMomentum], v);
    x[kAverage] += s.average_weight * (x[kParam] - x[kAverage]);
  }

  // Those of AdamW that cost little; then those of the direction u of the update before, u = m_hat / (sqrt(v_hat) + eps) of the
  // moments that are found, and of the distance to the average; the non-zeros last.
  enum Sum {
    kGradDirection = AdamW::kGradNonzero,
    kGradParam,
    kDirectionSquared,
    kDirectionParam,
    kGradDistance,
    kDistanceSquared,
    kGradNonzero,
    kMomentumNonzero,
    kSums
  };
  static constexpr int kFoundSums = kSums;
  // None of the update before, then what the derivatives of a loss take, and a cosine, and with the average, and all.
  static constexpr int kFoundWidths[] = {kGradDirection, kDirectionSquared, kGradDistance, kGradNonzero, kSums};
  static METAADAMW_INLINE constexpr int reads(int sum) {
    constexpr int kDirection = 1 << kMomentum | 1 << kSecondMoment | 1 << kMaximum;
    return sum == kGradDirection      ? 1 << kGrad | kDirection
           : sum == kGradParam        ? 1 << kGrad | 1 << kParam
           : sum == kDirectionSquared ? kDirection
           : sum == kDirectionParam   ? 1 << kParam | kDirection
           : sum == kGradDistance     ? 1 << kGrad | 1 << kParam | 1 << kAverage
           : sum == kDistanceSquared  ? 1 << kParam | 1 << kAverage
           : sum == kGradNonzero      ? 1 << kGrad
           : sum == kMomentumNonzero  ? 1 << kMomentum
                                      : AdamW::reads(sum);
  }

  template <typename T>
  struct Measured {
    T inverse_correction1;       // 1 / (1 - beta1^k); 0 of a tensor that did not move: u is 0
    T inverse_sqrt_correction2;  // 1 / sqrt(1 - beta2^k)
    T eps;
  };

  // Half 0 of the vectors is what `measure` gets, half 1 are those of an update.
  template <typename T>
  static METAADAMW_INLINE Measured<T> measured(const Update& update, int half, int64_t t) {
    const int first = half * kFirstOfLast;
    return {static_cast<T>(update.at(first, t)), static_cast<T>(update.at(first + 1, t)), static_cast<T>(update.at(first + 2, t))};
  }

  template <typename T, typename V>
  static METAADAMW_INLINE void accumulate_found(const Measured<T>&, V (&sums)[kSums], const V (&x)[kOperands]) {
    AdamW::accumulate_found(NothingMeasured<T>(), sums, x);
  }

  template <int end, typename T, typename V>
  static METAADAMW_INLINE void accumulate_extra(const Measured<T>& last, V (&sums)[kSums], const V (&x)[kOperands]) {
    const V v = nan_maximum(x[kMaximum], x[kSecondMoment]);
    const V u = x[kMomentum] * last.inverse_correction1 / (square_root(v) * last.inverse_sqrt_correction2 + last.eps);
    sums[kGradDirection] += x[kGrad] * u;
    sums[kGradParam] += x[kGrad] * x[kParam];
    if constexpr (end > kDirectionSquared) {
      sums[kDirectionSquared] += u * u;
      sums[kDirectionParam] += u * x[kParam];
    }
    if constexpr (end > kGradDistance) {
      const V distance = x[kParam] - x[kAverage];
      sums[kGradDistance] += x[kGrad] * distance;
      sums[kDistanceSquared] += distance * distance;
    }
    if constexpr (end > kGradNonzero) {
      sums[kGradNonzero] += one_where_nonzero(x[kGrad]);
      sums[kMomentumNonzero] += one_where_nonzero(x[kMomentum]);
    }
  }
};

}  // namespace metaadamw
