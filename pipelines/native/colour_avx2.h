// The colour conversion with AVX2: the part of colour.h for x86-64, which includes this file.

#pragma once

namespace colour {

// The values that chroma adds to luma, for 16 pixels, in 16 bits each.
struct Added {
  __m256i r, g, b;
};
AVX2 Added added_avx2(__m256i cb, __m256i cr) {
  const __m256i middle = _mm256_set1_epi16(128), one = _mm256_set1_epi16(1), half = _mm256_set1_epi32(1 << 15);
  const __m256i u = _mm256_sub_epi16(cb, middle), v = _mm256_sub_epi16(cr, middle);
  const __m256i u2 = _mm256_add_epi16(u, u), v2 = _mm256_add_epi16(v, v);
  // 1.402 = 1 + 26345 / 2^16 and 1.772 = 2 - 14942 / 2^16; the products are rounded by (2 * product + 1) / 2.
  const __m256i r = _mm256_srai_epi16(_mm256_add_epi16(_mm256_mulhi_epi16(v2, _mm256_set1_epi16(26345)), one), 1);
  const __m256i b = _mm256_srai_epi16(_mm256_add_epi16(_mm256_mulhi_epi16(u2, _mm256_set1_epi16(-14942)), one), 1);
  // -46802 = 18734 - 2^16
  const __m256i weights = _mm256_set1_epi32((18734 << 16) | (-22554 & 0xFFFF));
  const __m256i low = _mm256_madd_epi16(_mm256_unpacklo_epi16(u, v), weights);
  const __m256i high = _mm256_madd_epi16(_mm256_unpackhi_epi16(u, v), weights);
  const __m256i g = _mm256_packs_epi32(_mm256_srai_epi32(_mm256_add_epi32(low, half), 16),
                                       _mm256_srai_epi32(_mm256_add_epi32(high, half), 16));
  return Added{_mm256_add_epi16(v, r), _mm256_sub_epi16(g, v), _mm256_add_epi16(u2, b)};
}

// Shuffle indices that interleave three channels of 16 pixels into three parts of 16 bytes. An index is negative where
// the byte belongs to another channel.
struct Interleaving {
  alignas(16) int8_t from[3][3][16] = {};  // (part, channel, byte)

  constexpr Interleaving() {
    for (int part = 0; part < 3; ++part)
      for (int channel = 0; channel < 3; ++channel)
        for (int i = 0; i < 16; ++i) {
          const int at = 16 * part + i;
          from[part][channel][i] = static_cast<int8_t>(at % 3 == channel ? at / 3 : -128);
        }
  }
};
constexpr Interleaving INTERLEAVING;

AVX2 __m256i spread(__m256i channel, int part, int which) {
  const __m128i from = _mm_load_si128(reinterpret_cast<const __m128i *>(INTERLEAVING.from[part][which]));
  return _mm256_shuffle_epi8(channel, _mm256_broadcastsi128_si256(from));
}

__attribute__((target("avx2"))) inline void to_rgb_avx2(const uint8_t *y, const uint8_t *cb, const uint8_t *cr,
                                                        uint8_t *rgb, size_t n) {
  const __m256i zero = _mm256_setzero_si256();
  for (size_t i = 0; i < n; i += 32, rgb += 96) {
    const __m256i luma = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(y + i));
    const __m256i blue = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(cb + i));
    const __m256i red = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(cr + i));
    const Added low = added_avx2(_mm256_unpacklo_epi8(blue, zero), _mm256_unpacklo_epi8(red, zero));
    const Added high = added_avx2(_mm256_unpackhi_epi8(blue, zero), _mm256_unpackhi_epi8(red, zero));
    const __m256i y_low = _mm256_unpacklo_epi8(luma, zero), y_high = _mm256_unpackhi_epi8(luma, zero);
    const __m256i r = _mm256_packus_epi16(_mm256_add_epi16(y_low, low.r), _mm256_add_epi16(y_high, high.r));
    const __m256i g = _mm256_packus_epi16(_mm256_add_epi16(y_low, low.g), _mm256_add_epi16(y_high, high.g));
    const __m256i b = _mm256_packus_epi16(_mm256_add_epi16(y_low, low.b), _mm256_add_epi16(y_high, high.b));
    for (int part = 0; part < 3; ++part) {
      const __m256i bytes =
          _mm256_or_si256(spread(r, part, 0), _mm256_or_si256(spread(g, part, 1), spread(b, part, 2)));
      _mm_storeu_si128(reinterpret_cast<__m128i *>(rgb + 16 * part), _mm256_castsi256_si128(bytes));
      _mm_storeu_si128(reinterpret_cast<__m128i *>(rgb + 48 + 16 * part), _mm256_extracti128_si256(bytes, 1));
    }
  }
}

}  // namespace colour
