// Both ops of a rule on the CPU: one parallel region over a flat list of chunks, whatever the number of tensors. A little longer
// than 300 lines: an update that sums what it finds measures the rows that it leaves alone, so the two share how a chunk is walked.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <iterator>
#include <optional>
#include <utility>

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

// The operands of a row. With `exchanged` two of them have changed roles, if the row has both.
template <class R>
std::array<Operand, kOperandsOf<R>> operands_of(const Table<kOperandsOf<R>>& table, const Row<kOperandsOf<R>>& row,
                                                bool exchanged) {
  std::array<Operand, kOperandsOf<R>> operands;
  for (int i = 0; i < kOperandsOf<R>; ++i) {
    operands[i] = Operand(table, row, i);
  }
  if constexpr (kExchanges<R>) {
    Operand &a = operands[R::kExchanged[0]], &b = operands[R::kExchanged[1]];
    if (exchanged && a.data != nullptr && b.data != nullptr) {
      std::swap(a, b);
    }
  }
  return operands;
}

// The sums [0, end) of a chunk; operands that are not in `wanted`, or whose data is null, count as zeros.
template <class R, typename T>
void measure_chunk(std::array<Operand, kOperandsOf<R>> operands, int wanted, const typename R::template Measured<T>& measured,
                   int64_t first, int64_t count, int end, double* totals) {
  ChunkSums<R> sums(count, 0, end);
  bool in_pairs = (kRead<R, 0> & 3) == 3 && end <= R::kFirstExtra && count == 2 * sums.half();
  for (int i = 0; i < R::kOperands; ++i) {
    Operand& x = operands[i];
    x.data = wanted >> i & 1 ? x.data : nullptr;
    in_pairs = in_pairs && (i < 2 ? in_place<T>(x) && x.data != nullptr : x.data == nullptr);
  }
  if (in_pairs) {
    const T* x[2];
    for (int i = 0; i < 2; ++i) {
      x[i] = reinterpret_cast<const T*>(operands[i].data) + first;
    }
    for (int64_t done = 0; done < sums.half(); done += kBlock) {
      sum_pair<R, T>(measured, x[0] + done, x[1] + done, sums.half(), end, sums.of_halves());
    }
  } else {
    T buffers[R::kOperands][kBlock];
    const T* x[R::kOperands];
    const auto sum = end > R::kFirstExtra ? sum_block<R, R::kSums, T> : sum_block<R, 0, T>;
    for (int64_t done = 0; done < count; done += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(kBlock, count - done));
      for (int i = 0; i < R::kOperands; ++i) {
        x[i] = read<T>(operands[i], first + done, n, buffers[i]);
      }
      sum(measured, x, n, 0, end, sums.of_block(done));
    }
  }
  sums.add_to(totals);
}

// The same of a row, in the type of its arithmetic. The update before is half `half` of the vectors, which are read if there are
// any.
template <class R>
void measure_chunk(const Table<kOperandsOf<R>>& table, const Row<kOperandsOf<R>>& row, int64_t t, const Update& vectors, int half,
                   int64_t first, int64_t count, int mask, double* totals) {
  if (R::kAllNeedGradient && row.lacks_gradient()) {
    return;
  }
  int end = 0;
  while (mask >> end != 0) ++end;
  const auto operands = operands_of<R>(table, row, vectors.vectors != nullptr && R::exchanged(vectors, t, half == 0));
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto measured =
        vectors.vectors != nullptr ? R::template measured<T>(vectors, half, t) : typename R::template Measured<T>{};
    measure_chunk<R, T>(operands, reads_of<R>(mask), measured, first, count, end, totals);
  };
  row.is_double ? run(0.0) : run(0.0f);
}

