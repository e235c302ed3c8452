// Detects at run time which instructions the processor has.

#pragma once

#define ALWAYS_INLINE __attribute__((always_inline)) inline

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2"), always_inline)) inline
#endif

namespace simd {

inline bool avx2() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2");
  return has;
#else
  return false;
#endif
}

}  // namespace simd
