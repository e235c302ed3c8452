// The inverse DCT of libjpeg's JDCT_ISLOW (Loeffler, Ligtenberg and Moschytz, 1989). The results are bit-identical to
// libjpeg's, because a crop must not depend on which of the two decoders made it.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace idct {

// The constants of the algorithm, multiplied by 2^13.
constexpr int F_0_298 = 2446, F_0_390 = 3196, F_0_541 = 4433, F_0_765 = 6270, F_0_899 = 7373, F_1_175 = 9633,
              F_1_501 = 12299, F_1_847 = 15137, F_1_961 = 16069, F_2_053 = 16819, F_2_562 = 20995, F_3_072 = 25172;

inline uint8_t clamp(int32_t value) { return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value); }

// Transforms 8 values, `stride` apart, and calls out(i, value) for each result.
//
// Sums wrap around as they do in the vector instructions: sums of two inputs at 16 bits, all others at 32 bits. They
// overflow only with coefficients that no encoder makes. For those, libjpeg's SIMD and C code give different pixels,
// but our two versions must give the same ones.
template <int SHIFT, typename Out>
inline void one_dimension(const int16_t *in, size_t stride, Out out) {
  const auto at = [&](size_t i) { return static_cast<uint32_t>(int32_t{in[i * stride]}); };
  const auto sum_of = [&](size_t i, size_t k) {
    return static_cast<uint32_t>(int32_t{static_cast<int16_t>(in[i * stride] + in[k * stride])});
  };
  const uint32_t even0 = (at(0) + at(4)) * 8192, even1 = (at(0) - at(4)) * 8192;
  const uint32_t even2 = at(2) * F_0_541 + at(6) * (F_0_541 - F_1_847);
  const uint32_t even3 = at(2) * (F_0_541 + F_0_765) + at(6) * F_0_541;
  const uint32_t a = even0 + even3, d = even0 - even3, b = even1 + even2, c = even1 - even2;
  const uint32_t z3 = sum_of(7, 3), z4 = sum_of(5, 1);
  const uint32_t y3 = z3 * (F_1_175 - F_1_961) + z4 * F_1_175, y4 = z3 * F_1_175 + z4 * (F_1_175 - F_0_390);
  const uint32_t odd0 = at(7) * (F_0_298 - F_0_899) - at(1) * F_0_899 + y3;
  const uint32_t odd1 = at(5) * (F_2_053 - F_2_562) - at(3) * F_2_562 + y4;
  const uint32_t odd2 = at(3) * (F_3_072 - F_2_562) - at(5) * F_2_562 + y3;
  const uint32_t odd3 = at(1) * (F_1_501 - F_0_899) - at(7) * F_0_899 + y4;
  const uint32_t sums[8] = {a + odd3, b + odd2, c + odd1, d + odd0, d - odd0, c - odd1, b - odd2, a - odd3};
  constexpr uint32_t ROUND = uint32_t{1} << (SHIFT - 1);
  for (int i = 0; i < 8; ++i) out(i, static_cast<int32_t>(sums[i] + ROUND) >> SHIFT);
}

inline int16_t saturate(int32_t value) {
  return static_cast<int16_t>(value < -32768 ? -32768 : value > 32767 ? 32767 : value);
}

// Transforms a block. coefficients and quantizers: (8, 8). pixels: 8 rows, `stride` bytes apart.
//
// The first pass keeps two fractional bits (a shift by 11 instead of 13), as libjpeg's does; the second removes them,
// and the factor of 8 of a two-dimensional DCT, with a shift by 18.
inline void block_plain(const int16_t *coefficients, const uint16_t *quantizers, uint8_t *pixels, size_t stride) {
  int16_t columns[64], products[64];
  for (int i = 0; i < 64; ++i) products[i] = static_cast<int16_t>(coefficients[i] * quantizers[i]);
  for (size_t x = 0; x < 8; ++x)
    one_dimension<11>(products + x, 8, [&](int y, int32_t value) { columns[8 * y + x] = saturate(value); });
  for (size_t y = 0; y < 8; ++y)
    one_dimension<18>(columns + 8 * y, 1, [&](int x, int32_t value) {
      pixels[y * stride + x] = clamp(saturate(value) + 128);
    });
}

// The value of all pixels of a block without AC coefficients.
inline uint8_t only_dc(int16_t coefficient, uint16_t quantizer) {
  return clamp(((static_cast<int16_t>(coefficient * quantizer) + 4) >> 3) + 128);
}

inline void fill(uint8_t *pixels, size_t stride, uint8_t value) {
  for (size_t y = 0; y < 8; ++y) std::memset(pixels + y * stride, value, 8);
}

#if defined(__x86_64__)
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

// Transforms two blocks and writes each to its own place.
__attribute__((target("avx2"))) inline void two_blocks_avx2(const int16_t *first, const int16_t *second,
                                                            const uint16_t *quantizers, uint8_t *to_first,
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
#endif

}  // namespace idct
