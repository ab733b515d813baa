// Both ops of a rule on the CPU: one parallel region over a flat list of chunks, whatever the number of tensors.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <optional>

#include "checks.h"
#include "cpu_masters.h"
#include "cpu_sums.h"
#include "rounding.h"
#include "rules.h"

namespace metaadamw {
namespace {

enum class Order { kForward, kBackward };

// Calls f(row, its number, chunk number, first element, number of elements) for every chunk, in parallel. Threads get equal
// shares of the elements, not of the chunks: a bias is a chunk too. The update goes backward through what the statistics went
// through forward: each thread then begins with what is still in its cache.
template <Order order, int N, typename F>
void for_each_chunk(const Table<N>& table, const F& f) {
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

// ------------------------------------------------------------------------------------------------------------------ measure

// The sums [0, end) of a chunk; operands whose data is null count as zeros.
template <class R, typename T>
void measure_chunk(const Operand (&operands)[R::kOperands], int64_t first, int64_t count, int end, double* totals) {
  ChunkSums<R> sums(count, 0, end);
  bool in_pairs = (kRead<R> & 3) == 3 && end <= R::kFirstCount && count == 2 * sums.half();
  for (int i = 0; i < R::kOperands; ++i) {
    const Operand& x = operands[i];
    in_pairs = in_pairs && (i < 2 ? in_place<T>(x) && x.data != nullptr : x.data == nullptr);
  }
  if (in_pairs) {
    const T* x[2];
    for (int i = 0; i < 2; ++i) {
      x[i] = reinterpret_cast<const T*>(operands[i].data) + first;
    }
    for (int64_t done = 0; done < sums.half(); done += kBlock) {
      sum_pair<R>(x[0] + done, x[1] + done, sums.half(), end, sums.of_halves());
    }
  } else {
    T buffers[R::kOperands][kBlock];
    const T* x[R::kOperands];
    constexpr bool counts = R::kFirstCount < R::kSums;
    const auto sum = end > R::kFirstCount ? sum_block<R, counts, T> : sum_block<R, false, T>;
    for (int64_t done = 0; done < count; done += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(kBlock, count - done));
      for (int i = 0; i < R::kOperands; ++i) {
        x[i] = read<T>(operands[i], first + done, n, buffers[i]);
      }
      sum(x, n, 0, end, sums.of_block(done));
    }
  }
  sums.add_to(totals);
}

// The sums of all rows for which `mask` has a bit, and the carried ones if they are given: [T, count], float32 or float64.
template <class R>
Tensor measure(const Header& header, void* memory, int mask, ScalarType dtype, const std::optional<Tensor>& carried) {
  const Table<kOperandsOf<R>> table(header, static_cast<char*>(memory));
  const double* carried_sums = check_measured<R>(header, mask, carried, dtype);
  const int reads = reads_of<R>(mask);
  int end = 0;
  while (mask >> end != 0) ++end;
  std::vector<std::array<double, R::kSums>> partials(table.chunks, std::array<double, R::kSums>{});
  for_each_chunk<Order::kForward>(table, [&](const auto& row, int64_t, int64_t chunk, int64_t first, int64_t count) {
    Operand operands[R::kOperands];
    for (int i = 0; i < R::kOperands; ++i) {
      operands[i] = Operand(table, row, i);
      if (!(reads >> i & 1)) operands[i].data = nullptr;
    }
    (row.is_double ? measure_chunk<R, double> : measure_chunk<R, float>)(operands, first, count, end, partials[chunk].data());
  });

  const Columns<R> columns(carried ? mask | kCarriedMask<R> : mask);
  Tensor result = torch::stable::empty({table.tensors, columns.count}, dtype);
  const auto finish = [&](auto* out) {
    for (int64_t t = 0; t < table.tensors; ++t) {
      for (int c = 0; c < columns.count; ++c) {
        const int sum = columns.sum[c];
        double total = 0.0;
        if (carried_sums != nullptr && is_carried<R>(sum)) {
          total = carried_sums[t * kCarriedSums<R> + sum - R::kFirstLeft];
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

// ------------------------------------------------------------------------------------------------------------------- update

// Sums from R::kFirstLeft on are of what it leaves, those before, if `found`, of what it finds; all with the bits of sum_block.
// Adds sums [begin, end) to `totals`. With `optional` there is the last operand, if the rule's is optional.
template <class R, bool optional, bool found, typename T>
METAADAMW_CLONES void update_block(const typename R::template Scalars<T>& scalars, T* const* operands, int n, int begin, int end,
                                   LaneSums<R>& totals) {
  using Vector = typename Lanes<T>::type;
  constexpr int kUsed = R::kOperands - (R::kLastIsOptional && !optional);
  T* at[kUsed];
  std::copy_n(operands, kUsed, at);
  const typename R::template Scalars<T> s = scalars;  // local copies: nothing that the loop writes can change them
  Vector sums[R::kSums] = {};
  const int ahead = kPrefetch;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vector x[R::kOperands];
    for (int k = 0; k < kUsed; ++k) {
      __builtin_prefetch(at[k] + i + ahead);
      x[k] = lanes_at(at[k] + i);
    }
    if constexpr (found) {
      R::accumulate_found(sums, x);
    }
    R::template update<optional>(s, x);
    for (int k = kGrad + 1; k < kUsed; ++k) {
      lanes_at(at[k] + i) = x[k];
    }
    R::accumulate_left(sums, x);
  }
  if (i < n) {  // the tail, padded with zeros
    Vector x[R::kOperands] = {}, left[R::kOperands] = {};
    for (int k = 0; k < kUsed; ++k) {
      std::memcpy(&x[k], at[k] + i, (n - i) * sizeof(T));
    }
    if constexpr (found) {
      R::accumulate_found(sums, x);
    }
    R::template update<optional>(s, x);
    for (int k = kGrad + 1; k < kUsed; ++k) {
      std::memcpy(at[k] + i, &x[k], (n - i) * sizeof(T));
      std::memcpy(&left[k], &x[k], (n - i) * sizeof(T));  // what became of the padding does not count
    }
    R::accumulate_left(sums, left);
  }
  add_lanes<R>(sums, begin, end, totals);
}

template <typename T>
METAADAMW_CLONES void round_block(T* x, int n, ElementType type, uint32_t key, uint32_t first_element) {
  for (int i = 0; i < n; ++i) x[i] = round_stochastically(x[i], type, random_bits(key, first_element + i));
}

// The keys of stochastic rounding of one chunk; without, no key is used.
template <class R>
struct RoundingKeys {
  bool used;
  uint32_t of[R::kOperands];

  RoundingKeys(const Update& update, int64_t t, int64_t first) : used(update.stochastic) {
    for (int i = 0; i < R::kOperands && used; ++i) {
      of[i] = rounding_key(update.rounding_seed, update.at(R::kStep, t), t, i, first);
    }
  }
};

// Adds the sums of what it finds and, as it was stored, of what it leaves to `totals`, from sum `first_sum` on.
template <class R, typename T>
void update_chunk(const Operand (&operands)[kOperandsOf<R>], const typename R::template Scalars<T>& scalars,
                  const RoundingKeys<R>& keys, int64_t first, int64_t count, int first_sum, double* totals) {
  T buffers[R::kOperands][kBlock];
  T* x[R::kOperands];
  const Operand& low_precision = operands[R::kOperands];
  const bool with_last = !R::kLastIsOptional || operands[R::kOperands - 1].data != nullptr;
  const int used = R::kOperands - !with_last;
  // Otherwise elements are rounded on their way out of a buffer, and summed up after that.
  bool as_stored = true;
  constexpr int left = reads_of<R>(R::kFirstLeft, R::kUpdateSums);
  for (int i = 0; i < R::kOperands; ++i) {
    as_stored = as_stored && (!(left >> i & 1) || in_place<T>(operands[i]));
  }
  const int end_sum = totals == nullptr ? first_sum : as_stored ? R::kUpdateSums : R::kFirstLeft;
  const bool found = first_sum < R::kFirstLeft && end_sum > first_sum;
  constexpr bool lacks = R::kLastIsOptional, finds = R::kFirstLeft > 0;  // whether there are such loops
  const auto update = with_last ? (found ? update_block<R, true, finds, T> : update_block<R, true, false, T>)
                                : (found ? update_block<R, !lacks, finds, T> : update_block<R, !lacks, false, T>);
  ChunkSums<R> sums(count, first_sum, R::kUpdateSums);
  for (int64_t done = 0; done < count; done += kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, count - done));
    for (int i = 0; i < used; ++i) {
      x[i] = read<T>(operands[i], first + done, n, buffers[i]);
    }
    if (low_precision.data != nullptr) {
      take_up(low_precision, first + done, n, x[R::kParam]);
    }
    LaneSums<R>& of_block = sums.of_block(done);
    update(scalars, x, n, first_sum, end_sum, of_block);
    for (int i = kGrad + 1; i < used; ++i) {
      if (keys.used && R::kRoundedStochastically >> i & 1 && itemsize(operands[i].type) == 2) {
        round_block(x[i], n, operands[i].type, keys.of[i], static_cast<uint32_t>(first + done));
      }
      write<T>(operands[i], first + done, n, x[i]);
    }
    write<T>(low_precision, first + done, n, x[R::kParam]);
    if (totals != nullptr && !as_stored) {
      const T* stored[R::kOperands];
      for (int i = 0; i < R::kOperands; ++i) {
        stored[i] = left >> i & 1 ? read<T>(operands[i], first + done, n, buffers[i]) : zeros<T>();
      }
      sum_block<R, false>(stored, n, R::kFirstLeft, R::kUpdateSums, of_block);
    }
  }
  if (totals != nullptr) {
    sums.add_to(totals);
  }
}

template <class R>
void update(const Header& header, void* memory, const Update& vectors, const NewSums<R>& new_sums) {
  const Table<kOperandsOf<R>> table(header, static_cast<char*>(memory));
  std::vector<std::array<double, R::kSums>> partials(new_sums.data != nullptr ? table.chunks : 0, std::array<double, R::kSums>{});
  const auto skips = [&](int64_t t) { return table.rows[t].lacks_gradient() || vectors.at(R::kStep, t) == 0.0; };
  for_each_chunk<Order::kBackward>(table, [&](const auto& row, int64_t t, int64_t chunk, int64_t first, int64_t count) {
    if (skips(t)) {
      return;
    }
    Operand operands[kOperandsOf<R>];
    for (int i = 0; i < kOperandsOf<R>; ++i) {
      operands[i] = Operand(table, row, i);
    }
    double* totals = new_sums.data != nullptr ? partials[chunk].data() : nullptr;
    const RoundingKeys<R> keys(vectors, t, first);
    if (row.is_double) {
      update_chunk<R, double>(operands, R::template scalars<double>(vectors, t), keys, first, count, new_sums.first(), totals);
    } else {
      update_chunk<R, float>(operands, R::template scalars<float>(vectors, t), keys, first, count, new_sums.first(), totals);
    }
  });
  for (int64_t t = 0; t < table.tensors && new_sums.data != nullptr; ++t) {
    if (skips(t)) {
      continue;
    }
    for (int s = new_sums.first(); s < R::kUpdateSums; ++s) {
      double& total = new_sums.at(t, s) = 0.0;
      for (int64_t chunk = table.first_chunk[t]; chunk < table.first_chunk[t + 1]; ++chunk) {
        total += partials[chunk][s];
      }
    }
  }
}

}  // namespace
}  // namespace metaadamw
