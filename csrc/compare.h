// What depends on which of two numbers is larger, or on a sign: of numbers and, on the CPU, of vectors of them. No torch types:
// compiled by the host compiler and by nvcc.
#pragma once

#include <cmath>
#include <type_traits>

#include "table.h"

namespace metaadamw {

// The bits of a vector of numbers, on the CPU. GCC takes comparisons of whole vectors apart, number by number, in loops that it
// compiles for several instruction sets: an update then takes some fifteen times as long. So vectors are told by their bits.
template <typename V>
struct VectorBits {
  using Type = decltype(V{} < V{});  // integers as wide
  static constexpr int kWidth = 8 * sizeof(V{}[0]);
  static METAADAMW_INLINE Type sign(Type x) { return x & (Type)(-V{}); }
  static METAADAMW_INLINE Type of_magnitude(Type x) { return x & ~(Type)(-V{}); }
  // All bits set where the number is one.
  static METAADAMW_INLINE Type is_nan(Type x) { return ((Type)(V{} + __builtin_inf()) - of_magnitude(x)) >> (kWidth - 1); }
  // All bits set where the number is neither 0 nor NaN.
  static METAADAMW_INLINE Type is_signed(Type x) { return (-of_magnitude(x) >> (kWidth - 1)) & ~is_nan(x); }
};

// The larger of two, and NaN if either is, as torch.maximum.
template <typename V>
METAADAMW_INLINE V nan_maximum(V a, V b) {
  if constexpr (std::is_floating_point_v<V>) {
    return (a >= b) | (a != a) ? a : b;
  } else {
    using B = VectorBits<V>;
    using Type = typename B::Type;
    const Type of_a = (Type)a, of_b = (Type)b, above = (Type)(b - a);
    const Type takes_b = (B::is_signed(above) & ~(above >> (B::kWidth - 1)) | B::is_nan(of_b)) & ~B::is_nan(of_a);
    return (V)((of_a & ~takes_b) | (of_b & takes_b));
  }
}

template <typename V>
METAADAMW_INLINE V magnitude(V x) {
  if constexpr (std::is_floating_point_v<V>) {
    return std::fabs(x);
  } else {
    return (V)VectorBits<V>::of_magnitude((typename VectorBits<V>::Type)x);
  }
}

// -1, 0 or 1; of NaN 0.
template <typename V>
METAADAMW_INLINE V sign_of(V x) {
  if constexpr (std::is_floating_point_v<V>) {
    return static_cast<V>(x > 0 ? 1 : x < 0 ? -1 : 0);
  } else {
    using B = VectorBits<V>;
    const auto bits = (typename B::Type)x;
    return (V)(((typename B::Type)(V{} + 1) | B::sign(bits)) & B::is_signed(bits));
  }
}

// The sign of a - b; 0 if one is NaN or both are infinite alike.
template <typename V>
METAADAMW_INLINE V sign_of_difference(V a, V b) {
  if constexpr (std::is_floating_point_v<V>) {
    return static_cast<V>(a > b ? 1 : a < b ? -1 : 0);
  } else {
    return sign_of(a - b);
  }
}

// x, with the other sign where `sign`, which is -1, 0 or 1, is negative.
template <typename V>
METAADAMW_INLINE V negated_where_negative(V sign, V x) {
  if constexpr (std::is_floating_point_v<V>) {
    return sign < 0 ? -x : x;
  } else {
    using Type = typename VectorBits<V>::Type;
    return (V)((Type)x ^ VectorBits<V>::sign((Type)sign));
  }
}

// 1 of a number that is not 0, and of NaN; else 0.
template <typename V>
METAADAMW_INLINE V one_where_nonzero(V x) {
  if constexpr (std::is_floating_point_v<V>) {
    return static_cast<V>(x != 0 ? 1 : 0);
  } else {
    using B = VectorBits<V>;
    using Type = typename B::Type;
    return (V)((Type)(V{} + 1) & (-B::of_magnitude((Type)x) >> (B::kWidth - 1)));
  }
}

// x where `sign`, which is -1, 0 or 1, is positive; else 0.
template <typename V>
METAADAMW_INLINE V where_positive(V sign, V x) {
  if constexpr (std::is_floating_point_v<V>) {
    return sign > 0 ? x : V(0);
  } else {
    using Type = typename VectorBits<V>::Type;
    return (V)((Type)x & (-(Type)sign >> (VectorBits<V>::kWidth - 1)) & ~((Type)sign >> (VectorBits<V>::kWidth - 1)));
  }
}

}  // namespace metaadamw
