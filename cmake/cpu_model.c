/* The table behind __builtin_cpu_supports, for compilers whose runtime library does not fill it (see cpu_model.cmake).
   The layout and the numbers of the bits are those of libgcc and of LLVM's compiler-rt, which programs depend on. */

#include <cpuid.h>

struct SdpnetCpuModel {
  unsigned vendor, type, subtype, features[1];
};

__attribute__((visibility("hidden"))) struct SdpnetCpuModel __cpu_model = {0, 0, 0, {0}};

__attribute__((constructor(101))) static void sdpnet_fill_cpu_model(void) {
  enum { AVX2 = 10, BMI = 16, BMI2 = 17 };
  unsigned a = 0, b = 0, c = 0, d = 0, low = 0, high = 0, ymm = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return;
  if (c >> 27 & 1) { /* the system saves extended registers */
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    ymm = (low & 6) == 6;
  }
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
  __cpu_model.features[0] = (ymm && (b >> 5 & 1) ? 1u << AVX2 : 0) | (b >> 3 & 1) << BMI | (b >> 8 & 1) << BMI2;
}
