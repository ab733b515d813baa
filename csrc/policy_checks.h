// The arguments of the ops around the encoder (policy.h) and of those that make an update's vectors, checked. Most come from the
// optimizer, so the messages are for its authors.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "checks.h"
#include "mada_policy.h"
#include "policy.h"

namespace metaadamw {

inline void check_vector(const Tensor& x, const char* name, ScalarType dtype, int64_t length, const Tensor& like) {
  METAADAMW_CHECK(x.scalar_type() == dtype && x.numel() == length && x.is_contiguous() && device_of(x) == device_of(like), name,
                  " must have ", length, " contiguous elements of dtype ", torch::headeronly::toString(dtype), " on ",
                  device_name(device_of(like)));
}

// Counts of steps on one device: float64, or float32 as torch's optimizers keep them.
struct StepCounts {
  const void* data;
  bool is_double;

  METAADAMW_INLINE double operator[](int64_t t) const {
    return is_double ? static_cast<const double*>(data)[t] : static_cast<const float*>(data)[t];
  }
};

inline StepCounts step_counts(const Tensor& x, const char* name, int64_t length, const Tensor& like) {
  const bool is_double = x.scalar_type() == ScalarType::Double;
  check_vector(x, name, is_double ? ScalarType::Double : ScalarType::Float, length, like);
  return {x.data_ptr(), is_double};
}

// Returns the optimizer's own count.
inline StepCounts check_features(const FeatureColumns& columns, const Tensor& statistics, const Tensor& order, const Tensor& begin,
                                 const Tensor& numel, const Tensor& constants, const Tensor& done) {
  const ScalarType dtype = statistics.scalar_type();
  METAADAMW_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float, "statistics are float32 or float64, not ",
                  torch::headeronly::toString(dtype));
  METAADAMW_CHECK(
      statistics.dim() == 2 && statistics.size(1) == (columns.enhanced ? AdamW::kSums : AdamW::kFoundSums) && constants.dim() == 2,
      "statistics must be [T, ", columns.enhanced ? AdamW::kSums : AdamW::kFoundSums, "] and constants [G, D]");
  const int64_t statistic_columns = columns.enhanced ? 9 : columns.values() * (1 + columns.deviations);
  METAADAMW_CHECK(constants.size(1) >= statistic_columns && columns.time < constants.size(1), "constants have ", constants.size(1),
                  " columns, too few for the features");
  check_vector(statistics, "statistics", dtype, statistics.numel(), statistics);
  check_vector(constants, "constants", dtype, constants.numel(), statistics);
  check_vector(numel, "numel", dtype, statistics.size(0), statistics);
  check_vector(order, "order", ScalarType::Long, statistics.size(0), statistics);
  check_vector(begin, "begin", ScalarType::Long, constants.size(0) + 1, statistics);
  return step_counts(done, "done", 1, statistics);
}

// The arguments and results of `scaled_gradients`, on the host or on a device.
template <typename T>
struct ScaledGradients {
  int64_t tensors;
  int64_t width;
  const T* statistics;      // [T, width]
  const double* sign;       // [T], null for 1
  const float* loss_scale;  // null for 1
  double max_norm;
  double* factors;  // [T]
  T* norm;
  T* scaled;  // [T, width]

  METAADAMW_INLINE GradientFactor factor(double squared) const {
    return gradient_factor<T>(squared, loss_scale == nullptr ? 1.0 : static_cast<double>(*loss_scale), max_norm);
  }
  METAADAMW_INLINE void write(int64_t t, double factor) const {
    factors[t] = sign == nullptr ? factor : sign[t] * factor;
    scale_statistics(factors[t], statistics + t * width, width, scaled + t * width);
  }
};

// Calls run(ScaledGradients<float or double>) with results like those that it returns: factors, norm, statistics.
template <typename Run>
std::tuple<Tensor, Tensor, Tensor> scaled_gradients(const Tensor& statistics, const std::optional<Tensor>& sign,
                                                    const std::optional<Tensor>& loss_scale, double max_norm, const Run& run) {
  const ScalarType dtype = statistics.scalar_type();
  METAADAMW_CHECK((dtype == ScalarType::Double || dtype == ScalarType::Float) && statistics.dim() == 2 && statistics.size(1) >= 1,
                  "statistics must be [T, S], float32 or float64");
  check_vector(statistics, "statistics", dtype, statistics.numel(), statistics);
  if (sign) check_vector(*sign, "sign", ScalarType::Double, statistics.size(0), statistics);
  if (loss_scale) check_vector(*loss_scale, "loss_scale", ScalarType::Float, 1, statistics);
  Tensor factors = torch::stable::new_empty(statistics, {statistics.size(0)}, ScalarType::Double);
  Tensor norm = torch::stable::new_empty(statistics, {});
  Tensor scaled = torch::stable::empty_like(statistics);
  const auto run_as = [&](auto zero) {
    using T = decltype(zero);
    run(ScaledGradients<T>{statistics.size(0), statistics.size(1), static_cast<const T*>(statistics.data_ptr()),
                           sign ? static_cast<const double*>(sign->data_ptr()) : nullptr,
                           loss_scale ? static_cast<const float*>(loss_scale->data_ptr()) : nullptr, max_norm,
                           static_cast<double*>(factors.data_ptr()), static_cast<T*>(norm.data_ptr()),
                           static_cast<T*>(scaled.data_ptr())});
  };
  dtype == ScalarType::Double ? run_as(0.0) : run_as(0.0f);
  return {factors, norm, scaled};
}

