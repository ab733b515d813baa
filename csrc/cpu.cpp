// The ops on the CPU: one parallel region over a flat list of chunks, whatever the number of tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstring>
#include <optional>

#include "checks.h"
#include "cpu_blocks.h"
#include "cpu_sums.h"
#include "policy_checks.h"
#include "rounding.h"

namespace metaadamw {
namespace {

enum class Order { kForward, kBackward };

// Calls f(row, its number, chunk number, first element, number of elements) for every chunk, in parallel. Threads get equal
// shares of the elements, not of the chunks: a bias is a chunk too. The update goes backward through what the statistics went
// through forward: each thread then begins with what is still in its cache.
template <Order order, typename F>
void for_each_chunk(const Table& table, const F& f) {
  std::vector<int64_t> first_element(table.tensors + 1, 0);
  for (int64_t t = 0; t < table.tensors; ++t) {
    first_element[t + 1] = first_element[t] + table.rows[t].numel;
  }
  const int64_t elements = first_element.back();
  // Waking a thread costs more than it saves below about a chunk of elements for each.
  const int64_t shares = std::min<int64_t>(torch::stable::get_num_threads(), std::max<int64_t>(elements / table.chunk_size, 1));
  const auto first_of_share = [&](int64_t share) {
    const int64_t element = elements / shares * share;
    const int64_t t = std::upper_bound(first_element.begin(), first_element.end() - 1, element) - first_element.begin() - 1;
    return table.first_chunk[t] + (element - first_element[t]) / table.chunk_size;
  };
  torch::stable::parallel_for(0, elements == 0 ? 0 : shares, 1, [&](int64_t first_share, int64_t last_share) {
    const int64_t begin = first_of_share(first_share);
    const int64_t end = last_share == shares ? table.chunks : first_of_share(last_share);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t chunk = order == Order::kForward ? i : begin + end - 1 - i;
      const int64_t t = table.tensor_of_chunk[chunk];
      const int64_t first = (chunk - table.first_chunk[t]) * table.chunk_size;
      f(table.rows[t], t, chunk, first, std::min(table.chunk_size, table.rows[t].numel - first));
    }
  });
}

// ------------------------------------------------------------------------------------------------------------- tensor_stats

template <typename T>
void sum_chunk(const std::array<Operand, 4>& operands, int64_t first, int64_t count, bool counts, double* totals) {
  const auto& [g, m, p, v] = operands;
  const int end = counts ? kSums : p.data != nullptr || v.data != nullptr ? kUpdateSums : kParamSquared;
  ChunkSums sums(count, 0, end);
  const bool in_pairs = in_place<T>(g) && in_place<T>(m) && g.data != nullptr && p.data == nullptr && v.data == nullptr &&
                        !counts && count == 2 * sums.half();
  if (in_pairs) {
    const T *x = reinterpret_cast<const T*>(g.data) + first, *y = reinterpret_cast<const T*>(m.data) + first;
    for (int64_t done = 0; done < sums.half(); done += kBlock) {
      sum_pair(x + done, y + done, sums.half(), sums.of_halves());
    }
  } else {
    T buffers[4][kBlock];
    const T* x[4];
    for (int64_t done = 0; done < count; done += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(kBlock, count - done));
      for (int i = 0; i < 4; ++i) {
        x[i] = read<T>(operands[i], first + done, n, buffers[i]);
      }
      sum_block(x[0], x[1], x[2], x[3], n, 0, end, sums.of_block(done));
    }
  }
  sums.add_to(totals);
}

