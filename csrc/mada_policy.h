// MADA's policy (docs/mada.md section 5): how a set of coefficients learns from the sums of its tensors, and what the next update
// takes of each of them. No torch types: compiled by the host compiler and by nvcc.
#pragma once

#include "mada.h"

namespace metaadamw {

constexpr int kCoefficients = 6;  // beta1, beta2, beta3, rho, c, gamma; the sums from Mada::kBeta1Slope on are in this order

// The arguments of mada_policy_ on the host or on a device; float64 if nothing else is said.
struct MadaPolicy {
  int64_t tensors;
  bool learns;             // there are sums. They have no address if there are no tensors
  const double* sums;      // [T, Mada::kSums]
  double* coefficients;    // [K, 6]
  double* momentum;        // [K, 6]
  double* hyper_gradient;  // [K, 6]
  double* hyper_sums;      // [T, 6]
  double* last;            // [2, Mada::kHalf, T]: the last update and the one before it
  const int64_t* set_of;   // [T]
  const double* lr;        // [T], as all until `counts`
  const double* weight_decay;
  const double* eps;
  const double* grad_scale;  // null for 1
  const double* unclipped;   // null for 1
  const double* counts;      // [T + 1], steps so far: of each tensor, then of the optimizer
  const double* present;     // [T], null: every tensor has a gradient
  const double* turns;       // [T]
  const bool* go;            // null: this step counts
  const double* constants;   // [4, 6]: rates, momenta, lower and upper bounds
  double hyper_clip;         // 0: none
  double freeze_steps;
  double lion1;
  double lion2;
  int flags;
  bool lagged;      // the sums are those that the last step took, of what the update before it had left
  bool advance;     // an update follows
  double* vectors;  // [2, Mada::kHalf, T]: of this update, and of the last one

  METAADAMW_INLINE bool counted() const { return go == nullptr || *go; }
  METAADAMW_INLINE double& of_last(int half, int vector, int64_t t) const {
    return last[(half * Mada::kHalf + vector) * tensors + t];
  }

  // What tensor t adds to h, the hyper-gradients of its set: -lr times its sums.
  METAADAMW_INLINE void add_hyper_gradients(int64_t t, double (&h)[kCoefficients]) const {
    const double lr_then = of_last(lagged, Mada::kStepSize, t);
    const bool teaches = of_last(lagged, Mada::kStep, t) != 0.0 && lr_then != 0.0;
    const double factor = lagged ? of_last(0, Mada::kUnclipped, t) : unclipped != nullptr ? unclipped[t] : 1.0;
    for (int i = 0; i < kCoefficients; ++i) {
      const double sum = teaches ? sums[t * Mada::kSums + Mada::kBeta1Slope + i] * factor : 0.0;
      hyper_sums[t * kCoefficients + i] = sum;
      h[i] -= teaches ? lr_then * sum : 0.0;
    }
  }

  // One projected step of SGD on coefficient i. What is not finite teaches nothing.
  METAADAMW_INLINE void descend(int i, double h, double& buffer, double& coefficient) const {
    h = h - h == 0.0 ? h : 0.0;
    if (hyper_clip > 0.0) {
      const double clip = hyper_clip / (std::fabs(h) + 1e-6);
      h *= clip < 1.0 ? clip : 1.0;
    }
    buffer = constants[kCoefficients + i] * buffer + h;
    const double moved = coefficient - constants[i] * buffer;
    const double lower = constants[2 * kCoefficients + i], upper = constants[3 * kCoefficients + i];
    const double raised = moved < lower ? lower : moved;
    coefficient = raised > upper ? upper : raised;
  }

