// MADA's rule (docs/mada.md): one update with six coefficients between Adam, AVGrad, Adan, Yogi and Lion, and the sums by which
// they are learned. Compiled by the host compiler and by nvcc, with the same bits, as adamw.h.
#pragma once

#include "adamw.h"

namespace metaadamw {

struct Mada {
  // Lists from kAverage on may be missing as a whole: such an operand counts as zeros and is not stored. The average, or where
  // kSignInSecondMoment the second moment, carries a bit in its sign; the operand itself is the magnitude. Gradients are kept as
  // autograd left them. With both of the last two, kLast is the last gradient and kOther the one before it, in whose place the
  // update puts its own; with kOther alone that is the last one.
  enum Operand { kMomentum = kGrad + 1, kParam, kSecondMoment, kAverage, kDifference, kLion, kLast, kOther, kOperands };
  static constexpr const char* kLists[] = {"grads",         "exp_avgs",      "params",     "exp_avg_sqs",   "average_sqs",
                                           "exp_avg_diffs", "lion_exp_avgs", "last_grads", "previous_grads"};
  static constexpr bool kLastIsOptional = false;
  static constexpr int kOptionalLists = 1 << kAverage | 1 << kDifference | 1 << kLion | 1 << kLast | 1 << kOther;
  static constexpr int kWithout[] = {0};
  static constexpr int kWritten = ((1 << kOperands) - 1) & ~(1 << kGrad | 1 << kLast);
  static constexpr int kRoundedStochastically = 1 << kMomentum | 1 << kParam | 1 << kSecondMoment | 1 << kDifference | 1 << kLion;

  // The numbers of one update, docs/mada.md section 3 and 4. The vectors of an update are two halves like this: its own, then that
  // of the update before, which only its sums read. Those of `measure` are one half, of the update before.
  enum Vector {
    kStepSize,
    kDecayFactor,
    kStep,  // k >= 1, this step included; 0: the tensor is left alone
    kBeta1,
    kBeta2,
    kBeta3,
    kRho,
    kC,
    kGamma,
    kEps,
    kGradScale,
    kLastScale,    // what the update before multiplied its gradient, the last one, with
    kCorrection1,  // 1 - beta1^k
    kCorrection2,
    kSlope1,  // k*beta1^(k-1) / (1 - beta1^k)^2
    kSlope2,
    kLion1,
    kLion2,
    kTurn,       // updates since the table was made: kLast and kOther change roles with each
    kFlags,      // a sum of those below
    kUnclipped,  // as kGradScale, but for clipping; elements do not need it
    kHalf,
    kVectors = 2 * kHalf
  };
  static constexpr int kMeasureVectors = kHalf;

  enum Flag {
    kKeeps = 1,                // differences are from the last gradient; else from 0
    kFirst = 2,                // no last gradient is known: the difference is 0 (where kKeeps)
    kLooksBack = 4,            // Lion's direction is made of its momentum before this step; else after
    kMaximum = 8,              // the average is a maximum
    kSignInSecondMoment = 16,  // where the bit is
    kSecondMomentStarts = 32,  // the second moment before this step counts as 1e-15
    kDifferenceStarts = 64,    // that of the differences as g^2
    kTwo = 128,                // there is kLast
    kStartsAtRest = 256        // for mada_policy.h alone: kFirst is to be set where a tensor has no last update
  };

  // Where the row has both, they change roles as `exchanged` says. They have the same dtype and strides. An update reads the second
  // for found sums alone.
  static constexpr int kExchanged[2] = {kLast, kOther};

  // `ahead` is 0 in an update and 1 in `measure`, which is told of the update before.
  static METAADAMW_INLINE bool exchanged(const Update& update, int64_t t, int ahead) {
    return (static_cast<int64_t>(update.at(kTurn, t)) + ahead) & 1;
  }

