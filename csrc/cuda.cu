// The ops on a CUDA device: one kernel launch for each, whatever the number of tensors; a block for each chunk (mapping.h).
//
// The kernels read everything from device memory: the table, the hyper-parameters, and through the table's addresses the tensors.
// So a captured launch does the right thing at every replay with whatever stands there then. Nothing is kept between calls but the
// tickets, which are 0 again when a kernel ends; two launches of one table must therefore not overlap, which the order of a stream
// sees to.
#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "cuda_launch.cuh"
#include "cuda_policy.cuh"
#include "cuda_utils.cuh"
#include "rounding.h"

namespace metaadamw {
namespace {

// What a block knows of its chunk, in shared memory.
struct Work {
  Chunk chunk;
  Row row;
  char* base[kOperands];  // of the chunk, where the operand is dense
  int64_t coordinates[kMaxDims];

  // By one thread.
  __device__ void begin(const Table& table, int64_t number) {
    chunk = chunk_of_block(table, number);
    row = table.rows[chunk.tensor];
    for (int i = 0; i < kOperands; ++i) {
      base[i] = row.data[i] + chunk.first * itemsize(row.type[i]);
    }
    if (row.layout >= 0) {
      coordinates_of(table.layouts[row.layout].shape, chunk.first, coordinates);
    }
  }
};

// What is read from shared memory after this is read there again. Without it each value that a loop needs would be held in a
// register all through the loop, together with what the compiler derives from it, and there are too few.
__device__ __forceinline__ void forget_registers() { asm volatile("" ::: "memory"); }

template <typename T>
__device__ __forceinline__ void add(T (&sums)[kSums], const T (&more)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    sums[i] += more[i];
  }
}

// ------------------------------------------------------------------------------------------------------------- tensor_stats

struct StatsOutput {
  void* data;  // [T, columns.count]
  bool is_double;
  Columns columns;
  const double* carried;  // [T, 2] Σp², Σv², null if they were read

  __device__ void put(int64_t tensor, int sum, double value) const {
    if (carried != nullptr && is_carried(sum)) {
      value = carried[tensor * kCarriedSums + sum - kParamSquared];
    }
#pragma unroll
    for (int c = 0; c < kSums; ++c) {
      if (c < columns.count && columns.sum[c] == sum) {
        const int64_t index = tensor * columns.count + c;
        if (is_double) {
          static_cast<double*>(data)[index] = value;
        } else {
          static_cast<float*>(data)[index] = static_cast<float>(value);
        }
      }
    }
  }
};

// The sums of one thread over its elements, in the arithmetic type; `operands` has a bit for each operand that is there and wanted.
template <int V, bool counts, typename T>
__device__ __forceinline__ void sum_chunk(const Table& table, const Work& work, int operands, double (&totals)[kSums]) {
  constexpr int kStreams[4] = {kGrad, kMomentum, kParam, kSecondMoment};
  const Row& row = work.row;
  T sums[kSums] = {};
  for_each_group<V>(
      threadIdx.x, work.chunk.count, has_whole_groups(row, operands),
      [&](int first) {
        if constexpr (V > 1) {
          forget_registers();
          Bits bits[4]{};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (operands >> kStreams[i] & 1) {
              const int size = itemsize(row.type[kStreams[i]]);
              bits[i] = load_group<V>(work.base[kStreams[i]] + first * size, size);
            }
          }
#pragma unroll
          for (int part = 0; part < V; part += kPart) {
            float x[4][kPart];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              unpack<V>(bits[i], row.type[kStreams[i]], part, x[i]);
            }
            T of_part[kSums] = {};
#pragma unroll
            for (int k = 0; k < kPart; ++k) {
              accumulate<counts, T>(of_part, x[0][k], x[1][k], x[2][k], x[3][k]);
            }
            add(sums, of_part);
          }
        }
      },
      [&](int begin, int end) {
        T of_part[kSums] = {};
#pragma unroll 1
        for (int index = begin; index < end; ++index) {
          forget_registers();
          T x[4] = {};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (operands >> kStreams[i] & 1) {
              char* address = address_in_chunk(table, row, kStreams[i], work.chunk.first, work.coordinates, index);
              x[i] = load_element<T>(address, row.type[kStreams[i]]);
            }
          }
          accumulate<counts, T>(of_part, x[0], x[1], x[2], x[3]);
        }
        add(sums, of_part);
      });
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    totals[i] = sums[i];
  }
}

