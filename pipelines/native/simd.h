// Knows the instruction sets: which vector code the compiler builds, and whether the processor at hand can run it.
//
// The decoder's vector code is in *_avx2.h for x86-64 and in *_neon.h for aarch64. Processors of another kind have the
// plain code only. All of them give the same bytes.

#pragma once

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "needs a processor that stores the lowest byte first"
#endif

#define ALWAYS_INLINE __attribute__((always_inline)) inline

#if defined(__x86_64__)
#include <immintrin.h>
#define SIMD_AVX2 1
#define AVX2 __attribute__((target("avx2"), always_inline)) inline
#define VECTOR_TARGET target("avx2,bmi,bmi2,lzcnt"), noinline  // attributes of a function that may use vector code
#elif defined(__aarch64__)
#include <arm_neon.h>
#define SIMD_NEON 1
#define VECTOR_TARGET noinline
#else
#define VECTOR_TARGET noinline
#endif

namespace simd {

inline bool avx2() {
#if SIMD_AVX2
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2");
  return has;
#else
  return false;
#endif
}

// Whether there is vector code for this processor. Every processor of the kind aarch64 has NEON.
inline bool vectors() {
#if SIMD_NEON
  return true;
#else
  return avx2();
#endif
}

}  // namespace simd
