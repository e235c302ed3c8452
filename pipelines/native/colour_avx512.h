// The colour conversion with AVX-512: a part of colour.h, which includes this file. The constants are explained in
// colour_avx2.h.

#pragma once

namespace colour {

// As Added, for 32 pixels.
struct AddedWide {
  __m512i r, g, b;
};
AVX512 AddedWide added_avx512(__m512i cb, __m512i cr) {
  const __m512i middle = _mm512_set1_epi16(128), one = _mm512_set1_epi16(1), half = _mm512_set1_epi32(1 << 15);
  const __m512i u = _mm512_sub_epi16(cb, middle), v = _mm512_sub_epi16(cr, middle);
  const __m512i u2 = _mm512_add_epi16(u, u), v2 = _mm512_add_epi16(v, v);
  const __m512i r = _mm512_srai_epi16(_mm512_add_epi16(_mm512_mulhi_epi16(v2, _mm512_set1_epi16(26345)), one), 1);
  const __m512i b = _mm512_srai_epi16(_mm512_add_epi16(_mm512_mulhi_epi16(u2, _mm512_set1_epi16(-14942)), one), 1);
  const __m512i weights = _mm512_set1_epi32((18734 << 16) | (-22554 & 0xFFFF));
  const __m512i low = _mm512_dpwssd_epi32(half, _mm512_unpacklo_epi16(u, v), weights);
  const __m512i high = _mm512_dpwssd_epi32(half, _mm512_unpackhi_epi16(u, v), weights);
  const __m512i g = _mm512_packs_epi32(_mm512_srai_epi32(low, 16), _mm512_srai_epi32(high, 16));
  return AddedWide{_mm512_add_epi16(v, r), _mm512_sub_epi16(g, v), _mm512_add_epi16(u2, b)};
}

// Permutation indices that interleave three channels of 64 pixels into three parts of 64 bytes: two_of takes red and
// green from two registers, and `third` takes blue where its bit of `is_third` is set.
struct WideInterleaving {
  alignas(64) uint8_t two_of[3][64] = {}, third[3][64] = {};
  uint64_t is_third[3] = {};

  constexpr WideInterleaving() {
    for (int part = 0; part < 3; ++part)
      for (int i = 0; i < 64; ++i) {
        const int at = 64 * part + i, channel = at % 3;
        two_of[part][i] = static_cast<uint8_t>(at / 3 + (channel == 1 ? 64 : 0));
        third[part][i] = static_cast<uint8_t>(at / 3);
        if (channel == 2) is_third[part] |= uint64_t{1} << i;
      }
  }
};
constexpr WideInterleaving WIDE_INTERLEAVING;

// A mask of the first `count` bytes of a register, or of all 64 if there are more.
AVX512 __mmask64 first_bytes(size_t count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

// Reads and writes nothing beyond the last pixel.
__attribute__((AVX512_TARGET)) inline void to_rgb_avx512(const uint8_t *y, const uint8_t *cb, const uint8_t *cr,
                                                         uint8_t *rgb, size_t n) {
  const __m512i zero = _mm512_setzero_si512();
  for (size_t i = 0; i < n; i += 64, rgb += 192) {
    const size_t left = n - i;
    const __mmask64 inside = first_bytes(left);
    const __m512i luma = _mm512_maskz_loadu_epi8(inside, y + i);
    const __m512i blue = _mm512_maskz_loadu_epi8(inside, cb + i);
    const __m512i red = _mm512_maskz_loadu_epi8(inside, cr + i);
    const AddedWide low = added_avx512(_mm512_unpacklo_epi8(blue, zero), _mm512_unpacklo_epi8(red, zero));
    const AddedWide high = added_avx512(_mm512_unpackhi_epi8(blue, zero), _mm512_unpackhi_epi8(red, zero));
    const __m512i y_low = _mm512_unpacklo_epi8(luma, zero), y_high = _mm512_unpackhi_epi8(luma, zero);
    const __m512i r = _mm512_packus_epi16(_mm512_add_epi16(y_low, low.r), _mm512_add_epi16(y_high, high.r));
    const __m512i g = _mm512_packus_epi16(_mm512_add_epi16(y_low, low.g), _mm512_add_epi16(y_high, high.g));
    const __m512i b = _mm512_packus_epi16(_mm512_add_epi16(y_low, low.b), _mm512_add_epi16(y_high, high.b));
    for (size_t part = 0; part < 3; ++part) {
      const __m512i two = _mm512_permutex2var_epi8(r, _mm512_load_si512(WIDE_INTERLEAVING.two_of[part]), g);
      const __m512i bytes = _mm512_mask_permutexvar_epi8(two, WIDE_INTERLEAVING.is_third[part],
                                                         _mm512_load_si512(WIDE_INTERLEAVING.third[part]), b);
      const size_t before = 64 * part, count = 3 * left > before ? 3 * left - before : 0;
      _mm512_mask_storeu_epi8(rgb + before, first_bytes(count), bytes);
    }
  }
}

}  // namespace colour
