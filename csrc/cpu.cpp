// The ops on the CPU: one parallel region over a flat list of chunks, whatever the number of tensors.
//
// A chunk is walked in blocks. An operand that is dense and of the arithmetic type is read and written where it lies; any other
// (bfloat16, float16, transposed, expanded, ...) passes through a block-sized buffer in the first-level cache. So there is one
// loop per op and arithmetic type, and strides and dtypes cannot change what it computes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <optional>

#include "checks.h"
#include "sums.h"

// One copy of a loop per instruction set, chosen when the library is loaded: what is installed runs on any x86-64.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define METAADAMW_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define METAADAMW_CLONES
#endif

namespace metaadamw {
namespace {

constexpr int kBlock = 1024;    // elements; five float64 buffers of it fill 40 KiB
constexpr int kPrefetch = 512;  // elements ahead: four read streams are more than the hardware follows well; 13 % on a Xeon
constexpr int kLanes = 16;      // of one accumulator, on every instruction set: sums do not depend on the machine

// ---------------------------------------------------------------------------------------------- operands in and out of blocks

// Calls run(offset in the operand, first element, number of elements) for each innermost run of the elements [begin, begin +
// count).
template <typename Run>
void for_each_run(const Shape& shape, const Operand& x, int64_t begin, int count, const Run& run) {
  const int64_t inner = shape.size[shape.dims - 1];
  for (int done = 0; done < count;) {
    const int64_t index = begin + done;
    const int n = static_cast<int>(std::min<int64_t>(count - done, inner - index % inner));
    run(strided_offset(shape, x.stride, index), done, n);
    done += n;
  }
}

#define METAADAMW_CONVERSIONS(T, S, name)                                                      \
  METAADAMW_CLONES void load_##name(const S* from, int64_t stride, int n, T* to) {             \
    if (stride == 1) {                                                                         \
      for (int i = 0; i < n; ++i) to[i] = static_cast<T>(from[i]);                             \
    } else {                                                                                   \
      for (int i = 0; i < n; ++i) to[i] = static_cast<T>(from[i * stride]);                    \
    }                                                                                          \
  }                                                                                            \
  METAADAMW_CLONES void store_##name(const T* from, int64_t stride, int n, S* to) {            \
    if (stride == 1) {                                                                         \
      for (int i = 0; i < n; ++i) to[i] = static_cast<S>(from[i]);                             \
    } else {                                                                                   \
      for (int i = 0; i < n; ++i) to[i * stride] = static_cast<S>(from[i]);                    \
    }                                                                                          \
  }                                                                                            \
  void load(const S* from, int64_t stride, int n, T* to) { load_##name(from, stride, n, to); } \
  void store(const T* from, int64_t stride, int n, S* to) { store_##name(from, stride, n, to); }

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
METAADAMW_CONVERSIONS(float, float, f32_f32)
METAADAMW_CONVERSIONS(float, BFloat16, f32_bf16)
METAADAMW_CONVERSIONS(float, Half, f32_f16)
METAADAMW_CONVERSIONS(double, double, f64_f64)
METAADAMW_CONVERSIONS(double, float, f64_f32)
METAADAMW_CONVERSIONS(double, BFloat16, f64_bf16)
METAADAMW_CONVERSIONS(double, Half, f64_f16)
#undef METAADAMW_CONVERSIONS

// Calls f with a null pointer of the operand's element type. A float64 operand makes its row float64, so float never meets it.
template <typename T, typename F>
void with_element_type(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<Half*>(nullptr));
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    default:
      return f(static_cast<T*>(nullptr));
  }
}

template <typename T>
bool in_place(const Operand& x) {
  return x.dense && x.dtype == (std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float);
}

