// Both ops of a rule on a CUDA device: one kernel launch for each, whatever the number of tensors; a block for each chunk
// (mapping.h).
//
// The kernels read everything from device memory: the table, the vectors, and through the table's addresses the tensors. So a
// captured launch does the right thing at every replay with whatever stands there then. Nothing is kept between calls but the
// tickets, which are 0 again when a kernel ends; two launches of one table must therefore not overlap, which the order of a stream
// sees to. Longer than 300 lines: both kernels walk a chunk in the same way, in groups and element by element, and share what a
// block knows of it.
#pragma once

#include "checks.h"
#include "cuda_launch.cuh"
#include "cuda_utils.cuh"
#include "rounding.h"
#include "rules.h"

namespace metaadamw {
namespace {

// A rule of many operands. 64 KiB of them are under way with two blocks, so there is no third block to save registers for: one
// kernel serves every update, with masters or without, whatever it rounds by, which saves nvcc a minute. Groups of 8 would need
// registers for the bits of all operands while four elements of each are worked on: rows of 16 bits go in groups of 4, in accesses
// of 8 bytes.
template <class R>
constexpr bool kHasMany = R::kOperands > 5;

// What a block knows of its chunk, in shared memory.
template <int N>
struct Work {
  Chunk chunk;
  Row<N> row;
  char* base[N];     // of the chunk, where the operand is dense
  Layout<N> layout;  // of rows that have one, and the coordinates of the chunk's first element
  int64_t coordinates[kMaxDims];

  // By all threads of the block; ends with a barrier. `vectors` say whether operands have changed roles, of the update `ahead` of
  // theirs; they may be null where only the gradient is read.
  template <class R>
  __device__ void begin(const Table<N>& table, int64_t number, const Update& vectors, int ahead) {
    if (threadIdx.x == 0) {
      chunk = chunk_of_block(table, number);
      row = table.rows[chunk.tensor];
      if constexpr (kExchanges<R>) {
        char *&a = row.data[R::kExchanged[0]], *&b = row.data[R::kExchanged[1]];  // of the same dtype and strides
        if (a != nullptr && b != nullptr && vectors.vectors != nullptr && R::exchanged(vectors, chunk.tensor, ahead)) {
          char* const first = a;
          a = b;
          b = first;
        }
      }
      for (int i = 0; i < N; ++i) {
        base[i] = row.data[i] + chunk.first * itemsize(row.type[i]);
      }
    }
    __syncthreads();
    if (row.layout >= 0) {
      // Every element asks for sizes and strides: from global memory that would be two loads per element, operand and dimension.
      constexpr int kWords = sizeof(Layout<N>) / sizeof(int64_t);
      static_assert(kWords <= kThreads && sizeof(Layout<N>) % sizeof(int64_t) == 0);
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

  __device__ char* address(const Table<N>& table, int operand, int index) const {
    return address_in_chunk(row, layout, operand, chunk.first, coordinates, table.chunk_size, index);
  }
};

// What is read from shared memory after this is read there again. Without it each value that a loop needs would be held in a
// register all through the loop, together with what the compiler derives from it, and there are too few.
__device__ __forceinline__ void forget_registers() { asm volatile("" ::: "memory"); }

template <typename T, int N>
__device__ __forceinline__ void add(T (&sums)[N], const T (&more)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    sums[i] += more[i];
  }
}

// ------------------------------------------------------------------------------------------------------------------ measure

template <class R>
struct MeasureOutput {
  void* data;  // [T, columns.count]
  bool is_double;
  Columns<R> columns;
  const double* carried;  // [T, kCarriedSums], null if they were read

