// AdamW's rule: the modulated update of one element, the numbers per tensor that it needs, and the sums that describe a tensor.
//
// A rule is what the engines (engine_cpu.h, engine_cuda.cuh) must know of an optimizer. They know operands, vectors and sums by
// number alone. This is the only place in C++ and CUDA where the formula stands. It knows no torch types, so the same lines are
// compiled by the host compiler and by nvcc; with contraction of a*b+c off (-ffp-contract=off, -fmad=false) and IEEE division and
// square root, both give the same bits.
#pragma once

#include <cmath>
#include <type_traits>

#include "compare.h"

namespace metaadamw {

// The vectors of one update, float64 [R::kVectors, T], a row each, and how it rounds what it stores (rounding.h).
struct Update {
  const double* vectors;
  int64_t tensors;
  bool stochastic;
  int64_t rounding_seed;

  METAADAMW_INLINE double at(int vector, int64_t t) const { return vectors[vector * tensors + t]; }
};

// base^exponent by repeated squaring. std::pow may differ in its last bit between a CPU's and a GPU's library; this cannot.
METAADAMW_INLINE double integer_power(double base, double exponent) {
  double result = 1.0;
  // A step that is NaN or negative counts as 0: the update then divides by zero, and that shows.
  for (uint64_t bits = exponent > 0.0 ? static_cast<uint64_t>(exponent) : 0; bits != 0; bits >>= 1, base *= base) {
    if (bits & 1) {
      result *= base;
    }
  }
  return result;
}

// What makes up for the moments' start at zero; equal for all tensors of equal betas and step count.
struct BiasCorrections {
  double first;                // 1 - beta1^k
  double inverse_sqrt_second;  // 1 / sqrt(1 - beta2^k)
};

METAADAMW_INLINE BiasCorrections bias_corrections(double beta1, double beta2, double step) {
  return {1.0 - integer_power(beta1, step), 1.0 / std::sqrt(1.0 - integer_power(beta2, step))};
}

// bias_corrections of one tensor after another. Most tensors share betas and step count with the one before, and two powers and a
// root are much for a tensor of a few elements.
struct CorrectionsInTurn {
  double beta1 = -1.0, beta2 = -1.0, step = -1.0;
  BiasCorrections corrections{};

  const BiasCorrections& of(double next_beta1, double next_beta2, double next_step) {
    if (next_beta1 != beta1 || next_beta2 != beta2 || next_step != step) {
      corrections = bias_corrections(beta1 = next_beta1, beta2 = next_beta2, step = next_step);
    }
    return corrections;
  }
};

// The hyper-parameters of one tensor as the caller gives them: float64, before any rounding.
struct Hyperparameters {
  double step_size;  // lr * lr_scale
  double decay_factor;
  double step;
  double beta1;
  double beta2;
  double eps;
  double grad_scale;
};

// A parameter of bfloat16 or float16 that has a float32 master is the master's rounding to nearest, unless somebody wrote it since:
// then what was written is what the update starts from. Versions do not tell, since `p.data` has a counter of its own: the numbers
// are compared. `rounded` is the master so rounded, `low` the parameter, both as numbers of T.
template <typename T>
METAADAMW_INLINE T start_of_update(T master, T rounded, T low) {
  return (rounded == low) | ((rounded != rounded) & (low != low)) ? master : low;
}

// beta1*m + (1-beta1)*g as an interpolation from the heavier end: rounding beta1 itself to float32 would bias the momentum
// by 2.4e-7, and from the heavier end beta1 = 0 gives exactly g. The weight is that of the other end.
template <typename T, typename V>
METAADAMW_INLINE V lerp_momentum(bool from_grad, T weight, V g, V m) {
  const V from = from_grad ? g : m;
  const V to = from_grad ? m : g;
  return from + weight * (to - from);
}

// What `measure` knows of a tensor besides its elements, for rules that need nothing.
template <typename T>
struct NothingMeasured {};

template <typename V>
METAADAMW_INLINE V square_root(V x) {
  if constexpr (std::is_floating_point_v<V>) {
    return std::sqrt(x);
  } else {
    for (unsigned lane = 0; lane < sizeof(V) / sizeof(x[0]); ++lane) {
      x[lane] = std::sqrt(x[lane]);  // the compiler makes it one instruction
    }
    return x;
  }
}

struct AdamW {
  // In the order of tables and of the dice of stochastic rounding. Of all operands a row may lack the last alone.
  enum Operand { kMomentum = kGrad + 1, kParam, kSecondMoment, kMaximum, kOperands };
  static constexpr const char* kLists[] = {"grads", "exp_avgs", "params", "exp_avg_sqs", "max_exp_avg_sqs"};
  static constexpr bool kLastIsOptional = true;
  static constexpr int kOptionalLists = 1 << kMaximum;  // bit i: an update can do without the list of operand i
  static constexpr int kWritten = 1 << kMomentum | 1 << kParam | 1 << kSecondMoment | 1 << kMaximum;
  // Of these sets of operands, on the CPU, the first that a row has none of gets a loop without them. The last is empty.
  static constexpr int kWithout[] = {1 << kMaximum, 0};
  // Bit i: operand i. A running maximum would be the maximum of the roundings, and grow.
  static constexpr int kRoundedStochastically = 1 << kMomentum | 1 << kParam | 1 << kSecondMoment;