// The sums of all rows for which `mask` has a bit, and the carried ones if they are given: [T, count], float32 or float64.
template <class R>
Tensor measure(const Header& header, void* memory, int mask, ScalarType dtype, const std::optional<Tensor>& carried,
               const std::optional<Tensor>& vectors) {
  const Table<kOperandsOf<R>> table(header, static_cast<char*>(memory));
  const double* carried_sums = check_measured<R>(header, mask, carried, dtype);
  const Update last = measured_update<R>(vectors, mask, header);
  std::vector<std::array<double, R::kSums>> partials(table.chunks, std::array<double, R::kSums>{});
  for_each_chunk<Order::kForward>(table, [&](const auto& row, int64_t t, int64_t chunk, int64_t first, int64_t count) {
    measure_chunk<R>(table, row, t, last, 0, first, count, mask, partials[chunk].data());
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

// Adds sums [begin, end) to `totals`, with the bits of sum_block: of what it finds, if `found` says how many, else of what it
// leaves. Operands in `without` (bit i: operand i), of R::kWithout, count as zeros and are not written.
template <class R, int without, int found, typename T>
METAADAMW_CLONES void update_block(const typename R::template Scalars<T>& scalars, const typename R::template Measured<T>& measured,
                                   T* const* operands, int n, int begin, int end, LaneSums<R>& totals) {
  using Vector = typename Lanes<T>::type;
  constexpr bool with_last = !(without >> (R::kOperands - 1) & 1);
  constexpr int written = R::kWritten & ~without;
  T* at[R::kOperands];
  for (int k = 0; k < R::kOperands; ++k) {
    if (!(without >> k & 1)) at[k] = operands[k];
  }
  const typename R::template Scalars<T> s = scalars;  // local copies: nothing that the loop writes can change them
  const typename R::template Measured<T> last = measured;
  Vector sums[R::kSums] = {};
  const int ahead = kPrefetch;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vector x[R::kOperands] = {};
    for (int k = 0; k < R::kOperands; ++k) {
      if (!(without >> k & 1)) {
        __builtin_prefetch(at[k] + i + ahead);
        x[k] = lanes_at(at[k] + i);
      }
    }
    if constexpr (found > 0) {
      accumulate<R, found, T>(last, sums, x);
    }
    R::template update<with_last>(s, x);
    for (int k = 0; k < R::kOperands; ++k) {
      if (written >> k & 1) lanes_at(at[k] + i) = x[k];
    }
    if constexpr (found == 0) {
      R::accumulate_left(sums, x);
    }
  }
  if (i < n) {  // the tail, padded with zeros
    Vector x[R::kOperands] = {}, left[R::kOperands] = {};
    for (int k = 0; k < R::kOperands; ++k) {
      if (!(without >> k & 1)) std::memcpy(&x[k], at[k] + i, (n - i) * sizeof(T));
    }
    if constexpr (found > 0) {
      accumulate<R, found, T>(last, sums, x);
    }
    R::template update<with_last>(s, x);
    for (int k = 0; k < R::kOperands; ++k) {
      if (written >> k & 1) {
        std::memcpy(at[k] + i, &x[k], (n - i) * sizeof(T));
        std::memcpy(&left[k], &x[k], (n - i) * sizeof(T));  // what became of the padding does not count
      }
    }
    if constexpr (found == 0) {
      R::accumulate_left(sums, left);
    }
  }
  add_lanes<R>(sums, begin, end, totals);
}

// The update_block that finds so many sums.
template <class R, int without, typename T, size_t i = 0>
auto update_that_finds(int found) {
  if (found == 0) return update_block<R, without, 0, T>;
  if constexpr (i + 1 < std::size(R::kFoundWidths)) {
    if (found != R::kFoundWidths[i]) return update_that_finds<R, without, T, i + 1>(found);
  }
  return update_block<R, without, R::kFoundWidths[i], T>;
}

// The one for a row with the operands `there` (bit i: operand i), and which of them it does without.
template <class R, typename T, size_t i = 0>
auto update_of(int there, int found) {
  if constexpr (i + 1 < std::size(R::kWithout)) {
    if (R::kWithout[i] & there) return update_of<R, T, i + 1>(there, found);
  }
  constexpr int without = R::kWithout[i];
  return std::pair(update_that_finds<R, without, T>(found), without);
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

// Adds to `totals`, if it is not null, the sums of what it finds or, as it was stored, of what it leaves.
template <class R, typename T>
void update_chunk(const std::array<Operand, kOperandsOf<R>>& operands, const typename R::template Scalars<T>& scalars,
                  const typename R::template Measured<T>& measured, const RoundingKeys<R>& keys, int64_t first, int64_t count,
                  const NewSums<R>& new_sums, double* totals) {
  T buffers[R::kOperands][kBlock];
  T* x[R::kOperands];
  const Operand& low_precision = operands[R::kOperands];
  int there = 0;
  for (int i = 0; i < R::kOperands; ++i) {
    there |= (operands[i].data != nullptr) << i;
  }
  // What it finds is summed up before what others wrote into the low-precision parameter comes into the master's place. What it
  // leaves may be rounded on its way out of a buffer, and is summed up after that.
  const bool found = totals != nullptr && new_sums.found();
  const bool found_first = found && low_precision.data != nullptr;
  bool as_stored = true;
  constexpr int left = reads_of<R>(R::kFirstLeft, R::kEndLeft);
  for (int i = 0; i < R::kOperands; ++i) {
    as_stored = as_stored && (!(left >> i & 1) || in_place<T>(operands[i]));
  }
  const bool left_last = totals != nullptr && !found && !as_stored;
  const int first_sum = new_sums.first();
  const int end_sum = totals == nullptr || found_first || left_last ? first_sum : new_sums.end();
  const auto [update, without] = update_of<R, T>(there, found && !found_first ? new_sums.columns : 0);
  ChunkSums<R> sums(count, first_sum, new_sums.end());
  for (int64_t done = 0; done < count; done += kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, count - done));
    for (int i = 0; i < R::kOperands; ++i) {
      if (without >> i & 1) {
        x[i] = found_first ? zeroed(buffers[i], n) : nullptr;  // sum_block has no loops without them
        continue;
      }
      const bool absent = R::kWritten >> i & 1 && !(there >> i & 1);
      x[i] = absent ? zeroed(buffers[i], n) : read<T>(operands[i], first + done, n, buffers[i]);
    }
    LaneSums<R>& of_block = sums.of_block(done);
    if (low_precision.data != nullptr) {
      if (found_first) {
        sum_block<R, R::kFoundSums, T>(measured, x, n, first_sum, new_sums.end(), of_block);
      }
      take_up(low_precision, first + done, n, x[R::kParam]);
    }
    update(scalars, measured, x, n, first_sum, end_sum, of_block);
    for (int i = 0; i < R::kOperands; ++i) {
      if (R::kWritten >> i & there >> i & 1) {
        if (keys.used && R::kRoundedStochastically >> i & 1 && itemsize(operands[i].type) == 2) {
          round_block(x[i], n, operands[i].type, keys.of[i], static_cast<uint32_t>(first + done));
        }
        write<T>(operands[i], first + done, n, x[i]);
      }
    }
    write<T>(low_precision, first + done, n, x[R::kParam]);
    if (left_last) {
      const T* stored[R::kOperands];
      for (int i = 0; i < R::kOperands; ++i) {
        stored[i] = left >> i & 1 ? read<T>(operands[i], first + done, n, buffers[i]) : zeros<T>();
      }
      sum_block<R, 0, T>(measured, stored, n, first_sum, new_sums.end(), of_block);
    }
  }
  if (totals != nullptr) {
    sums.add_to(totals);
  }
}

template <class R>
void update(const Header& header, void* memory, const Update& vectors, const NewSums<R>& new_sums) {
  const Table<kOperandsOf<R>> table(header, static_cast<char*>(memory));
  const bool summed = new_sums.data != nullptr, found = summed && new_sums.found();
  std::vector<std::array<double, R::kSums>> partials(summed ? table.chunks : 0, std::array<double, R::kSums>{});
  const auto skips = [&](int64_t t) { return table.rows[t].lacks_gradient() || vectors.at(R::kStep, t) == 0.0; };
  for_each_chunk<Order::kBackward>(table, [&](const auto& row, int64_t t, int64_t chunk, int64_t first, int64_t count) {
    double* totals = summed ? partials[chunk].data() : nullptr;
    if (skips(t)) {
      if (found) {
        measure_chunk<R>(table, row, t, vectors, 1, first, count, (1 << new_sums.columns) - 1, totals);
      }
      return;
    }
    const auto operands = operands_of<R>(table, row, R::exchanged(vectors, t, 0));
    const RoundingKeys<R> keys(vectors, t, first);
    const auto run = [&](auto zero) {
      using T = decltype(zero);
      const auto measured = found ? R::template measured<T>(vectors, 1, t) : typename R::template Measured<T>{};
      update_chunk<R, T>(operands, R::template scalars<T>(vectors, t), measured, keys, first, count, new_sums, totals);
    };
    row.is_double ? run(0.0) : run(0.0f);
  });
  for (int64_t t = 0; t < table.tensors && summed; ++t) {
    if (skips(t) && !found) {
      continue;
    }
    for (int s = new_sums.first(); s < new_sums.end(); ++s) {
      double& total = new_sums.at(t, s) = 0.0;
      for (int64_t chunk = table.first_chunk[t]; chunk < table.first_chunk[t + 1]; ++chunk) {
        total += partials[chunk][s];
      }
    }
  }
}

}  // namespace
}  // namespace metaadamw