  __device__ void put(int64_t tensor, int sum, double value) const {
    if (carried != nullptr && is_carried<R>(sum)) {
      value = carried[tensor * kCarriedSums<R> + sum - R::kFirstLeft];
    }
#pragma unroll
    for (int c = 0; c < R::kSums; ++c) {
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

// What the sums must know of a tensor's last update, in shared memory, made by two threads. Only the row says which arithmetic it
// takes, so there are both.
template <class R>
struct Last {
  typename R::template Measured<float> in_float32;
  typename R::template Measured<double> in_float64;

  // By all threads of the block; a barrier must follow. Half `half` of the vectors is that of the last update.
  template <int N>
  __device__ void begin(const Table<N>& table, const Update& vectors, int half, int64_t number) {
    if constexpr (R::kMeasureVectors > 0) {
      if (threadIdx.x == 4 * kWarp) {
        in_float32 = R::template measured<float>(vectors, half, table.tensor_of_chunk[number]);
      } else if (threadIdx.x == 5 * kWarp) {
        in_float64 = R::template measured<double>(vectors, half, table.tensor_of_chunk[number]);
      }
    }
  }
};

// The sums of one thread over its elements before `most`, in the arithmetic type; `operands` has a bit for each operand that is
// there and wanted.
template <class R, int V, int most, typename T, int N>
__device__ __forceinline__ void measure_chunk(const Table<N>& table, const Work<N>& work, int operands,
                                              const typename R::template Measured<T>& last, double (&totals)[R::kSums]) {
  constexpr int kOperands = R::kOperands, kReadHere = kRead<R, most>;
  const Row<N>& row = work.row;
  T sums[R::kSums] = {};
  for_each_group<V, false>(
      threadIdx.x, work.chunk.count, has_whole_groups(row, operands),
      [&](int first) {
        forget_registers();
        Groups<kOperands> groups{};
        if constexpr (V > 1) {
#pragma unroll
          for (int i = 0; i < kOperands; ++i) {
            if ((kReadHere & operands) >> i & 1) {
              const int size = itemsize(row.type[i]);
              groups.bits[i] = load_group<V>(work.base[i] + first * size, size);
            }
          }
        }
        return groups;
      },
      [&](int, const Groups<kOperands>& groups) {
        if constexpr (V > 1) {
          const auto s = last;
#pragma unroll
          for (int part = 0; part < V; part += kPart) {
            float x[kOperands][kPart] = {};
#pragma unroll
            for (int i = 0; i < kOperands; ++i) {
              if (kReadHere >> i & 1) unpack<V>(groups.bits[i], row.type[i], part, x[i]);
            }
            T of_part[R::kSums] = {};
#pragma unroll
            for (int k = 0; k < kPart; ++k) {
              T element[R::kOperands] = {};
#pragma unroll
              for (int i = 0; i < kOperands; ++i) {
                element[i] = x[i][k];
              }
              accumulate<R, most, T>(s, of_part, element);
            }
            add(sums, of_part);
          }
        }
      },
      [&](int begin, int end) {
        T of_part[R::kSums] = {};
#pragma unroll 1
        for (int index = begin; index < end; ++index) {
          forget_registers();
          T element[R::kOperands] = {};
#pragma unroll
          for (int i = 0; i < kOperands; ++i) {
            if ((kReadHere & operands) >> i & 1) {
              element[i] = load_element<T>(work.address(table, i, index), row.type[i]);
            }
          }
          accumulate<R, most, T>(last, of_part, element);
        }
        add(sums, of_part);
      });
#pragma unroll
  for (int i = 0; i < R::kSums; ++i) {
    totals[i] = sums[i];
  }
}

template <class R, bool extra>
__global__ void __launch_bounds__(kThreads, !extra        ? kMeasureBlocks
                                            : kHasMany<R> ? kBlocksOfMany
                                                          : kMeasureBlocksWithCounts)
    measure_kernel(const Table<kOperandsOf<R>> table, const int wanted, const Update vectors, const MeasureOutput<R> output) {
  __shared__ Work<kOperandsOf<R>> work;
  __shared__ Last<R> last;
  if (extra) last.begin(table, vectors, 0, blockIdx.x);
  work.template begin<R>(table, blockIdx.x, vectors, 1);
  const auto& row = work.row;
  int operands = wanted;
#pragma unroll
  for (int i = 0; i < R::kOperands; ++i) {
    operands &= ~((row.data[i] == nullptr) << i);
  }
  double totals[R::kSums] = {};
  if (extra && R::kAllNeedGradient && row.lacks_gradient()) {
    // 0 times a derivative might be NaN.
  } else if (row.is_double) {
    measure_chunk<R, 1, extra ? R::kSums : 0, double>(table, work, operands, last.in_float64, totals);
  } else if (kHasMany<R> || row.vector == 4) {
    measure_chunk<R, 4, extra ? R::kSums : 0, float>(table, work, operands, last.in_float32, totals);
  } else if constexpr (!kHasMany<R>) {
    measure_chunk<R, 8, extra ? R::kSums : 0, float>(table, work, operands, last.in_float32, totals);
  }
  tensor_sums<R>(table, work.chunk, totals, [&](int sum, double value) { output.put(work.chunk.tensor, sum, value); });
}

// ------------------------------------------------------------------------------------------------------------------- update

template <class R, bool found>
constexpr int kNewSums = found ? R::kFoundSums : kCarriedSums<R>;
template <class R, bool found>
using Totals = double[kNewSums<R, found> > 0 ? kNewSums<R, found> : 1];

// Numbers for all elements of a part, in registers if there are few.
template <class R, typename S>
using InLoop = std::conditional_t<kHasMany<R>, const S&, const S>;

// What the update does with a row's operands; bit i: operand i. Only of those in kUncertain it must be asked: of the others each is
// there and read.
struct Moves {
  int there;
  int loads;
  bool writes;  // only without found sums it does so in every row that it comes to
};

template <class R, bool found, bool master>
constexpr int kUncertain =
    found << kGrad | (R::kOptionalLists & ~(R::kLastIsOptional << (R::kOperands - 1))) | master << R::kOperands;

// With `found` a row may be one that the update leaves alone: its sums are made all the same, without a gradient if it has none.
template <class R, bool found, bool master, typename S, int N>
__device__ __forceinline__ Moves moves_of(const Row<N>& row, const S& scalars, bool moves) {
  constexpr int kAll = (1 << N) - 1;
  int there = kAll;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (kUncertain<R, found, master> >> i & 1) there &= ~((row.data[i] == nullptr) << i);
  }
  int loads = there;
  if constexpr (kExchanges<R> && !found) loads &= ~R::unread(scalars);
  return {there, loads, moves};
}

// Also returns the thread's sums of what it leaves, as it was stored, or, if `found`, of what it found: in the order in which
// measure_chunk adds them up. With `optional` the row has its last operand, if the rule's is optional; with `master` it may have a
// low-precision parameter. With `stochastic` it rounds by chance if `rounds` says so, too.
template <class R, int V, bool found, bool stochastic, bool optional, bool master, typename T, int N>
__device__ __forceinline__ void update_chunk(const Table<N>& table, const Work<N>& work, const Moves& moves,
                                             const typename R::template Scalars<T>& scalars,
                                             const typename R::template Measured<T>& last, bool rounds,
                                             const uint32_t (&keys)[R::kOperands], Totals<R, found>& totals) {
  constexpr int kParam = R::kParam, kLowPrecision = R::kOperands;
  constexpr int kUsed = R::kOperands - (R::kLastIsOptional && !optional);
  constexpr int kMoved = kUsed + master;  // behind those that are used, the low-precision parameter
  constexpr int kAsk = kUncertain<R, found, master>;
  constexpr int kWritten = R::kWritten | 1 << kLowPrecision;
  constexpr int kLeft = found ? 0 : reads_of<R>(R::kFirstLeft, R::kEndLeft);
  const auto operand_of = [](int i) constexpr { return i < kUsed ? i : kLowPrecision; };
  const Row<N>& row = work.row;
  // With few operands a look into shared memory costs less than a register all through the loop.
  const auto is_in = [&](int mask, int operand) {
    return !(kAsk >> operand & 1) || (kHasMany<R> ? (mask >> operand & 1) != 0 : row.data[operand] != nullptr);
  };
  const auto loads = [&](int i) { return is_in(moves.loads, operand_of(i)); };
  const auto stores = [&](int i) {
    return kWritten >> operand_of(i) & 1 && is_in(moves.there, operand_of(i)) && (!found || moves.writes);
  };
  T sums[R::kSums] = {};
  for_each_group<V, found && (kLoadsAhead || kHasMany<R>)>(
      threadIdx.x, work.chunk.count, has_whole_groups(row, ((1 << kUsed) - 1 | master << kLowPrecision) & (moves.there | ~kAsk)),
      [&](int first) {
        forget_registers();
        Groups<kMoved> groups{};
        if constexpr (V > 1) {
#pragma unroll
          for (int i = 0; i < kMoved; ++i) {
            if (loads(i)) {
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
          const auto s = scalars;
#pragma unroll
          for (int part = 0; part < V; part += kPart) {
            float x[R::kOperands][kPart] = {};
            T of_part[R::kSums] = {};
#pragma unroll
            for (int i = 0; i < kUsed; ++i) {
              unpack<V>(bits[i], row.type[i], part, x[i]);
            }
            if constexpr (found) {
              const auto of_last = last;
#pragma unroll
              for (int k = 0; k < kPart; ++k) {
                float element[R::kOperands];
#pragma unroll
                for (int i = 0; i < R::kOperands; ++i) {
                  element[i] = x[i][k];
                }
                accumulate<R, R::kFoundSums, T>(of_last, of_part, element);
              }
            }
            if constexpr (master) {
              const ElementType type = row.type[kLowPrecision];
              float low[kPart];
              unpack<V>(bits[kUsed], type, part, low);
#pragma unroll
              for (int k = 0; k < kPart; ++k) {
                const float start = start_of_update(x[kParam][k], rounded_to_half(type, x[kParam][k]), low[k]);
                x[kParam][k] = loads(kUsed) ? start : x[kParam][k];
              }
            }
#pragma unroll
            for (int k = 0; k < kPart; ++k) {
              float element[R::kOperands];
#pragma unroll
              for (int i = 0; i < R::kOperands; ++i) {
                element[i] = x[i][k];
              }
              R::template update<optional>(s, element);
#pragma unroll
              for (int i = kGrad + 1; i < kUsed; ++i) {
                x[i][k] = element[i];
              }
            }
            if (stochastic && rounds) {
#pragma unroll
              for (int i = kGrad + 1; i < kUsed; ++i) {
#pragma unroll
                for (int k = 0; k < kPart && R::kRoundedStochastically >> i & 1; ++k) {
                  const uint32_t element = static_cast<uint32_t>(work.chunk.first) + first + part + k;
                  x[i][k] = round_stochastically(x[i][k], row.type[i], random_bits(keys[i], element));
                }
              }
            }
#pragma unroll
            for (int i = kGrad + 1; i < kUsed; ++i) {
              if (R::kWritten >> i & 1) {
                pack<V>(bits[i], row.type[i], part, x[i]);
                if (kLeft >> i & 1 || (master && i == kParam)) {
                  unpack<V>(bits[i], row.type[i], part, x[i]);
                }
              }
            }
            if constexpr (master) {
              pack<V>(bits[kUsed], row.type[kLowPrecision], part, x[kParam]);
            }
            if constexpr (!found) {
#pragma unroll
              for (int k = 0; k < kPart; ++k) {
                float stored[R::kOperands];
#pragma unroll
                for (int i = 0; i < R::kOperands; ++i) {
                  stored[i] = x[i][k];
                }
                R::accumulate_left(of_part, stored);
              }
            }
            add(sums, of_part);
          }
#pragma unroll
          for (int i = kGrad + 1; i < kMoved; ++i) {
            if (stores(i)) {
              const int size = itemsize(row.type[operand_of(i)]);
              store_group<V>(work.base[operand_of(i)] + first * size, size, bits[i]);
            }
          }
        }
      },
      [&](int begin, int end) {
        const InLoop<R, typename R::template Scalars<T>> s = scalars;
        T of_part[R::kSums] = {};
#pragma unroll 1
        for (int index = begin; index < end; ++index) {
          forget_registers();
          char* address[kMoved];
          T x[R::kOperands] = {};
#pragma unroll
          for (int i = 0; i < kUsed; ++i) {
            if (loads(i) || stores(i)) {
              address[i] = work.address(table, i, index);
            }
            if (loads(i)) {
              x[i] = load_element<T>(address[i], row.type[i]);
            }
          }
          if constexpr (found) {
            accumulate<R, R::kFoundSums, T>(last, of_part, x);
          }
          if (master && loads(kUsed)) {
            const ElementType type = row.type[kLowPrecision];
            address[kMoved - 1] = work.address(table, kLowPrecision, index);
            const T rounded = rounded_to_half(type, static_cast<float>(x[kParam]));
            x[kParam] = start_of_update(x[kParam], rounded, load_element<T>(address[kMoved - 1], type));
          }
          R::template update<optional>(s, x);
#pragma unroll
          for (int i = kGrad + 1; i < kUsed; ++i) {
            if (stores(i)) {
              if (stochastic && rounds && R::kRoundedStochastically >> i & 1) {
                const uint32_t element = static_cast<uint32_t>(work.chunk.first) + index;
                x[i] = round_stochastically(x[i], row.type[i], random_bits(keys[i], element));
              }
              x[i] = store_element<T>(address[i], row.type[i], x[i]);
            }
          }
          if (master && stores(kUsed)) {
            store_element<T>(address[kMoved - 1], row.type[kLowPrecision], x[kParam]);
          }
          if constexpr (!found) {
            R::accumulate_left(of_part, x);
          }
        }
        add(sums, of_part);
      });
#pragma unroll
  for (int i = 0; i < kNewSums<R, found>; ++i) {
    totals[i] = sums[(found ? 0 : R::kFirstLeft) + i];
  }
}

template <class R, int V, bool found, bool stochastic, bool master, typename T, int N>
__device__ __forceinline__ void update_chunk(const Table<N>& table, const Work<N>& work,
                                             const typename R::template Scalars<T>& scalars,
                                             const typename R::template Measured<T>& last, bool moves, bool rounds,
                                             const uint32_t (&keys)[R::kOperands], Totals<R, found>& totals) {
  const Moves of_row = moves_of<R, found, master>(work.row, scalars, moves);
  if (!R::kLastIsOptional || work.row.data[R::kOperands - 1] != nullptr) {
    update_chunk<R, V, found, stochastic, true, master, T>(table, work, of_row, scalars, last, rounds, keys, totals);
  } else if constexpr (R::kLastIsOptional) {
    update_chunk<R, V, found, stochastic, false, master, T>(table, work, of_row, scalars, last, rounds, keys, totals);
  }
}

// What a block knows of its tensor's vectors, in shared memory. Three warps read them while warp 0 reads the row, so that all these
// loads are under way at once. Only the row says which arithmetic it takes, so the scalars are made for both.
template <class R>
struct Numbers {
  typename R::template Scalars<float> in_float32;
  typename R::template Scalars<double> in_float64;
  uint32_t keys[R::kOperands];
  bool skipped;

  // By all threads of the block; a barrier must follow.
  template <bool stochastic, int N>
  __device__ void begin(const Table<N>& table, const Update& update, int64_t number) {
    const int64_t tensor = table.tensor_of_chunk[number];
    if (threadIdx.x == kWarp) {
      in_float32 = R::template scalars<float>(update, tensor);
    } else if (threadIdx.x == 2 * kWarp) {
      in_float64 = R::template scalars<double>(update, tensor);
    } else if (threadIdx.x == 3 * kWarp) {
      skipped = update.at(R::kStep, tensor) == 0.0;
    } else if (stochastic && threadIdx.x > 3 * kWarp && threadIdx.x <= 3 * kWarp + R::kOperands) {
      const int operand = threadIdx.x - 3 * kWarp - 1;
      const int64_t first = (number - table.first_chunk[tensor]) * table.chunk_size;
      keys[operand] = rounding_key(update.rounding_seed, update.at(R::kStep, tensor), tensor, operand, first);
    }
  }
};

template <class R, bool found, bool stochastic, bool masters>
__device__ __forceinline__ void update_chunk_of_block(const Table<kOperandsOf<R>>& table, const Update& update,
                                                      const NewSums<R>& new_sums) {
  __shared__ Work<kOperandsOf<R>> work;
  __shared__ Numbers<R> numbers;
  __shared__ Last<R> last;
  // Backward through what the statistics went through forward: the last chunks may still be in the second-level cache.
  const int64_t number = gridDim.x - 1 - blockIdx.x;
  numbers.template begin<stochastic>(table, update, number);
  if (found) last.begin(table, update, 1, number);
  work.template begin<R>(table, number, update, 0);
  const bool moves = !work.row.lacks_gradient() && !numbers.skipped;
  if (!moves && !found) {
    return;
  }
  const bool rounds = !kHasMany<R> || update.stochastic;  // else `stochastic` says so
  Totals<R, found> totals = {};
  if (found && R::kAllNeedGradient && work.row.lacks_gradient()) {
    // 0 times a derivative might be NaN.
  } else if (work.row.is_double) {
    update_chunk<R, 1, found, stochastic, masters, double>(table, work, numbers.in_float64, last.in_float64, moves, rounds,
                                                           numbers.keys, totals);
  } else if (masters || work.row.vector == 4) {
    update_chunk<R, 4, found, stochastic, masters, float>(table, work, numbers.in_float32, last.in_float32, moves, rounds,
                                                          numbers.keys, totals);
  } else if constexpr (!masters) {
    update_chunk<R, 8, found, stochastic, false, float>(table, work, numbers.in_float32, last.in_float32, moves, rounds,
                                                        numbers.keys, totals);
  }
  if (kNewSums<R, found> > 0 && new_sums.data != nullptr) {
    tensor_sums<R>(table, work.chunk, totals, [&](int sum, double value) {
      if (sum < new_sums.columns) new_sums.at(work.chunk.tensor, (found ? 0 : R::kFirstLeft) + sum) = value;
    });
  }
}

// Five operands that are always there are 40 KiB under way with two blocks, and the dice take the registers of a third. With nine
// and seven sums of them a thread takes more registers than two blocks have, so there is one, with 36 KiB under way all the time.
template <class R, bool found, bool stochastic>
constexpr int kBlocksOf = found && kHasMany<R>                                  ? 1
                          : found && (kLoadsAhead || stochastic)                ? kUpdateBlocksWithFoundSums
                          : kHasMany<R>                                         ? kBlocksOfMany
                          : stochastic && R::kOperands - R::kLastIsOptional > 4 ? 2
                                                                                : kUpdateBlocks;

template <class R, bool found, bool stochastic>
__global__ void __launch_bounds__(kThreads, kBlocksOf<R, found, stochastic>)
    update_kernel(const Table<kOperandsOf<R>> table, const Update update, const NewSums<R> new_sums) {
  update_chunk_of_block<R, found, stochastic, kHasMany<R>>(table, update, new_sums);
}

// Where some row has a low-precision parameter: then no row is taken in groups of 8, since a master is of float32. A kernel of its
// own, so that the other keeps its registers.
template <class R, bool found, bool stochastic>
__global__ void __launch_bounds__(kThreads, kUpdateBlocksWithMasters)
    update_masters_kernel(const Table<kOperandsOf<R>> table, const Update update, const NewSums<R> new_sums) {
  update_chunk_of_block<R, found, stochastic, true>(table, update, new_sums);
}

// ----------------------------------------------------------------------------------------------------------------- launches

// The GPU's copy of a table.
template <class R>
Table<kOperandsOf<R>> table_on_device(const Header& header, const std::optional<Tensor>& copy) {
  METAADAMW_CHECK(copy && device_of(*copy) == header.device && copy->is_contiguous() &&
                      copy->numel() * static_cast<int64_t>(copy->element_size()) >= header.device_bytes,
                  "the copy of the launch table must lie on the device of the tensors, with room for the partial sums");
  return {header, static_cast<char*>(copy->data_ptr())};
}

template <class R>
Tensor measure(const Header& header, const std::optional<Tensor>& copy, int mask, ScalarType dtype,
               const std::optional<Tensor>& carried, const std::optional<Tensor>& vectors) {
  const auto table = table_on_device<R>(header, copy);
  const double* carried_sums = check_measured<R>(header, mask, carried, dtype);
  const Update last = measured_update<R>(vectors, mask, header);
  const torch::stable::accelerator::DeviceGuard guard(header.device);
  const Columns<R> columns(carried ? mask | kCarriedMask<R> : mask);
  Tensor result = torch::stable::empty({header.tensors, columns.count}, dtype, std::nullopt,
                                       torch::stable::Device(torch::headeronly::DeviceType::CUDA, header.device));
  if (header.chunks != 0) {
    const MeasureOutput<R> output{result.data_ptr(), dtype == ScalarType::Double, columns, carried_sums};
    const auto kernel = mask >> R::kFirstExtra ? measure_kernel<R, (R::kFirstExtra < R::kSums)> : measure_kernel<R, false>;
    kernel<<<header.chunks, kThreads, 0, current_stream(header.device)>>>(table, reads_of<R>(mask), last, output);
    check_cuda(cudaGetLastError(), "measure");
  }
  return result;
}

template <class R, bool found>
auto update_kernel_of(bool masters, bool stochastic) {
  if constexpr (kHasMany<R>) {
    return update_kernel<R, found, true>;
  } else {
    return masters ? (stochastic ? update_masters_kernel<R, found, true> : update_masters_kernel<R, found, false>)
                   : (stochastic ? update_kernel<R, found, true> : update_kernel<R, found, false>);
  }
}

template <class R>
void update(const Header& header, const std::optional<Tensor>& copy, const Update& vectors, const NewSums<R>& new_sums) {
  const auto table = table_on_device<R>(header, copy);
  const torch::stable::accelerator::DeviceGuard guard(header.device);
  if (header.chunks != 0) {
    constexpr bool finds = R::kFoundSums > 0;
    const auto kernel = new_sums.found() ? update_kernel_of<R, finds>(header.masters, vectors.stochastic)
                                         : update_kernel_of<R, false>(header.masters, vectors.stochastic);
    kernel<<<header.chunks, kThreads, 0, current_stream(header.device)>>>(table, vectors, new_sums);
    check_cuda(cudaGetLastError(), "update");
  }
}

}  // namespace
}  // namespace metaadamw