Tensor tensor_stats(const Header& header, const Table& table, bool params, bool exp_avg_sqs, bool count_nonzero, ScalarType dtype,
                    const std::optional<Tensor>& carried = std::nullopt) {
  const double* carried_sums = check_columns(header, params, exp_avg_sqs, carried, dtype);
  std::vector<std::array<double, kSums>> partials(table.chunks, std::array<double, kSums>{});
  for_each_chunk<Order::kForward>(table, [&](const Row& row, int64_t, int64_t chunk, int64_t first, int64_t count) {
    std::array<Operand, 4> operands{Operand(table, row, kGrad), Operand(table, row, kMomentum), Operand(table, row, kParam),
                                    Operand(table, row, kSecondMoment)};
    if (!params) operands[2].data = nullptr;
    if (!exp_avg_sqs) operands[3].data = nullptr;
    (row.is_double ? sum_chunk<double> : sum_chunk<float>)(operands, first, count, count_nonzero, partials[chunk].data());
  });

  const Columns columns(params || carried, exp_avg_sqs || carried, count_nonzero);
  Tensor result = torch::stable::empty({table.tensors, columns.count}, dtype);
  const auto finish = [&](auto* out) {
    for (int64_t t = 0; t < table.tensors; ++t) {
      for (int c = 0; c < columns.count; ++c) {
        const int sum = columns.sum[c];
        double total = 0.0;
        if (carried_sums != nullptr && is_carried(sum)) {
          total = carried_sums[t * kCarriedSums + sum - kParamSquared];
        } else {
          for (int64_t chunk = table.first_chunk[t]; chunk < table.first_chunk[t + 1]; ++chunk) {
            total += partials[chunk][sum];
          }
        }
        *out++ = total;
      }
    }
  };
  dtype == ScalarType::Double ? finish(static_cast<double*>(result.data_ptr())) : finish(static_cast<float*>(result.data_ptr()));
  return result;
}

// ------------------------------------------------------------------------------------------------------------ adamw_update_

template <typename T>
METAADAMW_INLINE typename Lanes<T>::type& lanes_at(T* x) {
  return *reinterpret_cast<typename Lanes<T>::type*>(x);
}

// The sums of p and v are of what it leaves there, those of g and m, if `found`, of what it finds; all with the bits of block_sums.
// Adds sums [begin, end) to `totals`.
template <bool amsgrad, bool found, typename T>
METAADAMW_INLINE void update_block(const Scalars<T>& scalars, const T* g, T* p, T* m, T* v, T* v_max, int n, int begin, int end,
                                   LaneSums& totals) {
  using Vector = typename Lanes<T>::type;
  const Scalars<T> s = scalars;  // a local copy: nothing that the loop writes can change it
  Vector sums[kSums] = {};
  const int ahead = kPrefetch;
  const auto element = [&](Vector grad, Vector& param, Vector& exp_avg, Vector& exp_avg_sq, Vector& maximum) {
    if constexpr (found) {
      accumulate_found(sums, grad, exp_avg);
    }
    adamw_element<amsgrad>(s, grad, param, exp_avg, exp_avg_sq, maximum);
  };
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (const T* stream : {g, static_cast<const T*>(p), static_cast<const T*>(m), static_cast<const T*>(v)}) {
      __builtin_prefetch(stream + i + ahead);
    }
    Vector x = lanes_at(p + i), y = lanes_at(v + i);
    element(lanes_at(const_cast<T*>(g) + i), x, lanes_at(m + i), y, lanes_at(v_max + i));
    lanes_at(p + i) = x;
    lanes_at(v + i) = y;
    accumulate_left(sums, x, y);
  }
  if (i < n) {  // the tail, padded with zeros
    T* const streams[kComputed] = {const_cast<T*>(g), m, p, v, v_max};
    Vector x[kComputed] = {}, left[kComputed] = {};
    for (int k = 0; k < kComputed; ++k) {
      std::memcpy(&x[k], streams[k] + i, (n - i) * sizeof(T));
    }
    element(x[kGrad], x[kParam], x[kMomentum], x[kSecondMoment], x[kMaximum]);
    for (int k = kGrad + 1; k < (amsgrad ? kComputed : kMaximum); ++k) {
      std::memcpy(streams[k] + i, &x[k], (n - i) * sizeof(T));
      std::memcpy(&left[k], &x[k], (n - i) * sizeof(T));  // what became of the padding does not count
    }
    accumulate_left(sums, left[kParam], left[kSecondMoment]);
  }
  add_lanes(sums, begin, end, totals);
}

#define METAADAMW_UPDATE_BLOCK(T, amsgrad, found)                                                                                  \
  METAADAMW_CLONES void update_block_##T##_##amsgrad##_##found(const Scalars<T>& s, const T* g, T* p, T* m, T* v, T* v_max, int n, \
                                                               int begin, int end, LaneSums& totals) {                             \
    update_block<amsgrad, found, T>(s, g, p, m, v, v_max, n, begin, end, totals);                                                  \
  }