// The elements [begin, begin + count) of an operand: where they lie, or a copy in `buffer`; zeros if the row has no such operand.
template <typename T>
T* read(const Shape& shape, const Operand& x, int64_t begin, int count, T* buffer) {
  if (x.data == nullptr) {
    static T zeros[kBlock] = {};  // only ever read: an operand that is absent is never an output
    return zeros;
  }
  if (in_place<T>(x)) {
    return reinterpret_cast<T*>(x.data) + begin;
  }
  with_element_type<T>(x.dtype, [&](auto* type) {
    const auto* data = reinterpret_cast<decltype(type)>(x.data);
    if (x.dense) {
      load(data + begin, 1, count, buffer);
    } else {
      const int64_t stride = x.stride[shape.dims - 1];
      for_each_run(shape, x, begin, count,
                   [&](int64_t offset, int first, int n) { load(data + offset, stride, n, buffer + first); });
    }
  });
  return buffer;
}

// The way back. Nothing to do for elements that were changed where they lie.
template <typename T>
void write(const Shape& shape, const Operand& x, int64_t begin, int count, const T* buffer) {
  if (x.data == nullptr || in_place<T>(x)) {
    return;
  }
  with_element_type<T>(x.dtype, [&](auto* type) {
    auto* data = reinterpret_cast<decltype(type)>(x.data);
    if (x.dense) {
      store(buffer, 1, count, data + begin);
    } else {
      const int64_t stride = x.stride[shape.dims - 1];
      for_each_run(shape, x, begin, count,
                   [&](int64_t offset, int first, int n) { store(buffer + first, stride, n, data + offset); });
    }
  });
}

enum class Order { kForward, kBackward };

// Calls f(row, its number, chunk number, first element, number of elements) for every chunk, in parallel. Threads get equal
// shares of the elements, not of the chunks: a bias is a chunk too. The update goes backward through what the statistics went
// through forward: each thread then begins with what is still in its cache.
template <Order order, int N, typename F>
void for_each_chunk(const std::vector<Row<N>>& rows, const std::vector<int64_t>& first_chunk, const F& f) {
  const int64_t tensors = rows.size();
  std::vector<int64_t> first_element(tensors + 1, 0);
  for (int64_t t = 0; t < tensors; ++t) {
    first_element[t + 1] = first_element[t] + rows[t].numel;
  }
  const int64_t elements = first_element.back();
  // Waking a thread costs more than it saves below about a chunk of elements for each.
  const int64_t shares = std::min<int64_t>(torch::stable::get_num_threads(), std::max<int64_t>(elements / kChunk, 1));
  const auto first_of_share = [&](int64_t share) {
    const int64_t element = elements / shares * share;
    const int64_t t = std::upper_bound(first_element.begin(), first_element.end() - 1, element) - first_element.begin() - 1;
    return first_chunk[t] + (element - first_element[t]) / kChunk;
  };
  torch::stable::parallel_for(0, elements == 0 ? 0 : shares, 1, [&](int64_t first_share, int64_t last_share) {
    const int64_t begin = first_of_share(first_share);
    const int64_t end = last_share == shares ? first_chunk.back() : first_of_share(last_share);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t chunk = order == Order::kForward ? i : begin + end - 1 - i;
      const int64_t t = tensor_of_chunk(first_chunk.data(), tensors, chunk);
      const int64_t first = (chunk - first_chunk[t]) * kChunk;
      f(rows[t], t, chunk, first, std::min(kChunk, rows[t].numel - first));
    }
  });
}

// ------------------------------------------------------------------------------------------------------------- tensor_stats

enum { kGrad, kParam, kSecondMoment, kMomentum, kStatsOperands };  // the momentum leads: it is always given

template <typename T>
struct Lanes {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T)), aligned(sizeof(T)), may_alias));
};

