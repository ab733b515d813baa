// What both kernels need: elements in and out of registers, sums over a block, and the sums of a tensor from those of its chunks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "mapping.h"
#include "sums.h"

namespace metaadamw {

// A group of elements of one operand as it lies in memory.
struct Bits {
  uint32_t word[4];
};

// The same of N operands.
template <int N>
struct Groups {
  Bits bits[N];
};

// Lets the compiler use global instead of generic accesses; the addresses come from the table, where it cannot know.
template <typename T>
__device__ __forceinline__ T& global(char* address) {
  __builtin_assume(__isGlobal(address));
  return *reinterpret_cast<T*>(address);
}

// A group of V elements in one access: 16 bytes, or 8 where a wider operand sets V. Only the bits are fetched: whoever fetches
// those of all operands before he looks at the first has all of them under way together.
template <int V>
__device__ __forceinline__ Bits load_group(char* address, int size) {
  if (V == 8 || size == 4) {
    const uint4 words = global<uint4>(address);
    return {{words.x, words.y, words.z, words.w}};
  }
  const uint2 words = global<uint2>(address);
  return {{words.x, words.y, 0, 0}};
}

template <int V>
__device__ __forceinline__ void store_group(char* address, int size, const Bits& bits) {
  if (V == 8 || size == 4) {
    global<uint4>(address) = make_uint4(bits.word[0], bits.word[1], bits.word[2], bits.word[3]);
  } else {
    global<uint2>(address) = make_uint2(bits.word[0], bits.word[1]);
  }
}

__device__ __forceinline__ float from_half(ElementType type, uint32_t bits) {
  return type == ElementType::kBFloat16 ? __uint_as_float(bits << 16) : __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
}

__device__ __forceinline__ uint32_t to_half(ElementType type, float value) {
  return type == ElementType::kBFloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value))
                                        : __half_as_ushort(__float2half_rn(value));
}

__device__ __forceinline__ float rounded_to_half(ElementType type, float value) { return from_half(type, to_half(type, value)); }

// The elements [part, part + kPart) of a group of V = 4 or 8. With V = 8 all types are of 16 bits.
template <int V>
__device__ __forceinline__ void unpack(const Bits& bits, ElementType type, int part, float (&x)[kPart]) {
  if (V == 4 && type == ElementType::kFloat32) {
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      x[i] = __uint_as_float(bits.word[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      x[i] = from_half(type, bits.word[(part + i) / 2] >> (i % 2 * 16) & 0xffffu);
    }
  }
}

// The way back, rounding to nearest; other parts stay.
template <int V>
__device__ __forceinline__ void pack(Bits& bits, ElementType type, int part, const float (&x)[kPart]) {
  if (V == 4 && type == ElementType::kFloat32) {
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      bits.word[i] = __float_as_uint(x[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPart; i += 2) {
      bits.word[(part + i) / 2] = to_half(type, x[i]) | to_half(type, x[i + 1]) << 16;
    }
  }
}

template <typename T>
__device__ __forceinline__ T load_element(char* address, ElementType type) {
  if (itemsize(type) == 2) {
    return from_half(type, global<uint16_t>(address));
  }
  if constexpr (sizeof(T) == 8) {
    if (type == ElementType::kFloat64) {
      return global<double>(address);
    }
  }
  return global<float>(address);
}

// Rounds to nearest, float64 to the 16-bit types through float32 as on the CPU, and returns the value as it was stored.
template <typename T>
__device__ __forceinline__ T store_element(char* address, ElementType type, T value) {
  if (itemsize(type) == 2) {
    const uint32_t half = to_half(type, static_cast<float>(value));
    global<uint16_t>(address) = static_cast<uint16_t>(half);
    return from_half(type, half);
  }
  if constexpr (sizeof(T) == 8) {
    if (type == ElementType::kFloat64) {
      return global<double>(address) = value;
    }
  }
  return global<float>(address) = static_cast<float>(value);
}

// The sums of N values over the block, value i to thread i: shuffles within each warp, then over the warps, always in one order.
//
// Between two calls the caller has a barrier. Without one a fast warp would write of_warp for the second call while warp 0 still
// reads it for the first. (Both callers that call it twice need such a barrier anyway, to hand the result on.)
template <int N>
__device__ __forceinline__ double block_sums(double (&values)[N]) {
  constexpr int kWarps = kThreads / 32;
  __shared__ double of_warp[N][kWarps];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    for (int distance = 16; distance > 0; distance /= 2) {
      values[i] += __shfl_down_sync(0xffffffffu, values[i], distance);
    }
    if (threadIdx.x % 32 == 0) {
      of_warp[i][threadIdx.x / 32] = values[i];
    }
  }
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x < N) {
    for (int warp = 0; warp < kWarps; ++warp) {
      total += of_warp[threadIdx.x][warp];
    }
  }
  return total;
}

// Every block of a tensor calls this with the sums of its chunk's threads; the block that comes last calls finish(i, sum i of the
// tensor) in thread i. Which one is last does not matter: it adds the partial sums in the order of the chunks' numbers.
//
// Threads of one block write the partial sums and thread 0 takes the ticket for all of them; this is no release by one thread. It
// holds because __threadfence is a sequentially consistent fence: every such fence of the device stands in one order, and that of
// the writers comes before the ticket, hence before that of the readers.
// A table of rule R has room for R::kSums of them per chunk.
template <class R, int N, int M, typename F>
__device__ __forceinline__ void tensor_sums(const Table<M>& table, const Chunk& chunk, double (&values)[N], const F& finish) {
  __shared__ bool last;
  const int64_t begin = table.first_chunk[chunk.tensor], end = table.first_chunk[chunk.tensor + 1];
  double total = block_sums(values);
  if (end - begin > 1) {
    if (threadIdx.x < N) {
      table.partials[chunk.number * R::kSums + threadIdx.x] = total;
      __threadfence();  // the partial sums before the ticket
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      // The last one sets it back to 0 for the next launch or replay, in the same instruction: a store of its own would be
      // ordered with no other block's ticket.
      const auto others = static_cast<unsigned>(end - begin - 1);
      last = atomicInc(&table.tickets[chunk.tensor], others) == others;
    }
    __syncthreads();
    if (!last) {
      return;
    }
    __threadfence();  // the ticket before the others' partial sums
#pragma unroll
    for (int i = 0; i < N; ++i) {
      values[i] = 0.0;
    }
    for (int64_t number = begin + threadIdx.x; number < end; number += kThreads) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        values[i] += __ldcg(&table.partials[number * R::kSums + i]);  // past the first-level cache, which other blocks do not write
      }
    }
    total = block_sums(values);
  }
  if (threadIdx.x < N) {
    finish(threadIdx.x, total);
  }
}

}  // namespace metaadamw