  template <typename T>
  struct Scalars {
    T grad_scale, last_scale;
    T momentum_weight;
    T beta2, beta2_complement, beta3, beta3_complement, rho, rho_complement, c, c_complement, gamma, gamma_complement;
    T lion1, lion1_complement, lion2, lion2_complement;
    T inverse_correction1, inverse_sqrt_correction2;
    T step, step_size, decay_factor, eps;
    bool lerp_from_grad;
    int flags;

    METAADAMW_INLINE bool has(Flag flag) const { return flags & flag; }
  };

  // The operands (bit i: operand i) that an update itself does not read, beside those that it only writes; its found sums may.
  template <typename T>
  static METAADAMW_INLINE int unread(const Scalars<T>& s) {
    const int last = s.has(kTwo) ? kLast : kOther;
    return (s.has(kTwo) ? 1 << kOther : 0) | (s.has(kKeeps) && !s.has(kFirst) ? 0 : 1 << last);
  }

  template <typename T>
  static METAADAMW_INLINE Scalars<T> scalars(const Update& update, int64_t t) {
    const auto at = [&](int vector) { return update.at(vector, t); };
    const auto number = [&](int vector) { return static_cast<T>(at(vector)); };
    const auto complement = [&](int vector) { return static_cast<T>(1.0 - at(vector)); };
    Scalars<T> s;
    s.grad_scale = number(kGradScale);
    s.last_scale = number(kLastScale);
    s.lerp_from_grad = at(kBeta1) < 0.5;
    s.momentum_weight = s.lerp_from_grad ? number(kBeta1) : complement(kBeta1);
    s.beta2 = number(kBeta2);
    s.beta2_complement = complement(kBeta2);
    s.beta3 = number(kBeta3);
    s.beta3_complement = complement(kBeta3);
    s.rho = number(kRho);
    s.rho_complement = complement(kRho);
    s.c = number(kC);
    s.c_complement = complement(kC);
    s.gamma = number(kGamma);
    s.gamma_complement = complement(kGamma);
    s.lion1 = number(kLion1);
    s.lion1_complement = complement(kLion1);
    s.lion2 = number(kLion2);
    s.lion2_complement = complement(kLion2);
    s.inverse_correction1 = static_cast<T>(1.0 / at(kCorrection1));
    s.inverse_sqrt_correction2 = static_cast<T>(1.0 / std::sqrt(at(kCorrection2)));
    s.step = number(kStep);
    s.step_size = number(kStepSize);
    s.decay_factor = number(kDecayFactor);
    s.eps = number(kEps);
    s.flags = static_cast<int>(at(kFlags));
    return s;
  }

  // Section 3. V is T, or on the CPU a vector of it.
  template <bool, typename T, typename V>
  static METAADAMW_INLINE void update(const Scalars<T>& s, V (&x)[kOperands]) {
    const V zero = V{};
    const V g = x[kGrad] * s.grad_scale;
    const V last = s.has(kTwo) ? x[kLast] : x[kOther];
    const V d = !s.has(kKeeps) ? g : s.has(kFirst) ? zero : g - last * s.last_scale;
    const V ahead = g + s.beta3 * d;
    const V ahead_squared = ahead * ahead;

    const V v_before = s.has(kSecondMomentStarts) ? zero + static_cast<T>(1e-15) : magnitude(x[kSecondMoment]);
    const V sigma = sign_of_difference(ahead_squared, v_before);
    const V kappa = s.c + s.c_complement * sigma;
    // 0 times an infinite second moment would be NaN, and with it the parameter.
    const V kept = s.c_complement == T(0) ? zero : s.c_complement * v_before;
    const V v = s.beta2 * v_before + s.beta2_complement * (kappa * ahead_squared + kept);

    x[kMomentum] = lerp_momentum(s.lerp_from_grad, s.momentum_weight, g, x[kMomentum]);
    const V n_before = s.has(kDifferenceStarts) ? g * g : x[kDifference];
    x[kDifference] = s.beta3 * n_before + s.beta3_complement * d;

    const V average_before = magnitude(x[kAverage]);
    const V average = s.has(kMaximum) ? nan_maximum(average_before, v) : average_before + (v - average_before) / s.step;

    const V lion_before = x[kLion];
    x[kLion] = s.lion2 * lion_before + s.lion2_complement * g;
    const V u = s.lion1 * (s.has(kLooksBack) ? lion_before : x[kLion]) + s.lion1_complement * g;

    const V mixed = s.rho_complement == T(0) ? v : s.rho * v + s.rho_complement * average;
    const V root = square_root(mixed) * s.inverse_sqrt_correction2;
    const V adaptive = (x[kMomentum] * s.inverse_correction1 + s.beta3 * x[kDifference]) / (root + s.eps);
    const V direction = (s.gamma == T(0) ? zero : s.gamma * adaptive) + s.gamma_complement * sign_of(u);
    x[kParam] = s.decay_factor * x[kParam] - s.step_size * direction;

    const bool bit_in_v = s.has(kSignInSecondMoment);
    x[kSecondMoment] = bit_in_v ? negated_where_negative(sigma, v) : v;
    x[kAverage] = bit_in_v ? average : negated_where_negative(sigma, average);
    x[kOther] = x[kGrad];
  }

