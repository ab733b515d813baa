// The ops on the CPU; see ops.cpp.
#include <torch/csrc/stable/library.h>

#include "engine_cpu.h"
#include "make_table.h"
#include "policy_checks.h"

namespace metaadamw {
namespace {

const Header& header_of(void* table) { return *static_cast<Header*>(table); }

Tensor launch_measure(Tensor table, std::optional<Tensor>, int64_t mask, ScalarType dtype, std::optional<Tensor> carried,
                      std::optional<Tensor> vectors) {
  const Header& header = header_of(table.data_ptr());
  return with_rule(header.rule,
                   [&](auto rule) { return measure<decltype(rule)>(header, table.data_ptr(), mask, dtype, carried, vectors); });
}

void launch_update_(Tensor table, std::optional<Tensor>, Tensor vectors, std::optional<Tensor> new_sums,
                    std::optional<int64_t> rounding_seed) {
  const Header& header = header_of(table.data_ptr());
  with_rule(header.rule, [&](auto rule) {
    using R = decltype(rule);
    update<R>(header, table.data_ptr(), checked_update<R>(vectors, rounding_seed, header), sums_output<R>(new_sums, header));
  });
}

Tensor tensor_stats(std::vector<Tensor> grads, std::vector<Tensor> exp_avgs, List params, List exp_avg_sqs, bool count_nonzero,
                    ScalarType dtype) {
  const int mask = statistics_mask(params.has_value(), exp_avg_sqs.has_value(), count_nonzero);
  auto memory =
      make_table(Lists<AdamW>{{std::move(grads), std::move(exp_avgs), std::move(params), std::move(exp_avg_sqs), std::nullopt},
                              /*written=*/false},
                 kChunkOnCpu);
  return measure<AdamW>(header_of(memory.data()), memory.data(), mask, dtype, std::nullopt, std::nullopt);
}

void adamw_update_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                   std::vector<Tensor> exp_avg_sqs, List max_exp_avg_sqs, Tensor step_size, Tensor decay_factor, Tensor step,
                   Tensor beta1, Tensor beta2, Tensor eps, std::optional<Tensor> grad_scale, std::optional<Tensor> new_sums,
                   std::optional<int64_t> rounding_seed, List low_precision_params) {
  auto memory = make_table(Lists<AdamW>{{std::move(grads), std::move(exp_avgs), std::move(params), std::move(exp_avg_sqs),
                                         std::move(max_exp_avg_sqs), std::move(low_precision_params)},
                                        /*written=*/true},
                           kChunkOnCpu);
  const Header& header = header_of(memory.data());
  const Tensor vectors = vectors_on_cpu(
      hyperparameter_input(step_size, decay_factor, step, beta1, beta2, eps, grad_scale, header.tensors, header.device));
  update<AdamW>(header, memory.data(), checked_update<AdamW>(vectors, rounding_seed, header), sums_output<AdamW>(new_sums, header));
}

}  // namespace
}  // namespace metaadamw

STABLE_TORCH_LIBRARY_IMPL(metaadamw_fast, CPU, m) {
  m.impl("tensor_stats", TORCH_BOX(&metaadamw::tensor_stats));
  m.impl("adamw_update_", TORCH_BOX(&metaadamw::adamw_update_));
  m.impl("launch_measure", TORCH_BOX(&metaadamw::launch_measure));
  m.impl("launch_update_", TORCH_BOX(&metaadamw::launch_update_));
}