#define METAADAMW_UPDATE(T)                                                                                         \
  METAADAMW_UPDATE_BLOCK(T, false, false)                                                                           \
  METAADAMW_UPDATE_BLOCK(T, false, true)                                                                            \
  METAADAMW_UPDATE_BLOCK(T, true, false)                                                                            \
  METAADAMW_UPDATE_BLOCK(T, true, true)                                                                             \
  void update(const Scalars<T>& s, const T* g, T* p, T* m, T* v, T* v_max, int n, bool amsgrad, int begin, int end, \
              LaneSums& totals) {                                                                                   \
    const bool found = begin < kParamSquared && end > begin;                                                        \
    const auto maximum = found ? update_block_##T##_true_true : update_block_##T##_true_false;                      \
    const auto plain = found ? update_block_##T##_false_true : update_block_##T##_false_false;                      \
    (amsgrad ? maximum : plain)(s, g, p, m, v, v_max, n, begin, end, totals);                                       \
  }
METAADAMW_UPDATE(float)
METAADAMW_UPDATE(double)
#undef METAADAMW_UPDATE
#undef METAADAMW_UPDATE_BLOCK

#define METAADAMW_ROUND_BLOCK(T)                                                                              \
  METAADAMW_CLONES void round_block(T* x, int n, ElementType type, uint32_t key, uint32_t first_element) {    \
    for (int i = 0; i < n; ++i) x[i] = round_stochastically(x[i], type, random_bits(key, first_element + i)); \
  }
METAADAMW_ROUND_BLOCK(float)
METAADAMW_ROUND_BLOCK(double)
#undef METAADAMW_ROUND_BLOCK

#define METAADAMW_START_BLOCK(T, S)                                                                              \
  METAADAMW_CLONES void start_block_of_##T(T* master, const S* low, int n) {                                     \
    for (int i = 0; i < n; ++i) {                                                                                \
      master[i] = start_of_update(master[i], static_cast<T>(static_cast<S>(master[i])), static_cast<T>(low[i])); \
    }                                                                                                            \
  }
METAADAMW_START_BLOCK(double, BFloat16)
METAADAMW_START_BLOCK(double, Half)
METAADAMW_START_BLOCK(float, Half)
#undef METAADAMW_START_BLOCK

template <typename S>
void start_block(double* master, const S* low, int n) {
  start_block_of_double(master, low, n);
}

// Rounded in words without a branch for NaN, which start_of_update is told of by `rounded`: so the compiler makes vectors of it.
METAADAMW_CLONES void start_block(float* master, const BFloat16* low, int n) {
  for (int i = 0; i < n; ++i) {
    uint32_t bits, low_bits = static_cast<uint32_t>(low[i].x) << 16;
    std::memcpy(&bits, master + i, sizeof bits);
    bits = (bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u;
    float rounded, written;
    std::memcpy(&rounded, &bits, sizeof rounded);
    std::memcpy(&written, &low_bits, sizeof written);
    const float x = master[i];
    master[i] = start_of_update(x, x == x ? rounded : x, written);
  }
}

#ifdef METAADAMW_HAS_CLONES
__attribute__((target("avx2,f16c"))) int start_block_f16c(float* master, const Half* low, int n) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 x = _mm256_loadu_ps(master + i);
    const __m256 rounded = _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    const __m256 written = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low + i)));
    const __m256 both_nan =
        _mm256_and_ps(_mm256_cmp_ps(rounded, rounded, _CMP_UNORD_Q), _mm256_cmp_ps(written, written, _CMP_UNORD_Q));
    const __m256 kept = _mm256_or_ps(_mm256_cmp_ps(rounded, written, _CMP_EQ_OQ), both_nan);
    _mm256_storeu_ps(master + i, _mm256_blendv_ps(written, x, kept));
  }
  return i;
}
#endif
void start_block(float* master, const Half* low, int n) {
  int done = 0;
#ifdef METAADAMW_HAS_CLONES
  done = has_f16c ? start_block_f16c(master, low, n) : 0;
#endif
  start_block_of_float(master + done, low + done, n - done);
}