  // Bias corrections take powers, a root and quotients in float64, which cost more than the arithmetic of a hundred elements; so
  // they are made once per tensor, not by each block or thread.
  enum Vector {
    kStepSize,     // lr * lr_scale / (1 - beta1^k)
    kDecayFactor,  // d: what the parameter is multiplied with
    kStep,         // k >= 1, this step included; 0: the tensor is left alone
    kBeta1,
    kBeta2,
    kInverseSqrtCorrection2,  // 1 / sqrt(1 - beta2^k)
    kEps,
    kGradScale,  // the gradient is multiplied with it: clipping, unscaling, or -1 to maximize
    kVectors
  };
  static constexpr int kMeasureVectors = 0;  // rows of the vectors that `measure` needs for sums from kFirstExtra on

  // The two operands that change roles from update to update where `exchanged` says so; none if they are equal.
  static constexpr int kExchanged[2] = {kGrad, kGrad};
  static METAADAMW_INLINE bool exchanged(const Update&, int64_t, int) { return false; }

  // The vectors of one tensor, rounded once to the type of the arithmetic. Everything that does not change inside a tensor is here,
  // so that the loop over elements has one division and one square root.
  template <typename T>
  struct Scalars {
    T grad_scale;
    T momentum_weight;
    T beta2;
    T beta2_complement;
    T step_size;
    T decay_factor;
    T inverse_sqrt_bias_correction2;
    T eps;
    bool lerp_from_grad;
  };

  static METAADAMW_INLINE void write_vectors(double* vectors, int64_t tensors, int64_t t, const Hyperparameters& h,
                                             const BiasCorrections& corrections) {
    double* const of_tensor = vectors + t;
    of_tensor[kStepSize * tensors] = h.step_size / corrections.first;
    of_tensor[kDecayFactor * tensors] = h.decay_factor;
    of_tensor[kStep * tensors] = h.step;
    of_tensor[kBeta1 * tensors] = h.beta1;
    of_tensor[kBeta2 * tensors] = h.beta2;
    of_tensor[kInverseSqrtCorrection2 * tensors] = corrections.inverse_sqrt_second;
    of_tensor[kEps * tensors] = h.eps;
    of_tensor[kGradScale * tensors] = h.grad_scale;
  }

  template <typename T>
  static METAADAMW_INLINE Scalars<T> scalars(const Update& update, int64_t t) {
    Scalars<T> s;
    s.grad_scale = static_cast<T>(update.at(kGradScale, t));
    const double beta1 = update.at(kBeta1, t), beta2 = update.at(kBeta2, t);
    s.lerp_from_grad = beta1 < 0.5;
    s.momentum_weight = static_cast<T>(s.lerp_from_grad ? beta1 : 1.0 - beta1);
    s.beta2 = static_cast<T>(beta2);
    s.beta2_complement = static_cast<T>(1.0 - beta2);  // in float64: 1 - float32(0.999) is off by 1e-5
    s.step_size = static_cast<T>(update.at(kStepSize, t));
    s.decay_factor = static_cast<T>(update.at(kDecayFactor, t));
    s.inverse_sqrt_bias_correction2 = static_cast<T>(update.at(kInverseSqrtCorrection2, t));
    s.eps = static_cast<T>(update.at(kEps, t));
    return s;
  }