template <bool counts>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    tensor_stats_kernel(const Table table, const int wanted, const StatsOutput output) {
  __shared__ Work work;
  if (threadIdx.x == 0) {
    work.begin(table, blockIdx.x);
  }
  __syncthreads();
  const Row& row = work.row;
  int operands = wanted;
#pragma unroll
  for (int i = 0; i < kOperands; ++i) {
    operands &= ~((row.data[i] == nullptr) << i);
  }
  double totals[kSums];
  if (row.is_double) {
    sum_chunk<1, counts, double>(table, work, operands, totals);
  } else if (row.vector == 4) {
    sum_chunk<4, counts, float>(table, work, operands, totals);
  } else {
    sum_chunk<8, counts, float>(table, work, operands, totals);
  }
  tensor_sums(table, work.chunk, totals, [&](int sum, double value) { output.put(work.chunk.tensor, sum, value); });
}

// ------------------------------------------------------------------------------------------------------------ adamw_update_

// Also returns the thread's sums of p and v as they were stored, and before them, if `found`, those of g and m as they were: all in
// the order in which sum_chunk adds them up.
template <int V, bool found, bool stochastic, bool amsgrad, typename T>
__device__ __forceinline__ void update_chunk(const Table& table, const Work& work, const Scalars<T>& scalars,
                                             const uint32_t (&keys)[kOperands], double (&totals)[found ? kUpdateSums : 2]) {
  constexpr int kUsed = amsgrad ? kOperands : kOperands - 1;
  static_assert(kMaximum == kOperands - 1);
  const Row& row = work.row;
  T sums[kSums] = {};
  for_each_group<V>(
      threadIdx.x, work.chunk.count, has_whole_groups(row, (1 << kUsed) - 1),
      [&](int first) {
        if constexpr (V > 1) {
          forget_registers();
          Bits bits[kUsed];
#pragma unroll
          for (int i = 0; i < kUsed; ++i) {
            const int size = itemsize(row.type[i]);
            bits[i] = load_group<V>(work.base[i] + first * size, size);
          }
          const Scalars<T> s = scalars;
#pragma unroll
          for (int part = 0; part < V; part += kPart) {
            float x[kOperands][kPart] = {};
            T of_part[kSums] = {};
#pragma unroll
            for (int i = 0; i < kUsed; ++i) {
              unpack<V>(bits[i], row.type[i], part, x[i]);
            }
#pragma unroll
            for (int k = 0; k < kPart; ++k) {
              if constexpr (found) {
                accumulate_found<T>(of_part, x[kGrad][k], x[kMomentum][k]);
              }
              adamw_element<amsgrad, float>(s, x[kGrad][k], x[kParam][k], x[kMomentum][k], x[kSecondMoment][k], x[kMaximum][k]);
            }
            if constexpr (stochastic) {
#pragma unroll
              for (int i = kGrad + 1; i < kUsed; ++i) {
#pragma unroll
                for (int k = 0; k < kPart && is_rounded_stochastically(i); ++k) {
                  const uint32_t element = static_cast<uint32_t>(work.chunk.first) + first + part + k;
                  x[i][k] = round_stochastically(x[i][k], row.type[i], random_bits(keys[i], element));
                }
              }
            }
#pragma unroll
            for (int i = kGrad + 1; i < kUsed; ++i) {
              pack<V>(bits[i], row.type[i], part, x[i]);
            }
            unpack<V>(bits[kParam], row.type[kParam], part, x[kParam]);
            unpack<V>(bits[kSecondMoment], row.type[kSecondMoment], part, x[kSecondMoment]);
#pragma unroll
            for (int k = 0; k < kPart; ++k) {
              accumulate_left<T>(of_part, x[kParam][k], x[kSecondMoment][k]);
            }
            add(sums, of_part);
          }
#pragma unroll
          for (int i = kGrad + 1; i < kUsed; ++i) {
            const int size = itemsize(row.type[i]);
            store_group<V>(work.base[i] + first * size, size, bits[i]);
          }
        }
      },
      [&](int begin, int end) {
        const Scalars<T> s = scalars;
        T of_part[kSums] = {};
#pragma unroll 1
        for (int index = begin; index < end; ++index) {
          forget_registers();
          char* address[kUsed];
          T x[kOperands] = {};
#pragma unroll
          for (int i = 0; i < kUsed; ++i) {
            address[i] = address_in_chunk(table, row, i, work.chunk.first, work.coordinates, index);
            x[i] = load_element<T>(address[i], row.type[i]);
          }
          if constexpr (found) {
            accumulate_found<T>(of_part, x[kGrad], x[kMomentum]);
          }
          adamw_element<amsgrad, T>(s, x[kGrad], x[kParam], x[kMomentum], x[kSecondMoment], x[kMaximum]);
#pragma unroll
          for (int i = kGrad + 1; i < kUsed; ++i) {
            if constexpr (stochastic) {
              if (is_rounded_stochastically(i)) {
                const uint32_t element = static_cast<uint32_t>(work.chunk.first) + index;
                x[i] = round_stochastically(x[i], row.type[i], random_bits(keys[i], element));
              }
            }
            x[i] = store_element<T>(address[i], row.type[i], x[i]);
          }
          accumulate_left<T>(of_part, x[kParam], x[kSecondMoment]);
        }
        add(sums, of_part);
      });
#pragma unroll
  for (int i = found ? 0 : kParamSquared; i < kUpdateSums; ++i) {
    totals[found ? i : i - kParamSquared] = sums[i];
  }
}

