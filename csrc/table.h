// The launch table: all that the ops have to know of their tensors, as plain numbers in one block of memory.
//
// It is made once and read by every launch; from step to step only the gradients' addresses change. It knows no torch types, so the
// CPU reads it where it lies and a GPU reads a copy of its first part.
//
//   Header | Row[tensors]                                           what changes when gradients come to lie elsewhere
//   | first_chunk[tensors + 1] | Layout[layouts] | tickets[tensors] | tensor_of_chunk[chunks]
//                                                                   up to here a GPU gets a copy
//   | shape_begin[tensors + 1] | sizes and strides of the gradients    host only; in their place a GPU has the partial sums
#pragma once

#include "chunks.h"

namespace metaadamw {

enum class ElementType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

METAADAMW_INLINE int itemsize(ElementType type) {
  return type == ElementType::kFloat64 ? 8 : type == ElementType::kFloat32 ? 4 : 2;
}

// Operands go by number: the gradient is 0 in every rule (see adamw.h), the others are in the order that the rule says. Behind a
// rule's own stands the low-precision parameter, of bfloat16 or float16: where a row has one, the rule's parameter is its float32
// master (see start_of_update).
constexpr int kGrad = 0;

// One position of all lists: tensors of the same shape, walked together.
template <int N>
struct Row {
  static constexpr int kLowPrecision = N - 1;

  int64_t numel;
  char* data[N];        // null where the row has no such operand
  int64_t layout;       // number of its Layout, -1 if every operand is dense
  ElementType type[N];  // of an absent gradient: the one expected
  uint16_t dense;       // bit i: the elements of operand i lie one after another in the order in which the row is walked
  bool is_double;       // float64 tensors are computed in float64, all others in float32
  uint8_t vector;  // consecutive elements that a GPU thread takes: 16 bytes of the widest operand, beside masters at most 4; 1 if
                   // is_double

  METAADAMW_INLINE bool is_dense(int operand) const { return dense >> operand & 1; }
  // The update leaves such a row alone. (A tensor without elements has no address either, and is not meant.)
  METAADAMW_INLINE bool lacks_gradient() const { return data[kGrad] == nullptr && numel != 0; }
};
static_assert(sizeof(Row<6>) == 80, "rows are copied to a GPU as they are");

// How a row with strided operands is walked. Rows that are dense throughout, the usual case, have none.
template <int N>
struct Layout {
  Shape shape;
  int64_t stride[N][kMaxDims];
};

struct Header {
  int64_t copied_bytes;  // the part of the table that a GPU gets a copy of; these three are read by metaadamw_fast/launch.py
  int64_t device_bytes;  // that part, and the partial sums behind it
  int64_t row_bytes;     // the beginning of that part, which alone changes with the addresses of the gradients
  int64_t chunk_size;    // elements
  int64_t tensors;
  int64_t chunks;
  int64_t layouts;
  int64_t device;  // of every tensor: -1 for the CPU, else the number of the GPU
  int32_t rule;    // number of the rule it was made for (rules.h)
  uint16_t given;  // bit i: the table was made with a list of operand i
  bool written;    // it was made for updates too
  bool masters;    // some row has a low-precision parameter

  METAADAMW_INLINE bool has(int operand) const { return given >> operand & 1; }
};

// The parts of a table that begins at `base`, on the host or on a GPU.
template <int N>
struct Table {
  int64_t tensors;
  int64_t chunks;
  int64_t chunk_size;
  Row<N>* rows;
  int64_t* first_chunk;  // the number of chunks before each tensor, then their total
  Layout<N>* layouts;
  uint32_t* tickets;         // per tensor, chunks that are done: 0 between launches
  int32_t* tensor_of_chunk;  // per chunk: a search would be a chain of loads, each waiting for the one before
  union {
    double* partials;      // on a GPU, the sums of its rule per chunk
    int64_t* shape_begin;  // on the host, where the gradient's sizes and strides begin among those that follow
  };

  Table(const Header& header, char* base)
      : tensors(header.tensors),
        chunks(header.chunks),
        chunk_size(header.chunk_size),
        rows(reinterpret_cast<Row<N>*>(base + sizeof(Header))),
        first_chunk(reinterpret_cast<int64_t*>(rows + tensors)),
        layouts(reinterpret_cast<Layout<N>*>(first_chunk + tensors + 1)),
        tickets(reinterpret_cast<uint32_t*>(layouts + header.layouts)),
        tensor_of_chunk(reinterpret_cast<int32_t*>(tickets + tensors)),
        partials(reinterpret_cast<double*>(base + header.copied_bytes)) {}

  static int64_t row_bytes(const Header& header) { return sizeof(Header) + header.tensors * sizeof(Row<N>); }
  static int64_t copied_bytes(const Header& header) {
    const int64_t bytes = row_bytes(header) + (header.tensors + 1) * sizeof(int64_t) + header.layouts * sizeof(Layout<N>) +
                          header.tensors * sizeof(uint32_t) + header.chunks * sizeof(int32_t);
    return (bytes + 15) / 16 * 16;
  }
};

}  // namespace metaadamw