  // m <- beta1*m + (1-beta1)*g;  v <- beta2*v + (1-beta2)*g^2. V is T, or on the CPU a vector of it.
  template <typename T, typename V>
  static METAADAMW_INLINE void moments(const Scalars<T>& s, V grad, V& exp_avg, V& exp_avg_sq) {
    const V g = grad * s.grad_scale;
    exp_avg = lerp_momentum(s.lerp_from_grad, s.momentum_weight, g, exp_avg);
    exp_avg_sq = s.beta2 * exp_avg_sq + s.beta2_complement * g * g;
  }

  // p <- d*p - step_size*m_hat / (sqrt(v_hat) + eps)
  template <typename T, typename V>
  static METAADAMW_INLINE V moved(const Scalars<T>& s, V param, V exp_avg, V v) {
    const V denominator = square_root(v) * s.inverse_sqrt_bias_correction2 + s.eps;
    return s.decay_factor * param - s.step_size * exp_avg / denominator;
  }

  // With amsgrad, where the row has its last operand, the running maximum of v replaces v in v_hat.
  template <bool amsgrad, typename T, typename V>
  static METAADAMW_INLINE void update(const Scalars<T>& s, V (&x)[kOperands]) {
    moments(s, x[kGrad], x[kMomentum], x[kSecondMoment]);
    V v = x[kSecondMoment];
    if constexpr (amsgrad) {
      v = x[kMaximum] = nan_maximum(x[kMaximum], v);
    }
    x[kParam] = moved(s, x[kParam], x[kMomentum], v);
  }

  // The sums that describe one tensor, in the order of the columns of `optimizer.statistics`. An update can make the first ones of
  // what it finds, as many as kFoundWidths has, or [kFirstLeft, kEndLeft) of what it leaves: these are carried over to the next
  // statistics, which then do not read p and v.
  enum Sum {
    kGradSquared,
    kGradMomentum,
    kMomentumSquared,
    kParamSquared,
    kSecondMomentSquared,
    kGradNonzero,
    kMomentumNonzero,
    kSums
  };
  static constexpr int kFirstLeft = kParamSquared, kEndLeft = kGradNonzero;
  static constexpr int kFoundSums = kGradNonzero;  // the most
  static constexpr int kFoundWidths[] = {kFoundSums};
  static constexpr int kFirstExtra = kGradNonzero;  // those from here on cost more, so they have loops of their own
  static constexpr bool kAllNeedGradient = false;   // whether all sums are 0 in a row without a gradient
  // The operands that a sum reads; bit i: operand i.
  static METAADAMW_INLINE constexpr int reads(int sum) {
    return sum == kGradSquared || sum == kGradNonzero           ? 1 << kGrad
           : sum == kGradMomentum                               ? 1 << kGrad | 1 << kMomentum
           : sum == kMomentumSquared || sum == kMomentumNonzero ? 1 << kMomentum
           : sum == kParamSquared                               ? 1 << kParam
                                                                : 1 << kSecondMoment;
  }

  template <typename T>
  using Measured = NothingMeasured<T>;
  template <typename T>
  static METAADAMW_INLINE Measured<T> measured(const Update&, int, int64_t) {
    return {};
  }

  // N sums and M operands: a rule that has more of both takes these for its first ones.
  template <typename T, typename V, int N, int M>
  static METAADAMW_INLINE void accumulate_found(const NothingMeasured<T>&, V (&sums)[N], const V (&x)[M]) {
    sums[kGradSquared] += x[kGrad] * x[kGrad];
    sums[kGradMomentum] += x[kGrad] * x[kMomentum];
    sums[kMomentumSquared] += x[kMomentum] * x[kMomentum];
    accumulate_left(sums, x);
  }

  template <typename V, int N, int M>
  static METAADAMW_INLINE void accumulate_left(V (&sums)[N], const V (&x)[M]) {
    sums[kParamSquared] += x[kParam] * x[kParam];
    sums[kSecondMomentSquared] += x[kSecondMoment] * x[kSecondMoment];
  }

  // The sums [kFirstExtra, end): only the `enhanced` features want them.
  template <int end, typename T, typename V, int N, int M>
  static METAADAMW_INLINE void accumulate_extra(const NothingMeasured<T>&, V (&sums)[N], const V (&x)[M]) {
    sums[kGradNonzero] += one_where_nonzero(x[kGrad]);
    sums[kMomentumNonzero] += one_where_nonzero(x[kMomentum]);
  }
};

}  // namespace metaadamw
