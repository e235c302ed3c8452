// CRC-32 (zlib's) by carry-less multiplication: V. Gopal et al., Fast CRC Computation for Generic Polynomials Using
// PCLMULQDQ Instruction, Intel 2009. Four times as fast as zlib's tables.

#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace crc32 {

inline bool available() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  return has;
#else
  return false;
#endif
}

#if defined(__x86_64__)
#define PCLMUL __attribute__((target("sse4.1,pclmul")))

PCLMUL inline __m128i folded(__m128i value, __m128i constants, __m128i next) {
  return _mm_xor_si128(next, _mm_xor_si128(_mm_clmulepi64_si128(value, constants, 0x00),
                                           _mm_clmulepi64_si128(value, constants, 0x11)));
}

PCLMUL inline __m128i load(const uint8_t *from) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(from)); }

// Of whole 16 bytes, at least 64, without the inversions before and after.
PCLMUL inline uint32_t of_blocks(const uint8_t *data, size_t size, uint32_t crc) {
  const __m128i by_64 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4), by_16 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
  __m128i lanes[4];
  for (int i = 0; i < 4; ++i) lanes[i] = load(data + 16 * i);
  lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi32_si128(static_cast<int>(crc)));
  for (data += 64, size -= 64; size >= 64; data += 64, size -= 64)
    for (int i = 0; i < 4; ++i) lanes[i] = folded(lanes[i], by_64, load(data + 16 * i));
  __m128i x = lanes[0];
  for (int i = 1; i < 4; ++i) x = folded(x, by_16, lanes[i]);
  for (; size >= 16; data += 16, size -= 16) x = folded(x, by_16, load(data));
  const __m128i low_words = _mm_setr_epi32(-1, 0, -1, 0);
  x = _mm_xor_si128(_mm_srli_si128(x, 8), _mm_clmulepi64_si128(x, by_16, 0x10));
  x = _mm_xor_si128(_mm_srli_si128(x, 4),
                    _mm_clmulepi64_si128(_mm_and_si128(x, low_words), _mm_set_epi64x(0, 0x0163cd6124), 0x00));
  const __m128i barrett = _mm_set_epi64x(0x01f7011641, 0x01db710641);
  __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(x, low_words), barrett, 0x10);
  quotient = _mm_clmulepi64_si128(_mm_and_si128(quotient, low_words), barrett, 0x00);
  return static_cast<uint32_t>(_mm_extract_epi32(_mm_xor_si128(x, quotient), 1));
}
#undef PCLMUL
#endif

// Only where `available`.
inline uint32_t of(const uint8_t *data, size_t size) {
  uint32_t crc = 0xFFFFFFFF;
#if defined(__x86_64__)
  if (size >= 64) {
    const size_t blocks = size & ~size_t{15};
    crc = of_blocks(data, blocks, crc);
    data += blocks;
    size -= blocks;
  }
#endif
  for (; size != 0; --size) {
    crc ^= *data++;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (0xEDB88320 & (0 - (crc & 1)));
  }
  return ~crc;
}

}  // namespace crc32
