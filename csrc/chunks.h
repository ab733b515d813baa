// Index arithmetic: a list of tensors as one flat list of chunks, and where an element of a strided tensor lies.
//
// Offsets inside a chunk fit 32 bits; everything that addresses a tensor is 64 bits wide.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define METAADAMW_INLINE __host__ __device__ __forceinline__
#else
// Forced, so that each instruction-set clone of a loop (cpu_blocks.h) compiles its own copy of what is inside it.
#define METAADAMW_INLINE inline __attribute__((always_inline))
#endif

namespace metaadamw {

// Elements per chunk. Partial sums are kept per chunk and added in chunk order, so their result depends on this number but
// never on how many threads there were. Each launch table says which it was made with.
//
// A GPU block takes one chunk. A GPU of 132 multiprocessors holds 264 to 528 blocks at once: with chunks of 32,768 elements it
// would stand half idle below 10 million elements. With 8,192 it is full from 2 to 4 million on, and the work that a block
// does once per chunk still hides behind the loads of the other blocks on its multiprocessor.
constexpr int64_t kChunkOnCpu = 32768;
constexpr int64_t kChunkOnGpu = 8192;
constexpr int kMaxDims = 16;

// A tensor without elements has one empty chunk: the thread or block that takes it writes the zeros of its row.
METAADAMW_INLINE int64_t chunks_of(int64_t numel, int64_t chunk_size) {
  return numel == 0 ? 1 : (numel + chunk_size - 1) / chunk_size;
}

// A shape after dropping and merging dimensions, outermost first. All operands of one tensor are walked in this order.
struct Shape {
  int dims;
  int64_t size[kMaxDims];
};

// Offset, in elements, of the element with number `index`.
METAADAMW_INLINE int64_t strided_offset(const Shape& shape, const int64_t* stride, int64_t index) {
  int64_t offset = 0;
  for (int d = shape.dims - 1; d >= 0; --d) {
    offset += index % shape.size[d] * stride[d];
    index /= shape.size[d];
  }
  return offset;
}

}  // namespace metaadamw
