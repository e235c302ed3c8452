# The libraries ask __builtin_cpu_supports which instructions the processor has. It reads a table of the compiler's
# runtime library. Zig's has the table but never fills it, so AVX2 would never be used: five times slower, and silent.
# Where the answer is wrong, cpu_model.c provides the table.

include(CheckCXXSourceRuns)

set(cpu_model)
if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  return() # the libraries ask for no instructions of other processors
endif()
if(CMAKE_CROSSCOMPILING)
  message(FATAL_ERROR "The libraries for x86-64 are built on x86-64, where __builtin_cpu_supports can be tried.")
endif()

set(cpu_model_check
    "#include <cpuid.h>
int main() {
  unsigned a = 0, b = 0, c = 0, d = 0, low = 0, high = 0;
  bool avx2 = false, bmi2 = false;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    avx2 = b >> 5 & 1;
    bmi2 = b >> 8 & 1;
  }
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) avx2 = false;
  else {
    __asm__ volatile(\"xgetbv\" : \"=a\"(low), \"=d\"(high) : \"c\"(0));
    avx2 = avx2 && (low & 6) == 6;
  }
  return avx2 != !!__builtin_cpu_supports(\"avx2\") || bmi2 != !!__builtin_cpu_supports(\"bmi2\");
}")
check_cxx_source_runs("${cpu_model_check}" SDPNET_CPU_SUPPORTS_IS_RIGHT)
if(NOT SDPNET_CPU_SUPPORTS_IS_RIGHT)
  set(cpu_model "${CMAKE_CURRENT_SOURCE_DIR}/cpu_model.c")
  file(READ "${cpu_model}" cpu_model_text)
  check_cxx_source_runs("extern \"C\" {\n${cpu_model_text}\n}\n${cpu_model_check}" SDPNET_CPU_MODEL_IS_RIGHT)
  if(NOT SDPNET_CPU_MODEL_IS_RIGHT)
    message(FATAL_ERROR "__builtin_cpu_supports of this compiler does not know the processor, and cpu_model.c does not help.")
  endif()
endif()
