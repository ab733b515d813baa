// What stands on both sides of the encoder (policy.h), and MADA's policy (mada_policy.h), on a CUDA device: a few numbers per
// tensor and group, one small launch each.
#pragma once

#include "cuda_launch.cuh"
#include "cuda_utils.cuh"
#include "policy_checks.h"

namespace metaadamw {
namespace {

// A block for each group: one warp would walk a group of 10,000 tensors in 300 rounds of loads that wait for one another. Groups
// are few, so a block takes the registers that it wants; left to itself the compiler saves some and spills.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    group_features_kernel(const FeatureColumns columns, const T* statistics, const int64_t width, const GroupedTensors grouped,
                          const T* numel, const StepCounts done, const int64_t ahead, const double total_steps, const int64_t dim,
                          T* features) {
  __shared__ double totals[kMaxValues];
  const auto total = [&](double (&x)[kMaxValues]) {
    const double mine = block_sums(x);
    if (threadIdx.x < kMaxValues) {
      totals[threadIdx.x] = mine;
    }
    __syncthreads();
    for (int k = 0; k < kMaxValues; ++k) {
      x[k] = totals[k];
    }
  };
  const double progress = training_progress(done[0] + static_cast<double>(ahead), total_steps);
  feature_row(columns, statistics, width, grouped, numel, blockIdx.x, progress, threadIdx.x, kThreads, total,
              features + blockIdx.x * dim);
}

Tensor group_features(Tensor statistics, Tensor order, Tensor begin, Tensor numel, Tensor constants, bool enhanced, bool v_norm,
                      bool deviations, int64_t time, Tensor done, int64_t ahead, double total_steps) {
  const FeatureColumns columns{enhanced, v_norm, deviations, static_cast<int>(time)};
  const StepCounts count = check_features(columns, statistics, order, begin, numel, constants, done);
  const torch::stable::accelerator::DeviceGuard guard(device_of(statistics));
  const cudaStream_t stream = current_stream(device_of(statistics));
  Tensor features = torch::stable::clone(constants);
  const int64_t groups = constants.size(0), dim = constants.size(1);
  const GroupedTensors grouped{static_cast<const int64_t*>(order.data_ptr()), static_cast<const int64_t*>(begin.data_ptr())};
  const auto fill = [&](auto zero) {
    using T = decltype(zero);
    group_features_kernel<T><<<groups, kThreads, 0, stream>>>(columns, static_cast<const T*>(statistics.data_ptr()),
                                                              statistics.size(1), grouped, static_cast<const T*>(numel.data_ptr()),
                                                              count, ahead, total_steps, dim, static_cast<T*>(features.data_ptr()));
  };
  if (groups != 0) {
    statistics.scalar_type() == ScalarType::Double ? fill(0.0) : fill(0.0f);
    check_cuda(cudaGetLastError(), "group_features");
  }
  return features;
}

// One block: there are as many rows as tensors.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1) scaled_gradients_kernel(const ScaledGradients<T> x) {
  __shared__ double total;
  double squared[1] = {0.0};
  for (int64_t t = threadIdx.x; t < x.tensors; t += kThreads) {
    squared[0] += x.statistics[t * x.width + AdamW::kGradSquared];
  }
  const double of_block = block_sums(squared);
  if (threadIdx.x == 0) {
    total = of_block;
  }
  __syncthreads();
  const GradientFactor found = x.factor(total);
  for (int64_t t = threadIdx.x; t < x.tensors; t += kThreads) {
    x.write(t, found.factor);
  }
  if (threadIdx.x == 0) {
    *x.norm = static_cast<T>(found.norm);
  }
}

std::tuple<Tensor, Tensor, Tensor> scaled_gradients_on_cuda(Tensor statistics, std::optional<Tensor> sign,
                                                            std::optional<Tensor> loss_scale, double max_norm) {
  const torch::stable::accelerator::DeviceGuard guard(device_of(statistics));
  const cudaStream_t stream = current_stream(device_of(statistics));
  return scaled_gradients(statistics, sign, loss_scale, max_norm, [&](const auto& x) {
    scaled_gradients_kernel<<<1, kThreads, 0, stream>>>(x);
    check_cuda(cudaGetLastError(), "scaled_gradients");
  });
}