// [T] float64 vectors of hyper-parameters on one device, from which the vectors of an update are made.
struct HyperparameterInput {
  int64_t tensors;
  const double* step_size;
  const double* decay_factor;
  const double* step;
  const double* beta1;
  const double* beta2;
  const double* eps;
  const double* grad_scale;  // null for 1

  METAADAMW_INLINE Hyperparameters operator[](int64_t t) const {
    return {step_size[t], decay_factor[t], step[t], beta1[t], beta2[t], eps[t], grad_scale != nullptr ? grad_scale[t] : 1.0};
  }
};

inline const double* hyperparameter(const Tensor& x, const char* name, int64_t tensors, int64_t device) {
  METAADAMW_CHECK(
      x.scalar_type() == ScalarType::Double && x.dim() == 1 && x.size(0) == tensors && x.is_contiguous() && device_of(x) == device,
      name, " must be a contiguous float64 tensor of shape [", tensors, "] on the device of the tensors");
  return static_cast<const double*>(x.data_ptr());
}

inline HyperparameterInput hyperparameter_input(const Tensor& step_size, const Tensor& decay_factor, const Tensor& step,
                                                const Tensor& beta1, const Tensor& beta2, const Tensor& eps,
                                                const std::optional<Tensor>& grad_scale, int64_t tensors, int64_t device) {
  return {tensors,
          hyperparameter(step_size, "step_size", tensors, device),
          hyperparameter(decay_factor, "decay_factor", tensors, device),
          hyperparameter(step, "step", tensors, device),
          hyperparameter(beta1, "beta1", tensors, device),
          hyperparameter(beta2, "beta2", tensors, device),
          hyperparameter(eps, "eps", tensors, device),
          grad_scale ? hyperparameter(*grad_scale, "grad_scale", tensors, device) : nullptr};
}

// The arguments of `modulation`, on the host or on a device.
struct ModulationInput {
  int64_t tensors;
  const void* scales;  // [4, G], of which the rows lr_scale and wd_scale are used
  bool is_double;
  int64_t row_stride;
  int64_t group_stride;
  const int64_t* group_of;
  const double* lr;
  const double* weight_decay;
  const double* beta1;
  const double* beta2;
  const double* eps;
  const double* grad_scale;  // null for 1
  StepCounts steps;          // done so far
  const bool* go;            // null: this step counts
  bool released;

  METAADAMW_INLINE double scale(int row, int64_t t) const {
    const int64_t at = row * row_stride + group_of[t] * group_stride;
    return is_double ? static_cast<const double*>(scales)[at] : static_cast<const float*>(scales)[at];
  }

  METAADAMW_INLINE Hyperparameters operator[](int64_t t) const {
    const double step = go == nullptr || *go ? steps[t] + 1.0 : 0.0;
    const Modulation x = modulate(lr[t], weight_decay[t], beta1[t], scale(0, t), scale(1, t), step, released);
    return {x.step_size, x.decay_factor, step, beta1[t], beta2[t], eps[t], grad_scale != nullptr ? grad_scale[t] : 1.0};
  }
};

inline ModulationInput modulation_input(const Tensor& scales, const Tensor& group_of, const Tensor& lr, const Tensor& weight_decay,
                                        const Tensor& beta1, const Tensor& beta2, const Tensor& eps,
                                        const std::optional<Tensor>& grad_scale, const Tensor& steps,
                                        const std::optional<Tensor>& go, bool released) {
  const ScalarType dtype = scales.scalar_type();
  METAADAMW_CHECK((dtype == ScalarType::Double || dtype == ScalarType::Float) && scales.dim() == 2 && scales.size(0) == 4,
                  "scales must be [4, G], float32 or float64");
  const int64_t tensors = group_of.numel(), device = device_of(scales);
  check_vector(group_of, "group_of", ScalarType::Long, tensors, scales);
  if (go) {
    check_vector(*go, "go", ScalarType::Bool, 1, scales);
  }
  return {tensors,
          scales.data_ptr(),
          dtype == ScalarType::Double,
          scales.stride(0),
          scales.stride(1),
          static_cast<const int64_t*>(group_of.data_ptr()),
          hyperparameter(lr, "lr", tensors, device),
          hyperparameter(weight_decay, "weight_decay", tensors, device),
          hyperparameter(beta1, "beta1", tensors, device),
          hyperparameter(beta2, "beta2", tensors, device),
          hyperparameter(eps, "eps", tensors, device),
          grad_scale ? hyperparameter(*grad_scale, "grad_scale", tensors, device) : nullptr,
          step_counts(steps, "steps", tensors, scales),
          go ? static_cast<const bool*>(go->data_ptr()) : nullptr,
          released};
}

