// The ops on a CUDA device; see ops.cpp.
#include <torch/csrc/stable/library.h>

#include "cuda_policy.cuh"
#include "engine_cuda.cuh"
#include "make_table.h"

namespace metaadamw {
namespace {

Tensor launch_measure(Tensor table, std::optional<Tensor> copy, int64_t mask, ScalarType dtype, std::optional<Tensor> carried,
                      std::optional<Tensor> vectors) {
  const Header& header = *static_cast<Header*>(table.data_ptr());
  return with_rule(header.rule, [&](auto rule) { return measure<decltype(rule)>(header, copy, mask, dtype, carried, vectors); });
}

void launch_update_(Tensor table, std::optional<Tensor> copy, Tensor vectors, std::optional<Tensor> new_sums,
                    std::optional<int64_t> rounding_seed) {
  const Header& header = *static_cast<Header*>(table.data_ptr());
  with_rule(header.rule, [&](auto rule) {
    using R = decltype(rule);
    update<R>(header, copy, checked_update<R>(vectors, rounding_seed, header), sums_output<R>(new_sums, header));
  });
}

// A number that tells captures on the current stream of x's device apart; 0 if none is under way.
int64_t launch_capture(Tensor x) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_cuda(cudaStreamGetCaptureInfo(current_stream(x.get_device_index()), &status, &id), "launch_capture");
  return status == cudaStreamCaptureStatusNone ? 0 : static_cast<int64_t>(id);
}

// A table for one call, on the device.
class CopiedTable {
 public:
  explicit CopiedTable(const Lists<AdamW>& lists) {
    const std::vector<int64_t> memory = make_table(lists, kChunkOnGpu);
    std::memcpy(&header_, memory.data(), sizeof header_);
    const bool on_gpu = header_.device >= 0;
    const torch::stable::accelerator::DeviceGuard guard(header_.device);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check_cuda(cudaStreamIsCapturing(current_stream(header_.device), &status), "cudaStreamIsCapturing");
    METAADAMW_CHECK(
        status == cudaStreamCaptureStatusNone,
        "the ops on lists copy a table that is gone at replay, so they cannot be captured in a CUDA graph: use a launch");
    copy_ = torch::stable::empty({header_.device_bytes / 8}, ScalarType::Long, std::nullopt,
                                 torch::stable::Device(torch::headeronly::DeviceType::CUDA, header_.device));
    // The GPU may read the source of a copy at any later time. torch's pinned memory outlives this function until then: torch
    // gives it away again when an event behind the copy has come.
    const int64_t words = header_.copied_bytes / 8;
    const Tensor pinned = torch::stable::empty({words}, ScalarType::Long, std::nullopt,
                                               torch::stable::Device(torch::headeronly::DeviceType::CPU), /*pin_memory=*/on_gpu);
    std::memcpy(pinned.data_ptr(), memory.data(), header_.copied_bytes);
    Tensor copied = torch::stable::narrow(copy_, 0, 0, words);
    torch::stable::copy_(copied, pinned, /*non_blocking=*/true);
  }
  const Header& header() const { return header_; }
  const Tensor& copy() const { return copy_; }

 private:
  Header header_;
  Tensor copy_;
};

Tensor tensor_stats(std::vector<Tensor> grads, std::vector<Tensor> exp_avgs, List params, List exp_avg_sqs, bool count_nonzero,
                    ScalarType dtype) {
  const int mask = statistics_mask(params.has_value(), exp_avg_sqs.has_value(), count_nonzero);
  const CopiedTable table(
      {{std::move(grads), std::move(exp_avgs), std::move(params), std::move(exp_avg_sqs), std::nullopt}, /*written=*/false});
  return measure<AdamW>(table.header(), table.copy(), mask, dtype, std::nullopt, std::nullopt);
}

void adamw_update_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                   std::vector<Tensor> exp_avg_sqs, List max_exp_avg_sqs, Tensor step_size, Tensor decay_factor, Tensor step,
                   Tensor beta1, Tensor beta2, Tensor eps, std::optional<Tensor> grad_scale, std::optional<Tensor> new_sums,
                   std::optional<int64_t> rounding_seed, List low_precision_params) {
  const CopiedTable table({{std::move(grads), std::move(exp_avgs), std::move(params), std::move(exp_avg_sqs),
                            std::move(max_exp_avg_sqs), std::move(low_precision_params)},
                           /*written=*/true});
  const Header& header = table.header();
  const Tensor vectors = vectors_on_cuda(
      hyperparameter_input(step_size, decay_factor, step, beta1, beta2, eps, grad_scale, header.tensors, header.device),
      header.device);
  update<AdamW>(header, table.copy(), checked_update<AdamW>(vectors, rounding_seed, header), sums_output<AdamW>(new_sums, header));
}

}  // namespace
}  // namespace metaadamw

STABLE_TORCH_LIBRARY_IMPL(metaadamw_fast, CUDA, m) {
  m.impl("tensor_stats", TORCH_BOX(&metaadamw::tensor_stats));
  m.impl("adamw_update_", TORCH_BOX(&metaadamw::adamw_update_));
  m.impl("launch_measure", TORCH_BOX(&metaadamw::launch_measure));
  m.impl("launch_update_", TORCH_BOX(&metaadamw::launch_update_));
  m.impl("group_features", TORCH_BOX(&metaadamw::group_features));
  m.impl("scaled_gradients", TORCH_BOX(&metaadamw::scaled_gradients_on_cuda));
  m.impl("modulation", TORCH_BOX(&metaadamw::modulation));
  m.impl("update_vectors", TORCH_BOX(&metaadamw::update_vectors));
  m.impl("mada_policy_", TORCH_BOX(&metaadamw::mada_policy_));
  m.impl("launch_capture", TORCH_BOX(&metaadamw::launch_capture));
}
