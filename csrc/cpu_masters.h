// What the update of bfloat16 and float16 parameters with float32 masters starts from, on the CPU: start_of_update over blocks.
#pragma once

#include "adamw.h"
#include "cpu_sums.h"

namespace metaadamw {
namespace {

template <typename T, typename S>
METAADAMW_CLONES void start_block_of(T* master, const S* low, int n) {
  for (int i = 0; i < n; ++i) {
    master[i] = start_of_update(master[i], static_cast<T>(static_cast<S>(master[i])), static_cast<T>(low[i]));
  }
}

template <typename S>
void start_block(double* master, const S* low, int n) {
  start_block_of(master, low, n);
}

// Rounded in words without a branch for NaN, which start_of_update is told of by `rounded`: so the compiler makes vectors of it.
METAADAMW_CLONES void start_block(float* master, const BFloat16* low, int n) {
  for (int i = 0; i < n; ++i) {
    uint32_t bits, low_bits = static_cast<uint32_t>(low[i].x) << 16;
    std::memcpy(&bits, master + i, sizeof bits);
    bits = (bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u;
    float rounded, written;
    std::memcpy(&rounded, &bits, sizeof rounded);
    std::memcpy(&written, &low_bits, sizeof written);
    const float x = master[i];
    master[i] = start_of_update(x, x == x ? rounded : x, written);
  }
}

#ifdef METAADAMW_HAS_CLONES
__attribute__((target("avx2,f16c"))) int start_block_f16c(float* master, const Half* low, int n) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 x = _mm256_loadu_ps(master + i);
    const __m256 rounded = _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    const __m256 written = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low + i)));
    const __m256 both_nan =
        _mm256_and_ps(_mm256_cmp_ps(rounded, rounded, _CMP_UNORD_Q), _mm256_cmp_ps(written, written, _CMP_UNORD_Q));
    const __m256 kept = _mm256_or_ps(_mm256_cmp_ps(rounded, written, _CMP_EQ_OQ), both_nan);
    _mm256_storeu_ps(master + i, _mm256_blendv_ps(written, x, kept));
  }
  return i;
}
#endif
void start_block(float* master, const Half* low, int n) {
  int done = 0;
#ifdef METAADAMW_HAS_CLONES
  done = has_f16c ? start_block_f16c(master, low, n) : 0;
#endif
  start_block_of(master + done, low + done, n - done);
}

// What the update of n <= kBlock elements starts from, in place of their masters.
template <typename T>
void take_up(const Operand& low_precision, int64_t first, int n, T* master) {
  const auto choose = [&](auto zero) {
    using Low = decltype(zero);
    Low gathered[kBlock];
    const Low* low = reinterpret_cast<const Low*>(low_precision.data) + first;
    if (!low_precision.dense) {
      T buffer[kBlock];
      store(read<T>(low_precision, first, n, buffer), 1, n, gathered);
      low = gathered;
    }
    for (int i = 0; i < n; i += 32) {  // a line of the cache at a time
      __builtin_prefetch(low + i + kPrefetch);
    }
    start_block(master, low, n);
  };
  low_precision.type == ElementType::kBFloat16 ? choose(BFloat16()) : choose(Half());
}

}  // namespace
}  // namespace metaadamw