// Calls run(MadaPolicy, number of sets) and returns the vectors that it writes: [2H, T], [2H, 0] without `advance`.
template <typename Run>
Tensor mada_policy(const std::optional<Tensor>& sums, Tensor& coefficients, Tensor& momentum, Tensor& hyper_gradient,
                   Tensor& hyper_sums, Tensor& last, const Tensor& set_of, const Tensor& lr, const Tensor& weight_decay,
                   const Tensor& eps, const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& unclipped,
                   const Tensor& counts, const std::optional<Tensor>& present, const Tensor& turns, const std::optional<Tensor>& go,
                   const Tensor& constants, double hyper_clip, int64_t freeze_steps, double lion1, double lion2, int64_t flags,
                   bool lagged, bool advance, const Run& run) {
  const int64_t tensors = set_of.numel(), rows = Mada::kVectors;
  METAADAMW_CHECK(coefficients.dim() == 2 && coefficients.size(1) == kCoefficients, "coefficients must be [K, ", kCoefficients,
                  "]");
  const int64_t sets = coefficients.size(0);
  const auto checked = [&](const Tensor& x, const char* name, int64_t length) {
    check_vector(x, name, ScalarType::Double, length, coefficients);
    return static_cast<double*>(x.data_ptr());
  };
  const auto optional = [&](const std::optional<Tensor>& x, const char* name, int64_t length) -> const double* {
    return x ? checked(*x, name, length) : nullptr;
  };
  check_vector(set_of, "set_of", ScalarType::Long, tensors, coefficients);
  if (go) {
    check_vector(*go, "go", ScalarType::Bool, 1, coefficients);
  }
  Tensor vectors = torch::stable::new_empty(coefficients, {rows, advance ? tensors : 0});
  run(MadaPolicy{tensors,
                 sums.has_value(),
                 optional(sums, "sums", tensors * Mada::kSums),
                 checked(coefficients, "coefficients", sets * kCoefficients),
                 checked(momentum, "momentum", sets * kCoefficients),
                 checked(hyper_gradient, "hyper_gradient", sets * kCoefficients),
                 checked(hyper_sums, "hyper_sums", tensors * kCoefficients),
                 checked(last, "last", rows * tensors),
                 static_cast<const int64_t*>(set_of.data_ptr()),
                 checked(lr, "lr", tensors),
                 checked(weight_decay, "weight_decay", tensors),
                 checked(eps, "eps", tensors),
                 optional(grad_scale, "grad_scale", tensors),
                 optional(unclipped, "unclipped", tensors),
                 checked(counts, "counts", tensors + 1),
                 optional(present, "present", tensors),
                 checked(turns, "turns", tensors),
                 go ? static_cast<const bool*>(go->data_ptr()) : nullptr,
                 checked(constants, "constants", 4 * kCoefficients),
                 hyper_clip,
                 static_cast<double>(freeze_steps),
                 lion1,
                 lion2,
                 static_cast<int>(flags),
                 lagged,
                 advance,
                 static_cast<double*>(vectors.data_ptr())},
      sets);
  return vectors;
}

inline Tensor empty_vectors(int64_t tensors, torch::stable::Device device) {
  return torch::stable::empty({static_cast<int64_t>(AdamW::kVectors), tensors}, ScalarType::Double, std::nullopt, device);
}

// The vectors of an update, [AdamW::kVectors, T], from in[t], the hyper-parameters of tensor t.
template <typename Input>
Tensor vectors_on_cpu(const Input& in) {
  Tensor vectors = empty_vectors(in.tensors, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  CorrectionsInTurn corrections;
  for (int64_t t = 0; t < in.tensors; ++t) {
    const Hyperparameters h = in[t];
    AdamW::write_vectors(static_cast<double*>(vectors.data_ptr()), in.tensors, t, h, corrections.of(h.beta1, h.beta2, h.step));
  }
  return vectors;
}

}  // namespace metaadamw
