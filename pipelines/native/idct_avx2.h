// The inverse DCT with AVX2: the part of idct.h for x86-64, which includes this file.

#pragma once

namespace idct {

// The AVX2 code transforms two blocks at once: each 128-bit half of a register belongs to one of them. The unpack and
// pack instructions of AVX2 work within the halves.
AVX2 __m256i pair(int a, int b) {
  return _mm256_set1_epi32(static_cast<int>(static_cast<uint32_t>(a & 0xFFFF) | static_cast<uint32_t>(b) << 16));
}

// Transforms the left or the right half of the eight columns with 32-bit sums.
template <int SHIFT>
AVX2 void half_of_columns_avx2(const __m256i in26, const __m256i in04, const __m256i in34, const __m256i in71,
                               const __m256i in53, __m256i *to) {
  const __m256i round = _mm256_set1_epi32(1 << (SHIFT - 1));
  const __m256i even3 = _mm256_madd_epi16(in26, pair(F_0_541 + F_0_765, F_0_541));
  const __m256i even2 = _mm256_madd_epi16(in26, pair(F_0_541, F_0_541 - F_1_847));
  const __m256i even0 = _mm256_add_epi32(_mm256_madd_epi16(in04, pair(8192, 8192)), round);
  const __m256i even1 = _mm256_add_epi32(_mm256_madd_epi16(in04, pair(8192, -8192)), round);
  const __m256i a = _mm256_add_epi32(even0, even3), d = _mm256_sub_epi32(even0, even3);
  const __m256i b = _mm256_add_epi32(even1, even2), c = _mm256_sub_epi32(even1, even2);
  const __m256i y3 = _mm256_madd_epi16(in34, pair(F_1_175 - F_1_961, F_1_175));
  const __m256i y4 = _mm256_madd_epi16(in34, pair(F_1_175, F_1_175 - F_0_390));
  const __m256i odd0 = _mm256_add_epi32(_mm256_madd_epi16(in71, pair(F_0_298 - F_0_899, -F_0_899)), y3);
  const __m256i odd3 = _mm256_add_epi32(_mm256_madd_epi16(in71, pair(-F_0_899, F_1_501 - F_0_899)), y4);
  const __m256i odd1 = _mm256_add_epi32(_mm256_madd_epi16(in53, pair(F_2_053 - F_2_562, -F_2_562)), y4);
  const __m256i odd2 = _mm256_add_epi32(_mm256_madd_epi16(in53, pair(-F_2_562, F_3_072 - F_2_562)), y3);
  to[0] = _mm256_srai_epi32(_mm256_add_epi32(a, odd3), SHIFT);
  to[7] = _mm256_srai_epi32(_mm256_sub_epi32(a, odd3), SHIFT);
  to[1] = _mm256_srai_epi32(_mm256_add_epi32(b, odd2), SHIFT);
  to[6] = _mm256_srai_epi32(_mm256_sub_epi32(b, odd2), SHIFT);
  to[2] = _mm256_srai_epi32(_mm256_add_epi32(c, odd1), SHIFT);
  to[5] = _mm256_srai_epi32(_mm256_sub_epi32(c, odd1), SHIFT);
  to[3] = _mm256_srai_epi32(_mm256_add_epi32(d, odd0), SHIFT);
  to[4] = _mm256_srai_epi32(_mm256_sub_epi32(d, odd0), SHIFT);
}

template <int SHIFT>
AVX2 void one_dimension_avx2(__m256i *v) {
  __m256i left[8], right[8];
  const __m256i z3 = _mm256_add_epi16(v[7], v[3]), z4 = _mm256_add_epi16(v[5], v[1]);
  half_of_columns_avx2<SHIFT>(_mm256_unpacklo_epi16(v[2], v[6]), _mm256_unpacklo_epi16(v[0], v[4]),
                              _mm256_unpacklo_epi16(z3, z4), _mm256_unpacklo_epi16(v[7], v[1]),
                              _mm256_unpacklo_epi16(v[5], v[3]), left);
  half_of_columns_avx2<SHIFT>(_mm256_unpackhi_epi16(v[2], v[6]), _mm256_unpackhi_epi16(v[0], v[4]),
                              _mm256_unpackhi_epi16(z3, z4), _mm256_unpackhi_epi16(v[7], v[1]),
                              _mm256_unpackhi_epi16(v[5], v[3]), right);
  for (int i = 0; i < 8; ++i) v[i] = _mm256_packs_epi32(left[i], right[i]);
}

AVX2 void transpose_avx2(__m256i *v) {
  __m256i a[8], b[8];
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_epi16(v[2 * i], v[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_epi16(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    const int k = 4 * i;  // a[k], a[k + 2]: left columns of rows k .. k + 3; a[k + 1], a[k + 3]: right
    b[k] = _mm256_unpacklo_epi32(a[k], a[k + 2]);
    b[k + 1] = _mm256_unpackhi_epi32(a[k], a[k + 2]);
    b[k + 2] = _mm256_unpacklo_epi32(a[k + 1], a[k + 3]);
    b[k + 3] = _mm256_unpackhi_epi32(a[k + 1], a[k + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = _mm256_unpacklo_epi64(b[i], b[i + 4]);
    v[2 * i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 4]);
  }
}

AVX2 void both_blocks(const int16_t *first, const int16_t *second, const uint16_t *quantizers, uint8_t *to_first,
                      uint8_t *to_second, size_t stride) {
  __m256i v[8];
  for (int i = 0; i < 8; ++i) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i *>(first + 8 * i));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i *>(second + 8 * i));
    const __m256i quantizer =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(quantizers + 8 * i)));
    v[i] = _mm256_mullo_epi16(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1), quantizer);
  }
  one_dimension_avx2<11>(v);
  transpose_avx2(v);
  one_dimension_avx2<18>(v);
  transpose_avx2(v);
  for (int i = 0; i < 8; i += 2) {
    const __m256i bytes = _mm256_xor_si256(_mm256_packs_epi16(v[i], v[i + 1]), _mm256_set1_epi8(-128));
    const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
    _mm_storel_epi64(reinterpret_cast<__m128i *>(to_first + i * stride), low);
    _mm_storel_epi64(reinterpret_cast<__m128i *>(to_first + (i + 1) * stride), _mm_unpackhi_epi64(low, low));
    _mm_storel_epi64(reinterpret_cast<__m128i *>(to_second + i * stride), high);
    _mm_storel_epi64(reinterpret_cast<__m128i *>(to_second + (i + 1) * stride), _mm_unpackhi_epi64(high, high));
  }
}

__attribute__((target("avx2"), noinline)) inline void two_blocks_avx2(const int16_t *first, const int16_t *second,
                                                                     const uint16_t *quantizers, uint8_t *to_first,
                                                                     uint8_t *to_second, size_t stride) {
  both_blocks(first, second, quantizers, to_first, to_second, stride);
}
// The same instructions, with the 32 registers of AVX-512 instead of 16.
__attribute__((AVX512_TARGET, noinline)) inline void two_blocks_avx512(const int16_t *first, const int16_t *second,
                                                                      const uint16_t *quantizers, uint8_t *to_first,
                                                                      uint8_t *to_second, size_t stride) {
  both_blocks(first, second, quantizers, to_first, to_second, stride);
}

template <simd::Level LEVEL>
ALWAYS_INLINE void two_blocks(const int16_t *first, const int16_t *second, const uint16_t *quantizers,
                              uint8_t *to_first, uint8_t *to_second, size_t stride) {
  if (LEVEL == simd::Level::WIDE) {
    two_blocks_avx512(first, second, quantizers, to_first, to_second, stride);
  } else {
    two_blocks_avx2(first, second, quantizers, to_first, to_second, stride);
  }
}

}  // namespace idct
