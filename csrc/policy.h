// What stands on both sides of the encoder: the features of groups from the statistics of tensors, and what the update takes of
// each tensor from the scales of groups. metaadamw_fast/features.py and reference.py say the same in PyTorch; MetaAdamW section 3.2
// and algorithm 1. No torch types: compiled by the host compiler and by nvcc.
#pragma once

#include "adamw.h"

namespace metaadamw {

constexpr int kMaxValues = 5;
constexpr double kNormFloor = 1e-8;  // below it a norm counts as this in a cosine

// Which features a row has.
struct FeatureColumns {
  bool enhanced;
  bool v_norm;
  bool deviations;  // behind the means
  int time;         // the column of the training progress, -1 for none

  METAADAMW_INLINE int values() const { return enhanced ? 4 : 4 + v_norm; }
};

// The tensors of all groups, group after group.
struct GroupedTensors {
  const int64_t* tensor;  // [T] their rows in the statistics
  const int64_t* begin;   // [G + 1] where each group begins in `tensor`
};

// A NaN stays one.
template <typename T>
METAADAMW_INLINE T at_least(T x, T floor) {
  return x < floor ? floor : x;
}

// What is averaged over the tensors of a group.
template <typename T>
METAADAMW_INLINE void tensor_values(const FeatureColumns& columns, const T* sums, T numel, T (&x)[kMaxValues]) {
  x[0] = std::sqrt(sums[AdamW::kGradSquared]);
  x[1] = std::sqrt(sums[AdamW::kMomentumSquared]);
  if (columns.enhanced) {
    const T count = at_least(numel, T(1));  // an empty tensor has no zeros
    x[2] = (numel - sums[AdamW::kGradNonzero]) / count;
    x[3] = (numel - sums[AdamW::kMomentumNonzero]) / count;
  } else {
    const T floor = static_cast<T>(kNormFloor);
    x[2] = std::sqrt(sums[AdamW::kParamSquared]);
    x[3] = sums[AdamW::kGradMomentum] / (at_least(x[0], floor) * at_least(x[1], floor));
    x[4] = columns.v_norm ? std::sqrt(sums[AdamW::kSecondMomentSquared]) : T(0);
  }
}

// s/total_steps if that is known (not 0), else 2*sigmoid(s/1000) - 1; `step` is 1 in the first step.
METAADAMW_INLINE double training_progress(double step, double total_steps) {
  return total_steps > 0.0 ? step / total_steps : 2.0 / (1.0 + std::exp(-step / 1000.0)) - 1.0;
}

// Fills in a row of features that holds its constants. `lanes` threads share the work; total(x) puts the sums of their x into all
// of them, and the first one writes.
template <typename T, typename Total>
METAADAMW_INLINE void feature_row(const FeatureColumns& columns, const T* statistics, int64_t width, const GroupedTensors& grouped,
                                  const T* numel, int64_t group, double progress, int lane, int lanes, const Total& total, T* row) {
  const int64_t begin = grouped.begin[group], end = grouped.begin[group + 1];
  const double count = static_cast<double>(end - begin);
  double mean[kMaxValues] = {}, variance[kMaxValues] = {};
  for (int64_t i = begin + lane; i < end; i += lanes) {
    T x[kMaxValues] = {};
    tensor_values(columns, statistics + grouped.tensor[i] * width, numel[i], x);
    for (int k = 0; k < kMaxValues; ++k) {
      mean[k] += x[k];
    }
  }
  total(mean);
  for (int k = 0; k < kMaxValues; ++k) {
    mean[k] /= count;
  }
  if (columns.enhanced || columns.deviations) {
    for (int64_t i = begin + lane; i < end; i += lanes) {
      T x[kMaxValues] = {};
      tensor_values(columns, statistics + grouped.tensor[i] * width, numel[i], x);
      for (int k = 0; k < kMaxValues; ++k) {
        variance[k] += (x[k] - mean[k]) * (x[k] - mean[k]);
      }
    }
    total(variance);
    for (int k = 0; k < kMaxValues; ++k) {
      variance[k] /= count;
    }
  }
  if (lane != 0) {
    return;
  }
  if (columns.enhanced) {
    const double x[6] = {mean[0], variance[0], mean[1], variance[1], mean[2], mean[3]};
    for (int k = 0; k < 6; ++k) {
      row[k] = static_cast<T>(x[k]);
    }
  } else {
    const int values = columns.values();
    for (int k = 0; k < kMaxValues; ++k) {  // not up to `values`: an index that is known only at run time puts the sums into memory
      if (k < values) row[k] = static_cast<T>(mean[k]);
      if (k < values && columns.deviations) row[values + k] = static_cast<T>(std::sqrt(variance[k]));
    }
  }
  if (columns.time >= 0) {
    row[columns.time] = static_cast<T>(progress);
  }
}

// What all gradients are multiplied with by unscaling and clipping, and the norm of the unscaled ones before clipping. MetaAdamW
// has no formula of its own here: this is torch's clip_grad_norm_ of a gradient that need not be read, since |cg|^2 = c^2 |g|^2.
struct GradientFactor {
  double factor;
  double norm;
};

// `squared` is |g|^2 of the gradients as they are; max_norm 0 does not clip. It and the norm are rounded to T, as torch has them:
// where the sum of squares overflows, the norm is infinite and clipping multiplies with 0.
template <typename T>
METAADAMW_INLINE GradientFactor gradient_factor(double squared, double loss_scale, double max_norm) {
  const double unscale = 1.0 / loss_scale;
  const double root = std::sqrt(static_cast<double>(static_cast<T>(squared)));
  const double norm = static_cast<T>(static_cast<T>(root) * unscale);
  const double clip = max_norm / (norm + 1e-6);
  return {max_norm > 0.0 && !(clip > 1.0) ? unscale * clip : unscale, norm};  // a clip of NaN is one
}

// The statistics of one tensor's gradient that is multiplied with `factor`; the first column is Σg², of AdamW's the second Σg·m.
// Clipping multiplies with 0 where the sum of squares overflows: whether the gradient itself is finite then shows in Σg·m alone.
template <typename T>
METAADAMW_INLINE void scale_statistics(double factor, const T* from, int64_t width, T* to) {
  for (int64_t k = 0; k < width; ++k) {
    to[k] = from[k];
  }
  const bool has_product = width > AdamW::kGradMomentum;
  if (has_product) {
    to[AdamW::kGradMomentum] = static_cast<T>(from[AdamW::kGradMomentum] * factor);
  }
  to[AdamW::kGradSquared] =
      factor == 0.0 && has_product ? to[AdamW::kGradMomentum] : static_cast<T>(factor * factor * from[AdamW::kGradSquared]);
}

// What the update takes of one tensor, of its group's scales; float64.
struct Modulation {
  double step_size;
  double decay_factor;
};

// `released`: the authors' code divides the decay, too, by the bias correction.
METAADAMW_INLINE Modulation modulate(double lr, double weight_decay, double beta1, double lr_scale, double wd_scale, double step,
                                     bool released) {
  const double step_size = lr * lr_scale;
  double decay = step_size * wd_scale * weight_decay;
  if (released) {
    decay = decay / (1.0 - integer_power(beta1, step));
  }
  return {step_size, 1.0 - decay};
}

}  // namespace metaadamw