// What the update of n <= kBlock elements starts from, in place of their masters.
template <typename T>
void take_up(const Operand& low_precision, int64_t first, int n, T* master) {
  const auto choose = [&](auto zero) {
    using Low = decltype(zero);
    Low gathered[kBlock];
    const Low* low = reinterpret_cast<const Low*>(low_precision.data) + first;
    if (!low_precision.dense) {
      T buffer[kBlock];
      store(read<T>(low_precision, first, n, buffer), 1, n, gathered);
      low = gathered;
    }
    for (int i = 0; i < n; i += 32) {  // a line of the cache at a time
      __builtin_prefetch(low + i + kPrefetch);
    }
    start_block(master, low, n);
  };
  low_precision.type == ElementType::kBFloat16 ? choose(BFloat16()) : choose(Half());
}

// The keys of stochastic rounding of one chunk; without, no key is used.
struct RoundingKeys {
  bool used;
  uint32_t of[kComputed];

  RoundingKeys(const Update& update, int64_t t, int64_t first) : used(update.stochastic) {
    for (int i = 0; i < kComputed && used; ++i) {
      of[i] = rounding_key(update.rounding_seed, update.at(kStep, t), t, i, first);
    }
  }
};

// Adds the sums of g and m as they were and of p and v as they were stored to `totals`, from sum `first_sum` on.
template <typename T>
void update_chunk(const std::array<Operand, kOperands>& operands, const Scalars<T>& scalars, const RoundingKeys& keys,
                  int64_t first, int64_t count, int first_sum, double* totals) {
  T buffers[kComputed][kBlock];
  T* x[kComputed];
  const Operand& low_precision = operands[kLowPrecision];
  const bool amsgrad = operands[kMaximum].data != nullptr;
  // Otherwise elements are rounded on their way out of a buffer, and summed up after that.
  const bool as_stored = in_place<T>(operands[kParam]) && in_place<T>(operands[kSecondMoment]);
  const int end_sum = totals == nullptr ? first_sum : as_stored ? kUpdateSums : kParamSquared;
  ChunkSums sums(count, first_sum, kUpdateSums);
  for (int64_t done = 0; done < count; done += kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, count - done));
    for (int i = 0; i < kComputed; ++i) {
      x[i] = i == kMaximum && !amsgrad ? buffers[i] : read<T>(operands[i], first + done, n, buffers[i]);
    }
    if (low_precision.data != nullptr) {
      take_up(low_precision, first + done, n, x[kParam]);
    }
    LaneSums& of_block = sums.of_block(done);
    update(scalars, x[kGrad], x[kParam], x[kMomentum], x[kSecondMoment], x[kMaximum], n, amsgrad, first_sum, end_sum, of_block);
    for (int i = kGrad + 1; i < kComputed; ++i) {
      if (keys.used && is_rounded_stochastically(i) && itemsize(operands[i].type) == 2) {
        round_block(x[i], n, operands[i].type, keys.of[i], static_cast<uint32_t>(first + done));
      }
      write<T>(operands[i], first + done, n, x[i]);
    }
    write<T>(low_precision, first + done, n, x[kParam]);
    if (totals != nullptr && !as_stored) {
      const T* p = read<T>(operands[kParam], first + done, n, buffers[kParam]);
      const T* v = read<T>(operands[kSecondMoment], first + done, n, buffers[kSecondMoment]);
      sum_block(zeros<T>(), zeros<T>(), p, v, n, kParamSquared, kUpdateSums, of_block);
    }
  }
  if (totals != nullptr) {
    sums.add_to(totals);
  }
}