// Adds the sums of n <= kBlock elements to `totals`. Products and lanes are in the arithmetic type, over kBlock / kLanes = 64
// additions at most; everything after that is float64.
template <bool counts, typename T>
METAADAMW_INLINE void block_sums(const T* g, const T* m, const T* p, const T* v, int n, double* totals) {
  using Vector = typename Lanes<T>::type;
  Vector sums[kSums] = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (const T* stream : {g, m, p, v}) {
      __builtin_prefetch(stream + i + kPrefetch);
    }
    accumulate<counts, Vector>(sums, *reinterpret_cast<const Vector*>(g + i), *reinterpret_cast<const Vector*>(m + i),
                               *reinterpret_cast<const Vector*>(p + i), *reinterpret_cast<const Vector*>(v + i));
  }
  if (i < n) {  // the tail, padded with zeros, which add nothing to any sum
    Vector tail[4] = {};
    const T* operands[4] = {g, m, p, v};
    for (int k = 0; k < 4; ++k) {
      std::memcpy(&tail[k], operands[k] + i, (n - i) * sizeof(T));
    }
    accumulate<counts, Vector>(sums, tail[0], tail[1], tail[2], tail[3]);
  }
  for (int s = 0; s < kSums; ++s) {
    for (int lane = 0; lane < kLanes; ++lane) {
      totals[s] += sums[s][lane];
    }
  }
}

#define METAADAMW_BLOCK_SUMS(T, counts)                                                                                    \
  METAADAMW_CLONES void block_sums_##T##_##counts(const T* g, const T* m, const T* p, const T* v, int n, double* totals) { \
    block_sums<counts, T>(g, m, p, v, n, totals);                                                                          \
  }
METAADAMW_BLOCK_SUMS(float, false)
METAADAMW_BLOCK_SUMS(float, true)
METAADAMW_BLOCK_SUMS(double, false)
METAADAMW_BLOCK_SUMS(double, true)
#undef METAADAMW_BLOCK_SUMS

void sum_block(const float* g, const float* m, const float* p, const float* v, int n, bool counts, double* totals) {
  (counts ? block_sums_float_true : block_sums_float_false)(g, m, p, v, n, totals);
}
void sum_block(const double* g, const double* m, const double* p, const double* v, int n, bool counts, double* totals) {
  (counts ? block_sums_double_true : block_sums_double_false)(g, m, p, v, n, totals);
}

template <typename T>
void sum_chunk(const Row<kStatsOperands>& row, int64_t first, int64_t count, bool counts, double* totals) {
  T buffers[kStatsOperands][kBlock];
  const T* x[kStatsOperands];
  for (int64_t done = 0; done < count; done += kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, count - done));
    for (int i = 0; i < kStatsOperands; ++i) {
      x[i] = read<T>(row.shape, row.operands[i], first + done, n, buffers[i]);
    }
    sum_block(x[kGrad], x[kMomentum], x[kParam], x[kSecondMoment], n, counts, totals);
  }
}

Tensor tensor_stats(std::vector<Tensor> grads, std::vector<Tensor> exp_avgs, std::optional<std::vector<Tensor>> params,
                    std::optional<std::vector<Tensor>> exp_avg_sqs, bool count_nonzero, ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "the statistics are float32 or float64");
  const std::array<List, kStatsOperands> lists{{{"grads", &grads, true, false},
                                                {"params", params ? &*params : nullptr, false, false},
                                                {"exp_avg_sqs", exp_avg_sqs ? &*exp_avg_sqs : nullptr, false, false},
                                                {"exp_avgs", &exp_avgs, false, false}}};
  const auto rows = make_rows<kStatsOperands>(lists, /*on_cuda=*/false);
  const auto first_chunk = chunk_offsets(rows);
  std::vector<std::array<double, kSums>> partials(first_chunk.back(), std::array<double, kSums>{});
  for_each_chunk<Order::kForward>(rows, first_chunk, [&](const auto& row, int64_t, int64_t chunk, int64_t first, int64_t count) {
    (row.is_double() ? sum_chunk<double> : sum_chunk<float>)(row, first, count, count_nonzero, partials[chunk].data());
  });

  std::vector<int> columns{kGradSquared, kGradMomentum, kMomentumSquared};
  if (params) columns.push_back(kParamSquared);
  if (exp_avg_sqs) columns.push_back(kSecondMomentSquared);
  if (count_nonzero) columns.insert(columns.end(), {kGradNonzero, kMomentumNonzero});
  const int64_t tensors = rows.size(), width = columns.size();
  Tensor result = torch::stable::empty({tensors, width}, dtype);
  const auto finish = [&](auto* out) {
    for (int64_t t = 0; t < tensors; ++t) {
      for (int64_t c = 0; c < width; ++c) {
        double total = 0.0;
        for (int64_t chunk = first_chunk[t]; chunk < first_chunk[t + 1]; ++chunk) {
          total += partials[chunk][columns[c]];
        }
        out[t * width + c] = total;
      }
    }
  };
  dtype == ScalarType::Double ? finish(static_cast<double*>(result.data_ptr())) : finish(static_cast<float*>(result.data_ptr()));
  return result;
}