// The vectors of an update, [AdamW::kVectors, T], from in[t], the hyper-parameters of tensor t; a thread for each tensor.
template <typename Input>
__global__ void vectors_kernel(const Input in, double* vectors) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t < in.tensors) {
    const Hyperparameters h = in[t];
    AdamW::write_vectors(vectors, in.tensors, t, h, bias_corrections(h.beta1, h.beta2, h.step));
  }
}

template <typename Input>
Tensor vectors_on_cuda(const Input& in, int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor vectors = empty_vectors(in.tensors, torch::stable::Device(torch::headeronly::DeviceType::CUDA, device));
  if (in.tensors != 0) {
    const int64_t blocks = (in.tensors + kThreads - 1) / kThreads;
    vectors_kernel<Input><<<blocks, kThreads, 0, current_stream(device)>>>(in, static_cast<double*>(vectors.data_ptr()));
    check_cuda(cudaGetLastError(), "the vectors of an update");
  }
  return vectors;
}

Tensor modulation(Tensor scales, Tensor group_of, Tensor lr, Tensor weight_decay, Tensor beta1, Tensor beta2, Tensor eps,
                  std::optional<Tensor> grad_scale, Tensor steps, std::optional<Tensor> go, bool released) {
  return vectors_on_cuda(modulation_input(scales, group_of, lr, weight_decay, beta1, beta2, eps, grad_scale, steps, go, released),
                         device_of(scales));
}

Tensor update_vectors(Tensor step_size, Tensor decay_factor, Tensor step, Tensor beta1, Tensor beta2, Tensor eps,
                      std::optional<Tensor> grad_scale) {
  const int64_t device = device_of(step_size);
  return vectors_on_cuda(
      hyperparameter_input(step_size, decay_factor, step, beta1, beta2, eps, grad_scale, step_size.numel(), device), device);
}

// A block for each set of coefficients.
__global__ void __launch_bounds__(kThreads, 1) mada_policy_kernel(const MadaPolicy policy) {
  __shared__ double totals[kCoefficients];
  const auto total = [&](double (&x)[kCoefficients]) {
    const double mine = block_sums(x);
    if (threadIdx.x < kCoefficients) {
      totals[threadIdx.x] = mine;
    }
    __syncthreads();
    for (int i = 0; i < kCoefficients; ++i) {
      x[i] = totals[i];
    }
  };
  mada_policy_of_set(policy, blockIdx.x, threadIdx.x, kThreads, total);
}

Tensor mada_policy_(std::optional<Tensor> sums, Tensor coefficients, Tensor momentum, Tensor hyper_gradient, Tensor hyper_sums,
                    Tensor last, Tensor set_of, Tensor lr, Tensor weight_decay, Tensor eps, std::optional<Tensor> grad_scale,
                    std::optional<Tensor> unclipped, Tensor counts, std::optional<Tensor> present, Tensor turns,
                    std::optional<Tensor> go, Tensor constants, double hyper_clip, int64_t freeze_steps, double lion1, double lion2,
                    int64_t flags, bool lagged, bool advance) {
  const torch::stable::accelerator::DeviceGuard guard(device_of(coefficients));
  const cudaStream_t stream = current_stream(device_of(coefficients));
  return mada_policy(sums, coefficients, momentum, hyper_gradient, hyper_sums, last, set_of, lr, weight_decay, eps, grad_scale,
                     unclipped, counts, present, turns, go, constants, hyper_clip, freeze_steps, lion1, lion2, flags, lagged,
                     advance, [&](const MadaPolicy& policy, int64_t sets) {
                       if (sets != 0) {
                         mada_policy_kernel<<<sets, kThreads, 0, stream>>>(policy);
                         check_cuda(cudaGetLastError(), "mada_policy_");
                       }
                     });
}

}  // namespace
}  // namespace metaadamw
