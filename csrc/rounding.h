// Stochastic rounding: to one of the two neighbours, to the nearer one more often, so that the mean of many roundings is the number
// itself. A bfloat16 parameter rounded to the nearest does not move at all while its updates are smaller than half of its last bit.
//
// The random bits are a hash of (seed, step, tensor, operand, element): no state, the same at every run and on every device. No
// torch types: compiled by the host compiler and by nvcc.
#pragma once

#include <cstring>

#include "table.h"

namespace metaadamw {

// A permutation of 32-bit numbers in which each bit depends on all: C. Wellons, "Prospecting for hash functions" (2018), lowbias32.
METAADAMW_INLINE uint32_t scrambled(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// What makes the random bits of one operand of one tensor in one step. Elements are counted in 32 bits within it, so those from
// 2^32 on have another key. So have steps from 2^32 on; below, the high half of their number changes nothing.
constexpr uint32_t kRoundedOperands = 5;  // of any rule: the bits stay what they are when an operand is added
METAADAMW_INLINE uint32_t rounding_key(int64_t seed, double step, int64_t tensor, int operand, int64_t first_element) {
  uint32_t key = scrambled(static_cast<uint32_t>(seed));
  key = scrambled(key ^ static_cast<uint32_t>(seed >> 32));
  const auto whole_step = static_cast<int64_t>(step);
  key = scrambled(key ^ static_cast<uint32_t>(whole_step) ^ static_cast<uint32_t>(whole_step >> 32) * 0x9e3779b9u);
  key = scrambled(key ^ static_cast<uint32_t>(tensor));
  return scrambled(key ^ (static_cast<uint32_t>(first_element >> 32) * kRoundedOperands + operand));
}

METAADAMW_INLINE uint32_t random_bits(uint32_t key, uint32_t element) { return scrambled(element ^ key); }

// A float32 that is a bfloat16: the low half of the bits is what would be lost. Infinities and NaN stay.
METAADAMW_INLINE float round_to_bfloat16(float x, uint32_t random) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + (random >> 16)) & 0xffff0000u;
  bits = (bits & 0x7f800000u) == 0x7f800000u ? bits : rounded;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

// A float32 that is a float16, or so large that it becomes an infinity. Below 2^-14 the float16 are the multiples of 2^-24.
METAADAMW_INLINE float round_to_float16(float x, uint32_t random) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + (random >> 19)) & 0xffffe000u;
  const uint32_t normal = (bits & 0x7f800000u) == 0x7f800000u ? bits : rounded;
  const float magnitude = (x < 0 ? -x : x) * 0x1p24f;
  const bool is_small = magnitude < 0x1p10f;
  const int whole = static_cast<int>(is_small ? magnitude : 0.0f);
  const float fraction = magnitude - static_cast<float>(whole);
  const float up = static_cast<float>(static_cast<int>(random >> 8)) * 0x1p-24f < fraction ? 1.0f : 0.0f;
  const float small = (static_cast<float>(whole) + up) * 0x1p-24f;
  uint32_t small_bits;
  std::memcpy(&small_bits, &small, sizeof small_bits);
  bits = is_small ? small_bits | (bits & 0x80000000u) : normal;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

// What is to be stored as `type`, which then is no rounding any more. Wider types are left as they are.
template <typename T>
METAADAMW_INLINE T round_stochastically(T x, ElementType type, uint32_t random) {
  return type == ElementType::kBFloat16  ? static_cast<T>(round_to_bfloat16(static_cast<float>(x), random))
         : type == ElementType::kFloat16 ? static_cast<T>(round_to_float16(static_cast<float>(x), random))
                                         : x;
}

}  // namespace metaadamw
