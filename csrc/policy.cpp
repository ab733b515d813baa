// Features, modulation and MADA's policy on the CPU. There are as many rows as groups and tensors: a loop, not a parallel one.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "policy_checks.h"

namespace metaadamw {
namespace {

Tensor group_features(Tensor statistics, Tensor order, Tensor begin, Tensor numel, Tensor constants, bool enhanced, bool v_norm,
                      bool deviations, int64_t time, Tensor done, int64_t ahead, double total_steps) {
  const FeatureColumns columns{enhanced, v_norm, deviations, static_cast<int>(time)};
  const StepCounts count = check_features(columns, statistics, order, begin, numel, constants, done);
  const double progress = training_progress(count[0] + static_cast<double>(ahead), total_steps);
  Tensor features = torch::stable::clone(constants);
  const GroupedTensors grouped{static_cast<const int64_t*>(order.data_ptr()), static_cast<const int64_t*>(begin.data_ptr())};
  const auto fill = [&](auto zero) {
    using T = decltype(zero);
    const auto alone = [](double (&)[kMaxValues]) {};
    for (int64_t g = 0; g < constants.size(0); ++g) {
      feature_row(columns, static_cast<const T*>(statistics.data_ptr()), statistics.size(1), grouped,
                  static_cast<const T*>(numel.data_ptr()), g, progress, 0, 1, alone,
                  static_cast<T*>(features.data_ptr()) + g * constants.size(1));
    }
  };
  statistics.scalar_type() == ScalarType::Double ? fill(0.0) : fill(0.0f);
  return features;
}

Tensor modulation(Tensor scales, Tensor group_of, Tensor lr, Tensor weight_decay, Tensor beta1, Tensor beta2, Tensor eps,
                  std::optional<Tensor> grad_scale, Tensor steps, std::optional<Tensor> go, bool released) {
  return vectors_on_cpu(modulation_input(scales, group_of, lr, weight_decay, beta1, beta2, eps, grad_scale, steps, go, released));
}

Tensor update_vectors(Tensor step_size, Tensor decay_factor, Tensor step, Tensor beta1, Tensor beta2, Tensor eps,
                      std::optional<Tensor> grad_scale) {
  return vectors_on_cpu(hyperparameter_input(step_size, decay_factor, step, beta1, beta2, eps, grad_scale, step_size.numel(), -1));
}

std::tuple<Tensor, Tensor, Tensor> scaled_gradients_on_cpu(Tensor statistics, std::optional<Tensor> sign,
                                                           std::optional<Tensor> loss_scale, double max_norm) {
  return scaled_gradients(statistics, sign, loss_scale, max_norm, [](const auto& x) {
    double squared = 0.0;
    for (int64_t t = 0; t < x.tensors; ++t) {
      squared += x.statistics[t * x.width + AdamW::kGradSquared];
    }
    const GradientFactor factor = x.factor(squared);
    *x.norm = factor.norm;
    for (int64_t t = 0; t < x.tensors; ++t) {
      x.write(t, factor.factor);
    }
  });
}

Tensor mada_policy_(std::optional<Tensor> sums, Tensor coefficients, Tensor momentum, Tensor hyper_gradient, Tensor hyper_sums,
                    Tensor last, Tensor set_of, Tensor lr, Tensor weight_decay, Tensor eps, std::optional<Tensor> grad_scale,
                    std::optional<Tensor> unclipped, Tensor counts, std::optional<Tensor> present, Tensor turns,
                    std::optional<Tensor> go, Tensor constants, double hyper_clip, int64_t freeze_steps, double lion1, double lion2,
                    int64_t flags, bool lagged, bool advance) {
  return mada_policy(sums, coefficients, momentum, hyper_gradient, hyper_sums, last, set_of, lr, weight_decay, eps, grad_scale,
                     unclipped, counts, present, turns, go, constants, hyper_clip, freeze_steps, lion1, lion2, flags, lagged,
                     advance, [](const MadaPolicy& policy, int64_t sets) {
                       const auto alone = [](double (&)[kCoefficients]) {};
                       for (int64_t k = 0; k < sets; ++k) {
                         mada_policy_of_set(policy, k, 0, 1, alone);
                       }
                     });
}

}  // namespace
}  // namespace metaadamw

STABLE_TORCH_LIBRARY_IMPL(metaadamw_fast, CPU, m) {
  m.impl("group_features", TORCH_BOX(&metaadamw::group_features));
  m.impl("scaled_gradients", TORCH_BOX(&metaadamw::scaled_gradients_on_cpu));
  m.impl("modulation", TORCH_BOX(&metaadamw::modulation));
  m.impl("update_vectors", TORCH_BOX(&metaadamw::update_vectors));
  m.impl("mada_policy_", TORCH_BOX(&metaadamw::mada_policy_));
}