// ------------------------------------------------------------------------------------------------------------ adamw_update_

enum { kUpdateGrad, kUpdateMomentum, kUpdateSecondMoment, kUpdateMaximum, kUpdateParam, kUpdateOperands };  // the parameter leads

template <bool amsgrad, typename T>
METAADAMW_INLINE void update_block(const Scalars<T>& scalars, const T* __restrict g, T* __restrict p, T* __restrict m,
                                   T* __restrict v, T* __restrict v_max, int n) {
  const Scalars<T> s = scalars;  // a local copy: nothing that the loop writes can change it
  for (int i = 0; i < n; ++i) {
    adamw_element<amsgrad, T>(s, g[i], p[i], m[i], v[i], v_max[i]);
  }
}

#define METAADAMW_UPDATE_BLOCK(T, amsgrad)                                                                                 \
  METAADAMW_CLONES void update_block_##T##_##amsgrad(const Scalars<T>& s, const T* g, T* p, T* m, T* v, T* v_max, int n) { \
    update_block<amsgrad, T>(s, g, p, m, v, v_max, n);                                                                     \
  }
METAADAMW_UPDATE_BLOCK(float, false)
METAADAMW_UPDATE_BLOCK(float, true)
METAADAMW_UPDATE_BLOCK(double, false)
METAADAMW_UPDATE_BLOCK(double, true)
#undef METAADAMW_UPDATE_BLOCK

void update(const Scalars<float>& s, const float* g, float* p, float* m, float* v, float* v_max, int n, bool amsgrad) {
  (amsgrad ? update_block_float_true : update_block_float_false)(s, g, p, m, v, v_max, n);
}
void update(const Scalars<double>& s, const double* g, double* p, double* m, double* v, double* v_max, int n, bool amsgrad) {
  (amsgrad ? update_block_double_true : update_block_double_false)(s, g, p, m, v, v_max, n);
}

// With `totals`, also adds the sums of the new v (as kGradSquared) and p (as kMomentumSquared) to it, as they were stored and by
// the very function that tensor_stats uses: a later pass over them would give the same bits.
template <typename T>
void update_chunk(const Row<kUpdateOperands>& row, const Hyperparameters& hyperparameters, int64_t first, int64_t count,
                  double* totals) {
  const Scalars<T> scalars = fold<T>(hyperparameters);
  T buffers[kUpdateOperands][kBlock];
  T* x[kUpdateOperands];
  const bool amsgrad = row.operands[kUpdateMaximum].data != nullptr;
  for (int64_t done = 0; done < count; done += kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, count - done));
    for (int i = 0; i < kUpdateOperands; ++i) {
      x[i] = i == kUpdateMaximum && !amsgrad ? buffers[i] : read<T>(row.shape, row.operands[i], first + done, n, buffers[i]);
    }
    update(scalars, x[kUpdateGrad], x[kUpdateParam], x[kUpdateMomentum], x[kUpdateSecondMoment], x[kUpdateMaximum], n, amsgrad);
    for (int i = kUpdateMomentum; i < kUpdateOperands; ++i) {
      write<T>(row.shape, row.operands[i], first + done, n, x[i]);
    }
    if (totals != nullptr) {
      const T* v = read<T>(row.shape, row.operands[kUpdateSecondMoment], first + done, n, buffers[kUpdateSecondMoment]);
      const T* p = read<T>(row.shape, row.operands[kUpdateParam], first + done, n, buffers[kUpdateParam]);
      sum_block(v, p, p, p, n, /*counts=*/false, totals);
    }
  }
}