template <int V, bool found, bool stochastic, typename T>
__device__ __forceinline__ void update_chunk(const Table& table, const Work& work, const HyperparameterVectors& hyperparameters,
                                             double (&totals)[found ? kUpdateSums : 2]) {
  __shared__ Scalars<T> scalars;
  __shared__ uint32_t keys[kOperands];
  if (threadIdx.x == 0) {
    const Hyperparameters h = hyperparameters[work.chunk.tensor];
    scalars = fold<T>(h, bias_corrections(h.beta1, h.beta2, h.step));
  }
  if (stochastic && threadIdx.x < kOperands) {
    const int64_t t = work.chunk.tensor;
    keys[threadIdx.x] = rounding_key(hyperparameters.rounding_seed, hyperparameters.step[t], t, threadIdx.x, work.chunk.first);
  }
  __syncthreads();
  if (work.row.data[kMaximum] != nullptr) {
    update_chunk<V, found, stochastic, true, T>(table, work, scalars, keys, totals);
  } else {
    update_chunk<V, found, stochastic, false, T>(table, work, scalars, keys, totals);
  }
}

template <bool found, bool stochastic>
__global__ void __launch_bounds__(kThreads, found || stochastic ? kBlocksWithFoundSums : kBlocksPerMultiprocessor)
    adamw_update_kernel(const Table table, const HyperparameterVectors hyperparameters, const NewSums new_sums) {
  __shared__ Work work;
  if (threadIdx.x == 0) {
    // Backward through what the statistics went through forward: the last chunks may still be in the second-level cache.
    work.begin(table, gridDim.x - 1 - blockIdx.x);
  }
  __syncthreads();
  if (work.row.lacks_gradient() || hyperparameters.skips(work.chunk.tensor)) {
    return;
  }
  double totals[found ? kUpdateSums : 2];
  if (work.row.is_double) {
    update_chunk<1, found, stochastic, double>(table, work, hyperparameters, totals);
  } else if (work.row.vector == 4) {
    update_chunk<4, found, stochastic, float>(table, work, hyperparameters, totals);
  } else {
    update_chunk<8, found, stochastic, float>(table, work, hyperparameters, totals);
  }
  if (new_sums.data != nullptr) {
    tensor_sums(table, work.chunk, totals,
                [&](int sum, double value) { new_sums.at(work.chunk.tensor, found ? sum : sum + kParamSquared) = value; });
  }
}