void adamw_update_(const Table& table, const Update& update, const NewSums& new_sums) {
  std::vector<std::array<double, kSums>> partials(new_sums.data != nullptr ? table.chunks : 0, std::array<double, kSums>{});
  for_each_chunk<Order::kBackward>(table, [&](const Row& row, int64_t t, int64_t chunk, int64_t first, int64_t count) {
    if (row.lacks_gradient() || update.skips(t)) {
      return;
    }
    static_assert(kOperands == 6);
    const std::array<Operand, kOperands> operands{Operand(table, row, 0), Operand(table, row, 1), Operand(table, row, 2),
                                                  Operand(table, row, 3), Operand(table, row, 4), Operand(table, row, 5)};
    double* totals = new_sums.data != nullptr ? partials[chunk].data() : nullptr;
    const RoundingKeys keys(update, t, first);
    if (row.is_double) {
      update_chunk(operands, scalars_of<double>(update, t), keys, first, count, new_sums.first(), totals);
    } else {
      update_chunk(operands, scalars_of<float>(update, t), keys, first, count, new_sums.first(), totals);
    }
  });
  for (int64_t t = 0; t < table.tensors && new_sums.data != nullptr; ++t) {
    if (table.rows[t].lacks_gradient() || update.skips(t)) {
      continue;
    }
    for (int s = new_sums.first(); s < kUpdateSums; ++s) {
      double& total = new_sums.at(t, s) = 0.0;
      for (int64_t chunk = table.first_chunk[t]; chunk < table.first_chunk[t + 1]; ++chunk) {
        total += partials[chunk][s];
      }
    }
  }
}

// --------------------------------------------------------------------------------------- as ops of torch (see ops.cpp)

// A table in memory of its own or in a tensor.
struct HostTable {
  const Header& header;
  const Table table;
  explicit HostTable(void* memory) : header(*static_cast<Header*>(memory)), table(header, static_cast<char*>(memory)) {}
};

Tensor launch_tensor_stats(Tensor table, std::optional<Tensor>, bool params, bool exp_avg_sqs, bool count_nonzero, ScalarType dtype,
                           std::optional<Tensor> carried) {
  const HostTable host(table.data_ptr());
  return tensor_stats(host.header, host.table, params, exp_avg_sqs, count_nonzero, dtype, carried);
}

void launch_adamw_update_(Tensor table, std::optional<Tensor>, Tensor vectors, std::optional<Tensor> new_sums,
                          std::optional<int64_t> rounding_seed) {
  const HostTable host(table.data_ptr());
  adamw_update_(host.table, checked_update(vectors, rounding_seed, host.header), sums_output(new_sums, host.header));
}

Tensor list_tensor_stats(std::vector<Tensor> grads, std::vector<Tensor> exp_avgs, List params, List exp_avg_sqs, bool count_nonzero,
                         ScalarType dtype) {
  const bool with_params = params.has_value(), with_squares = exp_avg_sqs.has_value();
  auto memory = make_table(
      Lists{{std::move(grads), std::move(exp_avgs), std::move(params), std::move(exp_avg_sqs), std::nullopt}, /*written=*/false},
      kChunkOnCpu);
  const HostTable host(memory.data());
  return tensor_stats(host.header, host.table, with_params, with_squares, count_nonzero, dtype);
}

void list_adamw_update_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                        std::vector<Tensor> exp_avg_sqs, List max_exp_avg_sqs, Tensor step_size, Tensor decay_factor, Tensor step,
                        Tensor beta1, Tensor beta2, Tensor eps, std::optional<Tensor> grad_scale, std::optional<Tensor> new_sums,
                        std::optional<int64_t> rounding_seed, List low_precision_params) {
  auto memory = make_table(Lists{{std::move(grads), std::move(exp_avgs), std::move(params), std::move(exp_avg_sqs),
                                  std::move(max_exp_avg_sqs), std::move(low_precision_params)},
                                 /*written=*/true},
                           kChunkOnCpu);
  const HostTable host(memory.data());
  const Tensor vectors = vectors_on_cpu(
      hyperparameter_input(step_size, decay_factor, step, beta1, beta2, eps, grad_scale, host.header.tensors, host.header.device));
  adamw_update_(host.table, checked_update(vectors, rounding_seed, host.header), sums_output(new_sums, host.header));
}

}  // namespace
}  // namespace metaadamw

STABLE_TORCH_LIBRARY_IMPL(metaadamw_fast, CPU, m) {
  m.impl("tensor_stats", TORCH_BOX(&metaadamw::list_tensor_stats));
  m.impl("adamw_update_", TORCH_BOX(&metaadamw::list_adamw_update_));
  m.impl("launch_tensor_stats", TORCH_BOX(&metaadamw::launch_tensor_stats));
  m.impl("launch_adamw_update_", TORCH_BOX(&metaadamw::launch_adamw_update_));
}