  // Σg², then Σg·D of beta1, beta2, beta3, rho, c and gamma: g the gradient as autograd left it, D the derivative of the direction
  // that the update before took, from the state that it left.
  enum Sum { kGradSquared, kBeta1Slope, kBeta2Slope, kBeta3Slope, kRhoSlope, kCSlope, kGammaSlope, kSums };
  static constexpr int kFirstLeft = 0, kEndLeft = 0;
  static constexpr int kFoundSums = kSums;
  static constexpr int kFoundWidths[] = {kSums};
  static constexpr int kFirstExtra = kBeta1Slope;
  static constexpr bool kAllNeedGradient = true;
  static METAADAMW_INLINE constexpr int reads(int sum) {
    return sum == kGradSquared ? 1 << kGrad : ((1 << kOperands) - 1) & ~(1 << kParam);
  }

  template <typename T>
  struct Measured {
    T grad_scale, last_scale;
    T beta2_complement, beta3, c, c_complement, rho, rho_complement, gamma;
    T lion1, lion1_complement, lion2_complement, inverse_lion2;
    T inverse_correction1, inverse_correction2, inverse_sqrt_correction2;
    T inverse_a;       // 1 / (1 - (1-beta2)*c)
    T inverse_b1k1;    // 1 / (beta1*(1 - beta1^k))
    T slope1, slope2;  // as the vectors
    T rho_b_k2;        // rho*(1-beta2) / (1 - beta2^k)
    T eps;
    int flags;

    METAADAMW_INLINE bool has(Flag flag) const { return flags & flag; }
  };

  // Of the update before: half 0 of the vectors that `measure` gets, half 1 of those that an update gets.
  template <typename T>
  static METAADAMW_INLINE Measured<T> measured(const Update& update, int half, int64_t t) {
    const auto at = [&](int vector) { return update.at(half * kHalf + vector, t); };
    const auto number = [&](int vector) { return static_cast<T>(at(vector)); };
    const auto complement = [&](int vector) { return static_cast<T>(1.0 - at(vector)); };
    const double beta2_complement = 1.0 - at(kBeta2);
    Measured<T> s;
    s.grad_scale = number(kGradScale);
    s.last_scale = number(kLastScale);
    s.beta2_complement = static_cast<T>(beta2_complement);
    s.beta3 = number(kBeta3);
    s.c = number(kC);
    s.c_complement = complement(kC);
    s.rho = number(kRho);
    s.rho_complement = complement(kRho);
    s.gamma = number(kGamma);
    s.lion1 = number(kLion1);
    s.lion1_complement = complement(kLion1);
    s.lion2_complement = complement(kLion2);
    s.inverse_lion2 = static_cast<T>(1.0 / at(kLion2));
    s.inverse_correction1 = static_cast<T>(1.0 / at(kCorrection1));
    s.inverse_correction2 = static_cast<T>(1.0 / at(kCorrection2));
    s.inverse_sqrt_correction2 = static_cast<T>(1.0 / std::sqrt(at(kCorrection2)));
    s.inverse_a = static_cast<T>(1.0 / (1.0 - beta2_complement * at(kC)));
    s.inverse_b1k1 = static_cast<T>(1.0 / (at(kBeta1) * at(kCorrection1)));
    s.slope1 = number(kSlope1);
    s.slope2 = number(kSlope2);
    s.rho_b_k2 = static_cast<T>(at(kRho) * beta2_complement / at(kCorrection2));
    s.eps = number(kEps);
    s.flags = static_cast<int>(at(kFlags));
    return s;
  }

