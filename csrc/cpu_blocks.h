// The operands of the CPU ops in and out of blocks.
//
// A chunk is walked in blocks. An operand that is dense and of the arithmetic type is read and written where it lies; any other
// (bfloat16, float16, transposed, expanded, ...) passes through a block-sized buffer in the first-level cache. So there is one
// loop per op and arithmetic type, and strides and dtypes cannot change what it computes.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "table.h"

// One copy of a loop per instruction set, chosen when the library is loaded: what is installed runs on any x86-64.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define METAADAMW_HAS_CLONES
#define METAADAMW_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define METAADAMW_CLONES
#endif

namespace metaadamw {
namespace {

constexpr int kBlock = 1024;  // elements; five float64 buffers of it fill 40 KiB

// ---------------------------------------------------------------------------------------------- operands in and out of blocks

// One operand of one row.
struct Operand {
  char* data;  // null if the row has no such operand
  ElementType type;
  bool dense;
  const Shape* shape;  // of the row, if it is not dense throughout
  const int64_t* stride;

  Operand() = default;
  template <int N>
  Operand(const Table<N>& table, const Row<N>& row, int i)
      : data(row.data[i]),
        type(row.type[i]),
        dense(row.is_dense(i)),
        shape(row.layout < 0 ? nullptr : &table.layouts[row.layout].shape),
        stride(row.layout < 0 ? nullptr : table.layouts[row.layout].stride[i]) {}
};

// Calls run(offset in the operand, first element, number of elements) for each innermost run of the elements [begin, begin +
// count).
template <typename Run>
void for_each_run(const Operand& x, int64_t begin, int count, const Run& run) {
  const Shape& shape = *x.shape;
  const int64_t inner = shape.size[shape.dims - 1];
  for (int done = 0; done < count;) {
    const int64_t index = begin + done;
    const int n = static_cast<int>(std::min<int64_t>(count - done, inner - index % inner));
    run(strided_offset(shape, x.stride, index), done, n);
    done += n;
  }
}

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

#define METAADAMW_CONVERSIONS(T, S, name)                                           \
  METAADAMW_CLONES void load_##name(const S* from, int64_t stride, int n, T* to) {  \
    if (stride == 1) {                                                              \
      for (int i = 0; i < n; ++i) to[i] = static_cast<T>(from[i]);                  \
    } else {                                                                        \
      for (int i = 0; i < n; ++i) to[i] = static_cast<T>(from[i * stride]);         \
    }                                                                               \
  }                                                                                 \
  METAADAMW_CLONES void store_##name(const T* from, int64_t stride, int n, S* to) { \
    if (stride == 1) {                                                              \
      for (int i = 0; i < n; ++i) to[i] = static_cast<S>(from[i]);                  \
    } else {                                                                        \
      for (int i = 0; i < n; ++i) to[i * stride] = static_cast<S>(from[i]);         \
    }                                                                               \
  }

#define METAADAMW_LOAD_AND_STORE(T, S, name)                                                   \
  METAADAMW_CONVERSIONS(T, S, name)                                                            \
  void load(const S* from, int64_t stride, int n, T* to) { load_##name(from, stride, n, to); } \
  void store(const T* from, int64_t stride, int n, S* to) { store_##name(from, stride, n, to); }

METAADAMW_LOAD_AND_STORE(float, float, f32_f32)
METAADAMW_LOAD_AND_STORE(float, BFloat16, f32_bf16)
METAADAMW_LOAD_AND_STORE(double, double, f64_f64)
METAADAMW_LOAD_AND_STORE(double, float, f64_f32)
METAADAMW_LOAD_AND_STORE(double, BFloat16, f64_bf16)
METAADAMW_LOAD_AND_STORE(double, Half, f64_f16)

#ifdef METAADAMW_HAS_CLONES
METAADAMW_CONVERSIONS(float, Half, f32_f16)
// GCC does not find the instructions for float16 by itself, and an update of float16 takes six times as long without them. Every
// processor with AVX2 has them.
__attribute__((target("avx2,f16c"))) int load_f16c(const Half* from, int n, float* to) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  return i;
}
__attribute__((target("avx2,f16c"))) int store_f16c(const float* from, int n, Half* to) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  return i;
}
const bool has_f16c = __builtin_cpu_supports("avx2");

void load(const Half* from, int64_t stride, int n, float* to) {
  const int done = stride == 1 && has_f16c ? load_f16c(from, n, to) : 0;
  load_f32_f16(from + done * stride, stride, n - done, to + done);
}
void store(const float* from, int64_t stride, int n, Half* to) {
  const int done = stride == 1 && has_f16c ? store_f16c(from, n, to) : 0;
  store_f32_f16(from + done, stride, n - done, to + done * stride);
}
#else
METAADAMW_LOAD_AND_STORE(float, Half, f32_f16)
#endif
#undef METAADAMW_LOAD_AND_STORE
#undef METAADAMW_CONVERSIONS

// Calls f with a null pointer of the operand's element type. A float64 operand makes its row float64, so float never meets it.
template <typename T, typename F>
void with_element_type(ElementType type, const F& f) {
  switch (type) {
    case ElementType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case ElementType::kFloat16:
      return f(static_cast<Half*>(nullptr));
    case ElementType::kFloat32:
      return f(static_cast<float*>(nullptr));
    default:
      return f(static_cast<T*>(nullptr));
  }
}

template <typename T>
bool in_place(const Operand& x) {
  return x.dense && x.type == (std::is_same_v<T, double> ? ElementType::kFloat64 : ElementType::kFloat32);
}

template <typename T>
T* zeros() {
  static T block[kBlock] = {};  // only ever read
  return block;
}

// Zeros in place of an operand that the row does not have, for loops that write there.
template <typename T>
T* zeroed(T* buffer, int count) {
  std::fill_n(buffer, count, T(0));
  return buffer;
}

// The elements [begin, begin + count) of an operand: where they lie, or a copy in `buffer`; zeros if the row has no such operand.
template <typename T>
T* read(const Operand& x, int64_t begin, int count, T* buffer) {
  if (x.data == nullptr) {
    return zeros<T>();
  }
  if (in_place<T>(x)) {
    return reinterpret_cast<T*>(x.data) + begin;
  }
  with_element_type<T>(x.type, [&](auto* type) {
    const auto* data = reinterpret_cast<decltype(type)>(x.data);
    if (x.dense) {
      load(data + begin, 1, count, buffer);
    } else {
      const int64_t stride = x.stride[x.shape->dims - 1];
      for_each_run(x, begin, count, [&](int64_t offset, int first, int n) { load(data + offset, stride, n, buffer + first); });
    }
  });
  return buffer;
}

// The way back. Nothing to do for elements that were changed where they lie.
template <typename T>
void write(const Operand& x, int64_t begin, int count, const T* buffer) {
  if (x.data == nullptr || in_place<T>(x)) {
    return;
  }
  with_element_type<T>(x.type, [&](auto* type) {
    auto* data = reinterpret_cast<decltype(type)>(x.data);
    if (x.dense) {
      store(buffer, 1, count, data + begin);
    } else {
      const int64_t stride = x.stride[x.shape->dims - 1];
      for_each_run(x, begin, count, [&](int64_t offset, int first, int n) { store(buffer + first, stride, n, data + offset); });
    }
  });
}

}  // namespace
}  // namespace metaadamw