  // What the update takes of tensor t, and what is kept of it for the next.
  METAADAMW_INLINE void advance_tensor(int64_t t, const double (&theta)[kCoefficients]) const {
    const double step = counts[t] + 1.0;
    const double k1 = 1.0 - integer_power(theta[0], step), k2 = 1.0 - integer_power(theta[1], step);
    const bool starts = of_last(0, Mada::kStep, t) == 0.0;
    int set = flags & ~(Mada::kFirst | Mada::kStartsAtRest);
    set &= starts && step == 1.0 ? ~0 : ~(Mada::kSecondMomentStarts | Mada::kDifferenceStarts);
    set |= starts && flags & Mada::kStartsAtRest ? Mada::kFirst : 0;
    double half[Mada::kHalf];
    half[Mada::kStepSize] = lr[t];
    half[Mada::kDecayFactor] = 1.0 - lr[t] * weight_decay[t];
    half[Mada::kStep] = step;
    for (int i = 0; i < kCoefficients; ++i) {
      half[Mada::kBeta1 + i] = theta[i];
    }
    half[Mada::kEps] = eps[t];
    half[Mada::kGradScale] = grad_scale != nullptr ? grad_scale[t] : 1.0;
    half[Mada::kLastScale] = of_last(0, Mada::kGradScale, t);
    half[Mada::kCorrection1] = k1;
    half[Mada::kCorrection2] = k2;
    half[Mada::kSlope1] = step * integer_power(theta[0], step - 1.0) / (k1 * k1);
    half[Mada::kSlope2] = step * integer_power(theta[1], step - 1.0) / (k2 * k2);
    half[Mada::kLion1] = lion1;
    half[Mada::kLion2] = lion2;
    half[Mada::kTurn] = turns[t];
    half[Mada::kFlags] = set;
    half[Mada::kUnclipped] = unclipped != nullptr ? unclipped[t] : 1.0;
    const bool moves = counted(), here = present == nullptr || present[t] != 0.0;
    for (int v = 0; v < Mada::kHalf; ++v) {
      double& kept = of_last(0, v, t);
      vectors[v * tensors + t] = v == Mada::kStep && !moves ? 0.0 : half[v];
      vectors[(Mada::kHalf + v) * tensors + t] = kept;
      if (moves) {
        of_last(1, v, t) = kept;
        // A tensor that the update passes over has its last one still, but learns nothing more from it.
        kept = here || v == Mada::kUnclipped ? half[v] : v == Mada::kStepSize ? 0.0 : kept;
      }
    }
  }
};
static_assert(Mada::kGamma - Mada::kBeta1 == kCoefficients - 1 && Mada::kGammaSlope - Mada::kBeta1Slope == kCoefficients - 1);

// Set k of the coefficients and its tensors. `lanes` threads share the work, a tensor belongs to one of them; total(x) puts the
// sums of their x into all of them, and the first one writes what is of the set.
template <typename Total>
METAADAMW_INLINE void mada_policy_of_set(const MadaPolicy& p, int64_t k, int lane, int lanes, const Total& total) {
  double theta[kCoefficients], buffer[kCoefficients];
  for (int i = 0; i < kCoefficients; ++i) {
    theta[i] = p.coefficients[k * kCoefficients + i];
    buffer[i] = p.momentum[k * kCoefficients + i];
  }
  if (p.learns && p.counted()) {
    double h[kCoefficients] = {};
    for (int64_t t = lane; t < p.tensors; t += lanes) {
      if (p.set_of[t] == k) p.add_hyper_gradients(t, h);
    }
    total(h);  // behind its barrier every thread has read the coefficients
    const bool thawed = p.counts[p.tensors] - (p.lagged ? 1.0 : 0.0) > p.freeze_steps;
    for (int i = 0; i < kCoefficients; ++i) {
      const int64_t at = k * kCoefficients + i;
      if (thawed) p.descend(i, h[i], buffer[i], theta[i]);
      if (lane == 0) {
        p.hyper_gradient[at] = h[i];
        p.momentum[at] = buffer[i];
        p.coefficients[at] = theta[i];
      }
    }
  }
  for (int64_t t = lane; t < p.tensors && p.advance; t += lanes) {
    if (p.set_of[t] == k) p.advance_tensor(t, theta);
  }
}

}  // namespace metaadamw