  template <typename T, typename V>
  static METAADAMW_INLINE void accumulate_found(const Measured<T>&, V (&sums)[kSums], const V (&x)[kOperands]) {
    sums[kGradSquared] += x[kGrad] * x[kGrad];
  }
  template <typename V>
  static METAADAMW_INLINE void accumulate_left(V (&)[kSums], const V (&)[kOperands]) {}

  // Section 4.
  template <int, typename T, typename V>
  static METAADAMW_INLINE void accumulate_extra(const Measured<T>& s, V (&sums)[kSums], const V (&x)[kOperands]) {
    const V zero = V{}, one = zero + 1;
    const bool two = s.has(kTwo);
    const V g = (two ? x[kLast] : x[kOther]) * s.grad_scale;
    // Where differences count, both gradients are kept.
    const V d = !s.has(kKeeps) ? g : s.has(kFirst) || !two ? zero : g - x[kOther] * s.last_scale;
    const V m = x[kMomentum], n = x[kDifference];
    const V v = magnitude(x[kSecondMoment]), average = magnitude(x[kAverage]);
    const V sigma = negated_where_negative(sign_of(s.has(kSignInSecondMoment) ? x[kSecondMoment] : x[kAverage]), one);
    const V ahead = g + s.beta3 * d;
    const V ahead_squared = ahead * ahead;
    const V kappa = s.c + s.c_complement * sigma;
    const V v_before = (v - s.beta2_complement * (kappa * ahead_squared)) * s.inverse_a;

    const V mixed = s.rho_complement == T(0) ? v : s.rho * v + s.rho_complement * average;
    const V root = square_root(mixed) * s.inverse_sqrt_correction2;
    const V denominator = root + s.eps;
    const V adaptive = (m * s.inverse_correction1 + s.beta3 * n) / denominator;
    const V p = s.gamma / denominator;
    // This order neither over- nor underflows.
    const V q = where_positive(sign_of(root), -(p * adaptive) / (2 * root));
    const V along_v = q * s.rho_b_k2;

    const V lion = s.has(kLooksBack) ? (x[kLion] - s.lion2_complement * g) * s.inverse_lion2 : x[kLion];
    const V u = s.lion1 * lion + s.lion1_complement * g;

    const V grad = x[kGrad];
    sums[kBeta1Slope] += grad * (p * ((m - g) * s.inverse_b1k1 + m * s.slope1));
    sums[kBeta2Slope] +=
        grad * (q * ((s.rho * (s.c * v_before - kappa * ahead_squared)) * s.inverse_correction2 + mixed * s.slope2));
    sums[kBeta3Slope] += grad * (p * (2 * n - d) + (along_v * kappa) * (2 * ahead * d));
    sums[kRhoSlope] += grad * ((q * (v - average)) * s.inverse_correction2);
    sums[kCSlope] += grad * (along_v * (ahead_squared * (one - sigma) - v_before));
    sums[kGammaSlope] += grad * (adaptive - sign_of(u));
  }
};

}  // namespace metaadamw
