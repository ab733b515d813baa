// The modulated AdamW update of one element, and the per-tensor numbers it needs.
//
// This is the only place in C++ and CUDA where the formula stands. It knows no torch types, so the same lines are compiled by
// the host compiler and by nvcc; with contraction of a*b+c off (-ffp-contract=off, -fmad=false) and IEEE division and square
// root, both give the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define METAADAMW_INLINE __host__ __device__ __forceinline__
#else
// Forced, so that each instruction-set clone of a loop (cpu.cpp) compiles its own copy of what is inside it.
#define METAADAMW_INLINE inline __attribute__((always_inline))
#endif

namespace metaadamw {

// The numbers of an update: float64 [kVectors, T], a row each. Bias corrections take powers, a root and quotients in float64, which
// cost more than the arithmetic of a hundred elements; so they are made once per tensor, not by each block or thread.
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

// The vectors of one update, and how it rounds what it stores (rounding.h).
struct Update {
  const double* vectors;
  int64_t tensors;
  bool stochastic;
  int64_t rounding_seed;

  METAADAMW_INLINE double at(Vector vector, int64_t t) const { return vectors[vector * tensors + t]; }
  // Whether tensor t is to be left alone. Its step count says so, because a device then decides what the host does not wait to
  // know.
  METAADAMW_INLINE bool skips(int64_t t) const { return at(kStep, t) == 0.0; }
};

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

METAADAMW_INLINE void write_vectors(double* vectors, int64_t tensors, int64_t t, const Hyperparameters& h,
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
METAADAMW_INLINE Scalars<T> scalars_of(const Update& update, int64_t t) {
  Scalars<T> s;
  s.grad_scale = static_cast<T>(update.at(kGradScale, t));
  // beta1*m + (1-beta1)*g as an interpolation from the heavier end: rounding beta1 itself to float32 would bias the momentum
  // by 2.4e-7, and from the heavier end beta1 = 0 gives exactly g.
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

// The larger of two, and NaN if either is, as torch.maximum.
template <typename V>
METAADAMW_INLINE V nan_maximum(V a, V b) {
  return (a >= b) | (a != a) ? a : b;
}

// A parameter of bfloat16 or float16 that has a float32 master is the master's rounding to nearest, unless somebody wrote it since:
// then what was written is what the update starts from. Versions do not tell, since `p.data` has a counter of its own: the numbers
// are compared. `rounded` is the master so rounded, `low` the parameter, both as numbers of T.
template <typename T>
METAADAMW_INLINE T start_of_update(T master, T rounded, T low) {
  return (rounded == low) | ((rounded != rounded) & (low != low)) ? master : low;
}

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

// m <- beta1*m + (1-beta1)*g;  v <- beta2*v + (1-beta2)*g^2;  p <- d*p - step_size*m_hat / (sqrt(v_hat) + eps)
// With amsgrad the running maximum of v replaces v in v_hat. V is T, or on the CPU a vector of it.
template <bool amsgrad, typename T, typename V>
METAADAMW_INLINE void adamw_element(const Scalars<T>& s, V grad, V& param, V& exp_avg, V& exp_avg_sq, V& max_exp_avg_sq) {
  const V g = grad * s.grad_scale;
  const V from = s.lerp_from_grad ? g : exp_avg;
  const V to = s.lerp_from_grad ? exp_avg : g;
  exp_avg = from + s.momentum_weight * (to - from);
  exp_avg_sq = s.beta2 * exp_avg_sq + s.beta2_complement * g * g;
  V v = exp_avg_sq;
  if constexpr (amsgrad) {
    v = max_exp_avg_sq = nan_maximum(max_exp_avg_sq, v);
  }
  const V denominator = square_root(v) * s.inverse_sqrt_bias_correction2 + s.eps;
  param = s.decay_factor * param - s.step_size * exp_avg / denominator;
}

}  // namespace metaadamw