// --------------------------------------------------------------------------------------- as ops of torch (see ops.cpp)

// The GPU's copy of a table.
Table table_on_device(const Header& header, const std::optional<Tensor>& copy) {
  METAADAMW_CHECK(copy && device_of(*copy) == header.device && copy->is_contiguous() &&
                      copy->numel() * static_cast<int64_t>(copy->element_size()) >= header.device_bytes,
                  "the copy of the launch table must lie on the device of the tensors, with room for the partial sums");
  return Table(header, static_cast<char*>(copy->data_ptr()));
}

Tensor tensor_stats(const Header& header, const Table& table, bool params, bool exp_avg_sqs, bool count_nonzero, ScalarType dtype,
                    const std::optional<Tensor>& carried = std::nullopt) {
  const double* carried_sums = check_columns(header, params, exp_avg_sqs, carried, dtype);
  const torch::stable::accelerator::DeviceGuard guard(header.device);
  const Columns columns(params || carried, exp_avg_sqs || carried, count_nonzero);
  Tensor result = torch::stable::empty({header.tensors, columns.count}, dtype, std::nullopt,
                                       torch::stable::Device(torch::headeronly::DeviceType::CUDA, header.device));
  if (header.chunks != 0) {
    const int wanted = 1 << kGrad | 1 << kMomentum | params << kParam | exp_avg_sqs << kSecondMoment;
    const StatsOutput output{result.data_ptr(), dtype == ScalarType::Double, columns, carried_sums};
    const auto kernel = count_nonzero ? tensor_stats_kernel<true> : tensor_stats_kernel<false>;
    kernel<<<header.chunks, kThreads, 0, current_stream(header.device)>>>(table, wanted, output);
    check_cuda(cudaGetLastError(), "tensor_stats");
  }
  return result;
}

void adamw_update_(const Header& header, const Table& table, const HyperparameterVectors& hyperparameters,
                   const NewSums& new_sums) {
  const torch::stable::accelerator::DeviceGuard guard(header.device);
  if (header.chunks != 0) {
    const bool found = new_sums.found();
    const auto kernel = hyperparameters.stochastic ? (found ? adamw_update_kernel<true, true> : adamw_update_kernel<false, true>)
                                                   : (found ? adamw_update_kernel<true, false> : adamw_update_kernel<false, false>);
    kernel<<<header.chunks, kThreads, 0, current_stream(header.device)>>>(table, hyperparameters, new_sums);
    check_cuda(cudaGetLastError(), "adamw_update_");
  }
}

Tensor launch_tensor_stats(Tensor table, std::optional<Tensor> copy, bool params, bool exp_avg_sqs, bool count_nonzero,
                           ScalarType dtype, std::optional<Tensor> carried) {
  const Header& header = *static_cast<Header*>(table.data_ptr());
  return tensor_stats(header, table_on_device(header, copy), params, exp_avg_sqs, count_nonzero, dtype, carried);
}

