// Which elements a GPU thread takes, and where they lie. No torch and no CUDA types: the tests run these very functions in a loop
// over (block, thread) on the CPU.
//
// A block takes one chunk. The chunk is cut into groups of V consecutive elements, of which thread i takes the i-th, then the one
// kThreads further on, and so on: neighbours touch neighbouring memory. A group of the widest operand has 16 bytes, the widest
// access there is; but float64 goes element by element, which a warp fetches as well. Which thread adds which elements in which
// order depends on the dtypes of the row alone, so sums do not depend on alignment and strides, and the update adds up what a later
// pass of the statistics would.
#pragma once

#include "table.h"

namespace metaadamw {

// A block's size, and how many of them a multiprocessor of 65,536 registers must hold at once. What counts is bytes under way:
// blocks x threads x 16 bytes x operands, of which an H100 wants 32 KiB and an H200 48 KiB in each multiprocessor.
//   measure  4 blocks, 64 registers: it reads two operands, so 32 KiB
//   update   3 blocks, 80 registers: four operands, 48 KiB. One kernel for all dtypes needs most of these registers
//   masters  2 blocks, 128 registers: with the low-precision parameters five operands or six, 36 KiB
//   lagged   2 blocks, 128 registers: 32 KiB, but all the time, since the next group is loaded before this one is worked on
//   MADA     2 blocks, 128 registers: up to nine operands, 64 KiB; lagged one block of up to 255
constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kMeasureBlocks = 4;
constexpr int kMeasureBlocksWithCounts = 3;
constexpr int kUpdateBlocks = 3;
constexpr int kUpdateBlocksWithFoundSums = 2;
constexpr int kUpdateBlocksWithMasters = 2;
constexpr int kBlocksOfMany = 2;

// Whether a lagged update loads the next group before it works on this one. On Blackwell it takes 80 registers without, so that
// three blocks fit: 48 KiB under way all the time; with it two fit, and 32 KiB.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kLoadsAhead = false;
#else
constexpr bool kLoadsAhead = true;
#endif

// Elements that are added up by themselves before their sum goes to the thread's: at most 4 + kChunkOnGpu / kThreads / 4 = 12
// roundings.
constexpr int kPart = 4;

// The part of a tensor that one block takes.
struct Chunk {
  int64_t number;
  int64_t tensor;
  int64_t first;  // its first element
  int count;
};

template <int N>
METAADAMW_INLINE Chunk chunk_of_block(const Table<N>& table, int64_t number) {
  Chunk chunk;
  chunk.number = number;
  chunk.tensor = table.tensor_of_chunk[number];
  chunk.first = (number - table.first_chunk[chunk.tensor]) * table.chunk_size;
  const int64_t left = table.rows[chunk.tensor].numel - chunk.first;
  chunk.count = static_cast<int>(left < table.chunk_size ? left : table.chunk_size);
  return chunk;
}

// Whether every operand of the row that `operands` has a bit for can be read and written a group at a time. Chunks begin at
// multiples of the chunk size, so it is the same for all of them.
template <int N>
METAADAMW_INLINE bool has_whole_groups(const Row<N>& row, int operands) {
  bool whole = true;
  for (int i = 0; i < N; ++i) {
    const uintptr_t group_bytes = row.vector * itemsize(row.type[i]);
    whole = whole && (!(operands >> i & 1) || (row.is_dense(i) && reinterpret_cast<uintptr_t>(row.data[i]) % group_bytes == 0));
  }
  return whole;
}

// Calls group(first element, load(first element)) for each group of V elements that this thread takes as a whole, and
// elements(begin, end) for each part that it takes element by element. Elements are counted from the beginning of the chunk, and
// come in the same order either way. With `ahead` the next group is loaded before this one is worked on: then two groups are under
// way at once.
template <int V, bool ahead, typename Load, typename Group, typename Elements>
METAADAMW_INLINE void for_each_group(int thread, int count, bool whole, const Load& load, const Group& group,
                                     const Elements& elements) {
  int first = thread * V;
  if constexpr (V > 1) {
    if (whole) {
      constexpr int kStride = kThreads * V;
      if constexpr (ahead) {
        if (first + V <= count) {
          auto next = load(first);
#ifdef __CUDA_ARCH__
#pragma unroll 1
#endif
          for (; first + kStride + V <= count; first += kStride) {
            const auto bits = next;
            next = load(first + kStride);
            group(first, bits);
          }
          group(first, next);
          first += kStride;
        }
      } else {
#ifdef __CUDA_ARCH__
#pragma unroll 1
#endif
        for (; first + V <= count; first += kStride) {
          group(first, load(first));
        }
      }
    }
  }
#ifdef __CUDA_ARCH__
#pragma unroll 1
#endif
  for (; first < count; first += kThreads * V) {
    const int end = count - first < V ? count : first + V;
#ifdef __CUDA_ARCH__
#pragma unroll 1
#endif
    for (int part = first; part < end; part += kPart) {
      elements(part, end - part < kPart ? end : part + kPart);
    }
  }
}

// The multi-index of element `first` of a tensor: the base of a chunk, from which offset_in_chunk goes on in 32 bits.
METAADAMW_INLINE void coordinates_of(const Shape& shape, int64_t first, int64_t* coordinates) {
  for (int d = shape.dims - 1; d >= 0; --d) {
    coordinates[d] = first % shape.size[d];
    first /= shape.size[d];
  }
}

// As strided_offset of the element `index` further on, which is in the same chunk, without a 64-bit division.
METAADAMW_INLINE int64_t offset_in_chunk(const Shape& shape, const int64_t* coordinates, const int64_t* stride, int64_t chunk_size,
                                         int index) {
  int64_t offset = 0;
  auto carry = static_cast<uint32_t>(index);
  for (int d = shape.dims - 1; d >= 0; --d) {
    int64_t at = coordinates[d] + carry;
    if (shape.size[d] > chunk_size) {  // then at most one wrap
      carry = at >= shape.size[d];
      at -= carry ? shape.size[d] : 0;
    } else {
      const auto size = static_cast<uint32_t>(shape.size[d]);
      carry = static_cast<uint32_t>(at) / size;
      at = static_cast<uint32_t>(at) % size;
    }
    offset += at * stride[d];
  }
  return offset;
}

// Where element `index` of a chunk lies. Rows that are dense throughout have neither a layout nor the `coordinates` of the chunk's
// first element.
template <int N>
METAADAMW_INLINE char* address_in_chunk(const Row<N>& row, const Layout<N>& layout, int operand, int64_t first,
                                        const int64_t* coordinates, int64_t chunk_size, int index) {
  const int size = itemsize(row.type[operand]);
  if (row.is_dense(operand)) {
    return row.data[operand] + first * size + index * size;
  }
  return row.data[operand] + offset_in_chunk(layout.shape, coordinates, layout.stride[operand], chunk_size, index) * size;
}

}  // namespace metaadamw
