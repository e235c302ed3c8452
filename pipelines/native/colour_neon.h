// The colour conversion with NEON: the part of colour.h for aarch64, which includes this file.

#pragma once

namespace colour {

// Converts 8 pixels. The constants are explained in colour_avx2.h; vqdmulh doubles the product, and vrshr rounds.
ALWAYS_INLINE void eight_neon(uint8x8_t y, uint8x8_t cb, uint8x8_t cr, uint8x8_t &r, uint8x8_t &g, uint8x8_t &b) {
  const uint8x8_t middle = vdup_n_u8(128);
  const int16x8_t u = vreinterpretq_s16_u16(vsubl_u8(cb, middle)), v = vreinterpretq_s16_u16(vsubl_u8(cr, middle));
  const int16x8_t red = vaddq_s16(v, vrshrq_n_s16(vqdmulhq_n_s16(v, 26345), 1));
  const int16x8_t blue = vaddq_s16(vaddq_s16(u, u), vrshrq_n_s16(vqdmulhq_n_s16(u, -14942), 1));
  const int32x4_t low = vmlal_n_s16(vmull_n_s16(vget_low_s16(u), -22554), vget_low_s16(v), 18734);
  const int32x4_t high = vmlal_n_s16(vmull_n_s16(vget_high_s16(u), -22554), vget_high_s16(v), 18734);
  const int16x8_t green = vsubq_s16(vcombine_s16(vrshrn_n_s32(low, 16), vrshrn_n_s32(high, 16)), v);
  const auto with_luma = [y](int16x8_t added) {
    return vqmovun_s16(vreinterpretq_s16_u16(vaddw_u8(vreinterpretq_u16_s16(added), y)));
  };
  r = with_luma(red);
  g = with_luma(green);
  b = with_luma(blue);
}

template <simd::Level LEVEL>
void to_rgb_vectors(const uint8_t *y, const uint8_t *cb, const uint8_t *cr, uint8_t *rgb, size_t n) {
  for (size_t i = 0; i < n; i += 16, rgb += 48) {
    const uint8x16_t luma = vld1q_u8(y + i), blue = vld1q_u8(cb + i), red = vld1q_u8(cr + i);
    uint8x8_t r[2], g[2], b[2];
    eight_neon(vget_low_u8(luma), vget_low_u8(blue), vget_low_u8(red), r[0], g[0], b[0]);
    eight_neon(vget_high_u8(luma), vget_high_u8(blue), vget_high_u8(red), r[1], g[1], b[1]);
    uint8x16x3_t pixels;
    pixels.val[0] = vcombine_u8(r[0], r[1]);
    pixels.val[1] = vcombine_u8(g[0], g[1]);
    pixels.val[2] = vcombine_u8(b[0], b[1]);
    vst3q_u8(rgb, pixels);
  }
}

}  // namespace colour
