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
  Layout layout;          // of rows that have one, and the coordinates of the chunk's first element
  int64_t coordinates[kMaxDims];

  // By all threads of the block; ends with a barrier.
  __device__ void begin(const Table& table, int64_t number) {
    if (threadIdx.x == 0) {
      chunk = chunk_of_block(table, number);
      row = table.rows[chunk.tensor];
      for (int i = 0; i < kOperands; ++i) {
        base[i] = row.data[i] + chunk.first * itemsize(row.type[i]);
      }
    }
    __syncthreads();
    if (row.layout >= 0) {
      // Every element asks for sizes and strides: from global memory that would be two loads per element, operand and dimension.
      constexpr int kWords = sizeof(Layout) / sizeof(int64_t);
      static_assert(kWords <= kThreads && sizeof(Layout) % sizeof(int64_t) == 0);
      if (threadIdx.x < kWords) {
        reinterpret_cast<int64_t*>(&layout)[threadIdx.x] =
            reinterpret_cast<const int64_t*>(&table.layouts[row.layout])[threadIdx.x];
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        coordinates_of(layout.shape, chunk.first, coordinates);
      }
      __syncthreads();
    }
  }

  __device__ char* address(const Table& table, int operand, int index) const {
    return address_in_chunk(row, layout, operand, chunk.first, coordinates, table.chunk_size, index);
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
  for_each_group<V, false>(
      threadIdx.x, work.chunk.count, has_whole_groups(row, operands),
      [&](int first) {
        forget_registers();
        Groups<4> groups{};
        if constexpr (V > 1) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (operands >> kStreams[i] & 1) {
              const int size = itemsize(row.type[kStreams[i]]);
              groups.bits[i] = load_group<V>(work.base[kStreams[i]] + first * size, size);
            }
          }
        }
        return groups;
      },
      [&](int, const Groups<4>& groups) {
        if constexpr (V > 1) {
#pragma unroll
          for (int part = 0; part < V; part += kPart) {
            float x[4][kPart];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              unpack<V>(groups.bits[i], row.type[kStreams[i]], part, x[i]);
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
              x[i] = load_element<T>(work.address(table, kStreams[i], index), row.type[kStreams[i]]);
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
__global__ void __launch_bounds__(kThreads, counts ? kMeasureBlocksWithCounts : kMeasureBlocks)
    tensor_stats_kernel(const Table table, const int wanted, const StatsOutput output) {
  __shared__ Work work;
  work.begin(table, blockIdx.x);
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
// the order in which sum_chunk adds them up. With `master` the row may have a low-precision parameter.
template <int V, bool found, bool stochastic, bool amsgrad, bool master, typename T>
__device__ __forceinline__ void update_chunk(const Table& table, const Work& work, const Scalars<T>& scalars,
                                             const uint32_t (&keys)[kComputed], double (&totals)[found ? kUpdateSums : 2]) {
  constexpr int kUsed = amsgrad ? kComputed : kComputed - 1;
  static_assert(kMaximum == kComputed - 1);
  constexpr int kMoved = kUsed + master;  // behind those that are used, the low-precision parameter
  const auto operand_of = [](int i) constexpr { return i < kUsed ? i : static_cast<int>(kLowPrecision); };
  const Row& row = work.row;
  const auto has = [&](int i) { return i < kUsed || row.data[kLowPrecision] != nullptr; };
  T sums[kSums] = {};
  for_each_group<V, found && kLoadsAhead>(
      threadIdx.x, work.chunk.count, has_whole_groups(row, (1 << kUsed) - 1 | (master && has(kUsed)) << kLowPrecision),
      [&](int first) {
        forget_registers();
        Groups<kMoved> groups{};
        if constexpr (V > 1) {
#pragma unroll
          for (int i = 0; i < kMoved; ++i) {
            if (has(i)) {
              const int size = itemsize(row.type[operand_of(i)]);
              groups.bits[i] = load_group<V>(work.base[operand_of(i)] + first * size, size);
            }
          }
        }
        return groups;
      },
      [&](int first, Groups<kMoved> groups) {
        if constexpr (V > 1) {
          Bits(&bits)[kMoved] = groups.bits;
          const Scalars<T> s = scalars;
#pragma unroll
          for (int part = 0; part < V; part += kPart) {
            float x[kComputed][kPart] = {};
            T of_part[kSums] = {};
#pragma unroll
            for (int i = 0; i < kUsed; ++i) {
              unpack<V>(bits[i], row.type[i], part, x[i]);
            }
            if constexpr (master) {
              const ElementType type = row.type[kLowPrecision];
              float low[kPart];
              unpack<V>(bits[kUsed], type, part, low);
#pragma unroll
              for (int k = 0; k < kPart; ++k) {
                const float start = start_of_update(x[kParam][k], rounded_to_half(type, x[kParam][k]), low[k]);
                x[kParam][k] = has(kUsed) ? start : x[kParam][k];
              }
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
            if constexpr (master) {
              pack<V>(bits[kUsed], row.type[kLowPrecision], part, x[kParam]);
            }
            unpack<V>(bits[kSecondMoment], row.type[kSecondMoment], part, x[kSecondMoment]);
#pragma unroll
            for (int k = 0; k < kPart; ++k) {
              accumulate_left<T>(of_part, x[kParam][k], x[kSecondMoment][k]);
            }
            add(sums, of_part);
          }
#pragma unroll
          for (int i = kGrad + 1; i < kMoved; ++i) {
            if (has(i)) {
              const int size = itemsize(row.type[operand_of(i)]);
              store_group<V>(work.base[operand_of(i)] + first * size, size, bits[i]);
            }
          }
        }
      },
      [&](int begin, int end) {
        const Scalars<T> s = scalars;
        T of_part[kSums] = {};
#pragma unroll 1
        for (int index = begin; index < end; ++index) {
          forget_registers();
          char* address[kMoved];
          T x[kComputed] = {};
#pragma unroll
          for (int i = 0; i < kUsed; ++i) {
            address[i] = work.address(table, i, index);
            x[i] = load_element<T>(address[i], row.type[i]);
          }
          if (master && has(kUsed)) {
            const ElementType type = row.type[kLowPrecision];
            address[kMoved - 1] = work.address(table, kLowPrecision, index);
            const T rounded = rounded_to_half(type, static_cast<float>(x[kParam]));
            x[kParam] = start_of_update(x[kParam], rounded, load_element<T>(address[kMoved - 1], type));
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
          if (master && has(kUsed)) {
            store_element<T>(address[kMoved - 1], row.type[kLowPrecision], x[kParam]);
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

template <int V, bool found, bool stochastic, bool master, typename T>
__device__ __forceinline__ void update_chunk(const Table& table, const Work& work, const Scalars<T>& scalars,
                                             const uint32_t (&keys)[kComputed], double (&totals)[found ? kUpdateSums : 2]) {
  if (work.row.data[kMaximum] != nullptr) {
    update_chunk<V, found, stochastic, true, master, T>(table, work, scalars, keys, totals);
  } else {
    update_chunk<V, found, stochastic, false, master, T>(table, work, scalars, keys, totals);
  }
}

// What a block knows of its tensor's vectors, in shared memory. Three warps read them while warp 0 reads the row, so that all these
// loads are under way at once. Only the row says which arithmetic it takes, so the scalars are made for both.
struct Numbers {
  Scalars<float> in_float32;
  Scalars<double> in_float64;
  uint32_t keys[kComputed];
  bool skipped;

  // By all threads of the block; a barrier must follow.
  template <bool stochastic>
  __device__ void begin(const Table& table, const Update& update, int64_t number) {
    const int64_t tensor = table.tensor_of_chunk[number];
    if (threadIdx.x == kWarp) {
      in_float32 = scalars_of<float>(update, tensor);
    } else if (threadIdx.x == 2 * kWarp) {
      in_float64 = scalars_of<double>(update, tensor);
    } else if (threadIdx.x == 3 * kWarp) {
      skipped = update.skips(tensor);
    } else if (stochastic && threadIdx.x > 3 * kWarp && threadIdx.x <= 3 * kWarp + kComputed) {
      const int operand = threadIdx.x - 3 * kWarp - 1;
      const int64_t first = (number - table.first_chunk[tensor]) * table.chunk_size;
      keys[operand] = rounding_key(update.rounding_seed, update.at(kStep, tensor), tensor, operand, first);
    }
  }
};

template <bool found, bool stochastic, bool masters>
__device__ __forceinline__ void update_chunk_of_block(const Table& table, const Update& update, const NewSums& new_sums) {
  __shared__ Work work;
  __shared__ Numbers numbers;
  // Backward through what the statistics went through forward: the last chunks may still be in the second-level cache.
  const int64_t number = gridDim.x - 1 - blockIdx.x;
  numbers.begin<stochastic>(table, update, number);
  work.begin(table, number);
  if (work.row.lacks_gradient() || numbers.skipped) {
    return;
  }
  double totals[found ? kUpdateSums : 2];
  if (work.row.is_double) {
    update_chunk<1, found, stochastic, masters>(table, work, numbers.in_float64, numbers.keys, totals);
  } else if (masters || work.row.vector == 4) {
    update_chunk<4, found, stochastic, masters>(table, work, numbers.in_float32, numbers.keys, totals);
  } else if constexpr (!masters) {
    update_chunk<8, found, stochastic, false>(table, work, numbers.in_float32, numbers.keys, totals);
  }
  if (new_sums.data != nullptr) {
    tensor_sums(table, work.chunk, totals,
                [&](int sum, double value) { new_sums.at(work.chunk.tensor, found ? sum : sum + kParamSquared) = value; });
  }
}

template <bool found, bool stochastic>
__global__ void __launch_bounds__(kThreads, found ? kUpdateBlocksWithFoundSums : kUpdateBlocks)
    adamw_update_kernel(const Table table, const Update update, const NewSums new_sums) {
  update_chunk_of_block<found, stochastic, false>(table, update, new_sums);
}

// Where some row has a low-precision parameter: then no row is taken in groups of 8, since a master is of float32. A kernel of its
// own, so that the other keeps its registers.
template <bool found, bool stochastic>
__global__ void __launch_bounds__(kThreads, kUpdateBlocksWithMasters)
    adamw_update_masters_kernel(const Table table, const Update update, const NewSums new_sums) {
  update_chunk_of_block<found, stochastic, true>(table, update, new_sums);
}

using UpdateKernel = void (*)(Table, Update, NewSums);

template <bool found, bool stochastic>
UpdateKernel update_kernel(bool masters) {
  return masters ? adamw_update_masters_kernel<found, stochastic> : adamw_update_kernel<found, stochastic>;
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

void adamw_update_(const Header& header, const Table& table, const Update& update, const NewSums& new_sums) {
  const torch::stable::accelerator::DeviceGuard guard(header.device);
  if (header.chunks != 0) {
    const bool found = new_sums.found();
    const UpdateKernel kernel =
        (update.stochastic ? (found ? update_kernel<true, true> : update_kernel<false, true>)
                           : (found ? update_kernel<true, false> : update_kernel<false, false>))(header.masters);
    kernel<<<header.chunks, kThreads, 0, current_stream(header.device)>>>(table, update, new_sums);
    check_cuda(cudaGetLastError(), "adamw_update_");
  }
}

Tensor launch_tensor_stats(Tensor table, std::optional<Tensor> copy, bool params, bool exp_avg_sqs, bool count_nonzero,
                           ScalarType dtype, std::optional<Tensor> carried) {
  const Header& header = *static_cast<Header*>(table.data_ptr());
  return tensor_stats(header, table_on_device(header, copy), params, exp_avg_sqs, count_nonzero, dtype, carried);
}

void launch_adamw_update_(Tensor table, std::optional<Tensor> copy, Tensor vectors, std::optional<Tensor> new_sums,
                          std::optional<int64_t> rounding_seed) {
  const Header& header = *static_cast<Header*>(table.data_ptr());
  adamw_update_(header, table_on_device(header, copy), checked_update(vectors, rounding_seed, header),
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
  explicit CopiedTable(const Lists& lists) {
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
  Table table() const { return table_on_device(header_, copy_); }

 private:
  Header header_;
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
                        std::optional<int64_t> rounding_seed, List low_precision_params) {
  const CopiedTable copied(Lists{{std::move(grads), std::move(exp_avgs), std::move(params), std::move(exp_avg_sqs),
                                  std::move(max_exp_avg_sqs), std::move(low_precision_params)},
                                 /*written=*/true});
  const Header& header = copied.header();
  const Tensor vectors = vectors_on_cuda(
      hyperparameter_input(step_size, decay_factor, step, beta1, beta2, eps, grad_scale, header.tensors, header.device),
      header.device);
  adamw_update_(header, copied.table(), checked_update(vectors, rounding_seed, header), sums_output(new_sums, header));
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
  m.impl("update_vectors", TORCH_BOX(&metaadamw::update_vectors));
  m.impl("launch_capture", TORCH_BOX(&metaadamw::launch_capture));
}
