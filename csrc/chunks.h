// Index arithmetic: a list of tensors as one flat list of chunks, and where an element of a strided tensor lies.
//
// Offsets inside a chunk fit 32 bits; everything that addresses a tensor is 64 bits wide.
#pragma once

#include "adamw.h"

namespace metaadamw {

// Elements per chunk. Partial sums are kept per chunk and added in chunk order, so their result depends on this number but
// never on how many threads there were.
constexpr int64_t kChunk = 32768;
constexpr int kMaxDims = 16;

// A tensor without elements has one empty chunk, so that whoever takes it writes the zeros of its row.
METAADAMW_INLINE int64_t chunks_of(int64_t numel) { return numel == 0 ? 1 : (numel + kChunk - 1) / kChunk; }

// The tensor that owns `chunk`, by binary search: first_chunk[t] is the number of chunks before tensor t, and
// first_chunk[tensors] their total.
METAADAMW_INLINE int64_t tensor_of_chunk(const int64_t* first_chunk, int64_t tensors, int64_t chunk) {
  int64_t low = 0, high = tensors;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first_chunk[middle] <= chunk ? low : high) = middle;
  }
  return low;
}

// A shape after dropping and merging dimensions, outermost first. All operands of one tensor are walked in this order.
struct Shape {
  int dims = 0;
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
