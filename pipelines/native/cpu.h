// Asks the processor which vector instructions it has, and the system whether it keeps their registers.
//
// __builtin_cpu_supports is not used: with Zig's compiler the table that it reads is always empty, so that the vector
// code would never run.

#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace cpu {

struct Features {
  bool avx2 = false;    // AVX2, BMI1, BMI2
  bool avx512 = false;  // all of that, and AVX-512 with F, BW, DQ, VL, VBMI, VNNI: Ice Lake, Zen 4 and later
};

inline Features ask() {
  Features features;
#if defined(__x86_64__)
  constexpr unsigned XSAVE = 1u << 27, YMM = 0x06, ZMM = 0xE6;              // YMM and ZMM: parts of XCR0
  constexpr unsigned AVX2 = 1u << 5 | 1u << 3 | 1u << 8;                    // and BMI1, BMI2
  constexpr unsigned AVX512_B = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  constexpr unsigned AVX512_C = 1u << 1 | 1u << 11;                         // VBMI, VNNI
  unsigned a = 0, b = 0, c = 0, d = 0, kept = 0, high = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & XSAVE) == 0) return features;
  __asm__ volatile("xgetbv" : "=a"(kept), "=d"(high) : "c"(0));
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
  features.avx2 = (kept & YMM) == YMM && (b & AVX2) == AVX2;
  features.avx512 = features.avx2 && (kept & ZMM) == ZMM && (b & AVX512_B) == AVX512_B && (c & AVX512_C) == AVX512_C;
#endif
  return features;
}

inline const Features &features() {
  static const Features asked = ask();
  return asked;
}

}  // namespace cpu