void adamw_update_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                   std::vector<Tensor> exp_avg_sqs, std::optional<std::vector<Tensor>> max_exp_avg_sqs, Tensor step_size,
                   Tensor decay_factor, Tensor step, Tensor beta1, Tensor beta2, Tensor eps, std::optional<Tensor> grad_scale,
                   std::optional<Tensor> new_sums) {
  const std::array<List, kUpdateOperands> lists{{{"grads", &grads, false, false},
                                                 {"exp_avgs", &exp_avgs, false, true},
                                                 {"exp_avg_sqs", &exp_avg_sqs, false, true},
                                                 {"max_exp_avg_sqs", max_exp_avg_sqs ? &*max_exp_avg_sqs : nullptr, true, true},
                                                 {"params", &params, false, true}}};
  const auto rows = make_rows<kUpdateOperands>(lists, /*on_cuda=*/false);
  const auto first_chunk = chunk_offsets(rows);
  const int64_t tensors = rows.size();
  const double* step_sizes = hyperparameter(step_size, "step_size", tensors);
  const double* decay_factors = hyperparameter(decay_factor, "decay_factor", tensors);
  const double* steps = hyperparameter(step, "step", tensors);
  const double* beta1s = hyperparameter(beta1, "beta1", tensors);
  const double* beta2s = hyperparameter(beta2, "beta2", tensors);
  const double* epss = hyperparameter(eps, "eps", tensors);
  const double* grad_scales = grad_scale ? hyperparameter(*grad_scale, "grad_scale", tensors) : nullptr;
  if (new_sums) {
    STD_TORCH_CHECK(new_sums->scalar_type() == ScalarType::Double && new_sums->dim() == 2 && new_sums->size(0) == tensors &&
                        new_sums->size(1) == 2 && new_sums->is_contiguous() && new_sums->is_cpu(),
                    "new_sums must be a contiguous float64 tensor of shape [", tensors, ", 2]");
  }
  std::vector<std::array<double, kSums>> partials(new_sums ? first_chunk.back() : 0, std::array<double, kSums>{});
  for_each_chunk<Order::kBackward>(rows, first_chunk, [&](const auto& row, int64_t t, int64_t chunk, int64_t first, int64_t count) {
    const Hyperparameters h{
        step_sizes[t], decay_factors[t], steps[t], beta1s[t], beta2s[t], epss[t], grad_scales ? grad_scales[t] : 1.0};
    double* totals = new_sums ? partials[chunk].data() : nullptr;
    (row.is_double() ? update_chunk<double> : update_chunk<float>)(row, h, first, count, totals);
  });
  if (new_sums) {
    auto* out = static_cast<double*>(new_sums->data_ptr());
    for (int64_t t = 0; t < tensors; ++t) {
      out[2 * t] = out[2 * t + 1] = 0.0;
      for (int64_t chunk = first_chunk[t]; chunk < first_chunk[t + 1]; ++chunk) {
        out[2 * t] += partials[chunk][kMomentumSquared];
        out[2 * t + 1] += partials[chunk][kGradSquared];
      }
    }
  }
}

}  // namespace
}  // namespace metaadamw

STABLE_TORCH_LIBRARY_IMPL(metaadamw_fast, CPU, m) {
  m.impl("tensor_stats", TORCH_BOX(&metaadamw::tensor_stats));
  m.impl("adamw_update_", TORCH_BOX(&metaadamw::adamw_update_));
}