void launch_adamw_update_(Tensor table, std::optional<Tensor> copy, Tensor step_size, Tensor decay_factor, Tensor step,
                          Tensor beta1, Tensor beta2, Tensor eps, std::optional<Tensor> grad_scale, std::optional<Tensor> new_sums,
                          std::optional<int64_t> rounding_seed) {
  const Header& header = *static_cast<Header*>(table.data_ptr());
  adamw_update_(header, table_on_device(header, copy),
                hyperparameters(step_size, decay_factor, step, beta1, beta2, eps, grad_scale, rounding_seed, header),
                sums_output(new_sums, header));
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
  explicit CopiedTable(const Lists& lists) : memory_(make_table(lists)), copy_(allocate(header())) {
    const torch::stable::accelerator::DeviceGuard guard(header().device);
    const cudaStream_t stream = current_stream(header().device);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check_cuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
    METAADAMW_CHECK(
        status == cudaStreamCaptureStatusNone,
        "the ops on lists copy a table that is gone at replay, so they cannot be captured in a CUDA graph: use a launch");
    // From pageable memory: what cudaMemcpyAsync returns from has been read.
    check_cuda(cudaMemcpyAsync(copy_.data_ptr(), memory_.data(), header().copied_bytes, cudaMemcpyHostToDevice, stream),
               "cudaMemcpyAsync");
  }
  const Header& header() const { return *reinterpret_cast<const Header*>(memory_.data()); }
  Table table() const { return table_on_device(header(), copy_); }

 private:
  static Tensor allocate(const Header& header) {
    return torch::stable::empty({header.device_bytes / 8}, ScalarType::Long, std::nullopt,
                                torch::stable::Device(torch::headeronly::DeviceType::CUDA, header.device));
  }

  std::vector<int64_t> memory_;
  Tensor copy_;
};

Tensor list_tensor_stats(std::vector<Tensor> grads, std::vector<Tensor> exp_avgs, List params, List exp_avg_sqs, bool count_nonzero,
                         ScalarType dtype) {
  const bool with_params = params.has_value(), with_squares = exp_avg_sqs.has_value();
  const CopiedTable copied(
      Lists{{std::move(grads), std::move(exp_avgs), std::move(params), std::move(exp_avg_sqs), std::nullopt}, /*written=*/false});
  return tensor_stats(copied.header(), copied.table(), with_params, with_squares, count_nonzero, dtype);
}

void list_adamw_update_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                        std::vector<Tensor> exp_avg_sqs, List max_exp_avg_sqs, Tensor step_size, Tensor decay_factor, Tensor step,
                        Tensor beta1, Tensor beta2, Tensor eps, std::optional<Tensor> grad_scale, std::optional<Tensor> new_sums,
                        std::optional<int64_t> rounding_seed) {
  const CopiedTable copied(
      Lists{{std::move(grads), std::move(exp_avgs), std::move(params), std::move(exp_avg_sqs), std::move(max_exp_avg_sqs)},
            /*written=*/true});
  adamw_update_(copied.header(), copied.table(),
                hyperparameters(step_size, decay_factor, step, beta1, beta2, eps, grad_scale, rounding_seed, copied.header()),
                sums_output(new_sums, copied.header()));
}

}  // namespace
}  // namespace metaadamw

STABLE_TORCH_LIBRARY_IMPL(metaadamw_fast, CUDA, m) {
  m.impl("tensor_stats", TORCH_BOX(&metaadamw::list_tensor_stats));
  m.impl("adamw_update_", TORCH_BOX(&metaadamw::list_adamw_update_));
  m.impl("launch_tensor_stats", TORCH_BOX(&metaadamw::launch_tensor_stats));
  m.impl("launch_adamw_update_", TORCH_BOX(&metaadamw::launch_adamw_update_));
  m.impl("group_features", TORCH_BOX(&metaadamw::group_features));
  m.impl("scaled_gradients", TORCH_BOX(&metaadamw::scaled_gradients_on_cuda));
  m.impl("modulation", TORCH_BOX(&metaadamw::modulation));
  m.impl("launch_capture", TORCH_BOX(&metaadamw::launch_capture));
}
