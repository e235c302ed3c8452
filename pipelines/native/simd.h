// Knows the instruction sets: which vector code the compiler builds, and which of it the processor at hand can run.
//
// The decoder's vector code is in *_avx2.h and *_avx512.h for x86-64, and in *_neon.h for aarch64. Processors of another
// kind have the plain code only. All of them give the same bytes.

#pragma once

#include "cpu.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "needs a processor that stores the lowest byte first"
#endif

#define ALWAYS_INLINE __attribute__((always_inline)) inline

// *_TARGET: attributes of a function that may use such instructions.
#if defined(__x86_64__)
#if !defined(__clang__)  // GCC 12 warns of its own _mm512_undefined_epi32 (its bug 105593)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#define SIMD_X86 1
#define AVX2 __attribute__((target("avx2"), always_inline)) inline
#define VECTOR_TARGET target("avx2,bmi,bmi2,lzcnt"), noinline
#ifndef AVX512_TARGET  // tests emulate the instructions
#define AVX512_FEATURES "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx2,bmi,bmi2,lzcnt"
#if defined(__clang__)
#define AVX512_TARGET target(AVX512_FEATURES)
#else
#define AVX512_TARGET target(AVX512_FEATURES ",prefer-vector-width=512")  // GCC's own loops, too
#endif
#endif
#define AVX512 __attribute__((AVX512_TARGET, always_inline)) inline
#elif defined(__aarch64__)
#include <arm_neon.h>
#define SIMD_NEON 1
#define VECTOR_TARGET noinline
#else
#define VECTOR_TARGET noinline
#endif

namespace simd {

// What a processor can run; each can run those before it, too.
enum class Level {
  PLAIN,
  VECTORS,  // AVX2 or NEON
  WIDE,     // AVX-512
};

inline Level level() {
#if defined(SIMD_LEVEL)  // tests choose one
  return SIMD_LEVEL;
#elif SIMD_NEON  // every processor of the kind aarch64 has it
  return Level::VECTORS;
#else
  return cpu::features().avx512 ? Level::WIDE : cpu::features().avx2 ? Level::VECTORS : Level::PLAIN;
#endif
}

inline bool avx2() {
#if SIMD_X86
  return level() >= Level::VECTORS;
#else
  return false;
#endif
}

}  // namespace simd
