// The inverse DCT with NEON: the part of idct.h for aarch64, which includes this file.

#pragma once

namespace idct {

// a * first + b * second with 32-bit sums
ALWAYS_INLINE int32x4_t madd_neon(int16x4_t a, int16x4_t b, int first, int second) {
  return vmlal_n_s16(vmull_n_s16(a, static_cast<int16_t>(first)), b, static_cast<int16_t>(second));
}

// Shifts sums down and saturates them to 16 bits. `round` is in them already: an instruction that rounds as it shifts
// does not wrap around as the plain code does.
template <int SHIFT>
ALWAYS_INLINE int16x4_t narrow_neon(int32x4_t sums) {
  return vqmovn_s32(vshrq_n_s32(sums, SHIFT));
}

// Transforms four of the eight columns. v: 8 rows of four values; z3, z4: the sums of rows 7 and 3, and of 5 and 1.
template <int SHIFT>
ALWAYS_INLINE void half_of_columns_neon(const int16x4_t *v, int16x4_t z3, int16x4_t z4, int16x4_t *to) {
  const int32x4_t round = vdupq_n_s32(1 << (SHIFT - 1));
  const int32x4_t even3 = madd_neon(v[2], v[6], F_0_541 + F_0_765, F_0_541);
  const int32x4_t even2 = madd_neon(v[2], v[6], F_0_541, F_0_541 - F_1_847);
  const int32x4_t even0 = vaddq_s32(vshll_n_s16(v[0], 13), vaddq_s32(vshll_n_s16(v[4], 13), round));
  const int32x4_t even1 = vaddq_s32(vshll_n_s16(v[0], 13), vsubq_s32(round, vshll_n_s16(v[4], 13)));
  const int32x4_t a = vaddq_s32(even0, even3), d = vsubq_s32(even0, even3);
  const int32x4_t b = vaddq_s32(even1, even2), c = vsubq_s32(even1, even2);
  const int32x4_t y3 = madd_neon(z3, z4, F_1_175 - F_1_961, F_1_175);
  const int32x4_t y4 = madd_neon(z3, z4, F_1_175, F_1_175 - F_0_390);
  const int32x4_t odd0 = vaddq_s32(madd_neon(v[7], v[1], F_0_298 - F_0_899, -F_0_899), y3);
  const int32x4_t odd3 = vaddq_s32(madd_neon(v[7], v[1], -F_0_899, F_1_501 - F_0_899), y4);
  const int32x4_t odd1 = vaddq_s32(madd_neon(v[5], v[3], F_2_053 - F_2_562, -F_2_562), y4);
  const int32x4_t odd2 = vaddq_s32(madd_neon(v[5], v[3], -F_2_562, F_3_072 - F_2_562), y3);
  to[0] = narrow_neon<SHIFT>(vaddq_s32(a, odd3));
  to[7] = narrow_neon<SHIFT>(vsubq_s32(a, odd3));
  to[1] = narrow_neon<SHIFT>(vaddq_s32(b, odd2));
  to[6] = narrow_neon<SHIFT>(vsubq_s32(b, odd2));
  to[2] = narrow_neon<SHIFT>(vaddq_s32(c, odd1));
  to[5] = narrow_neon<SHIFT>(vsubq_s32(c, odd1));
  to[3] = narrow_neon<SHIFT>(vaddq_s32(d, odd0));
  to[4] = narrow_neon<SHIFT>(vsubq_s32(d, odd0));
}

template <int SHIFT>
ALWAYS_INLINE void one_dimension_neon(int16x8_t *v) {
  const int16x8_t z3 = vaddq_s16(v[7], v[3]), z4 = vaddq_s16(v[5], v[1]);
  int16x4_t half[8], left[8], right[8];
  for (int i = 0; i < 8; ++i) half[i] = vget_low_s16(v[i]);
  half_of_columns_neon<SHIFT>(half, vget_low_s16(z3), vget_low_s16(z4), left);
  for (int i = 0; i < 8; ++i) half[i] = vget_high_s16(v[i]);
  half_of_columns_neon<SHIFT>(half, vget_high_s16(z3), vget_high_s16(z4), right);
  for (int i = 0; i < 8; ++i) v[i] = vcombine_s16(left[i], right[i]);
}

ALWAYS_INLINE void transpose_neon(int16x8_t *v) {
  int32x4_t a[8];
  int64x2_t b[8];
  for (int i = 0; i < 8; i += 2) {  // pairs of rows: even and odd columns
    a[i] = vreinterpretq_s32_s16(vtrn1q_s16(v[i], v[i + 1]));
    a[i + 1] = vreinterpretq_s32_s16(vtrn2q_s16(v[i], v[i + 1]));
  }
  for (int i = 0; i < 8; i += 4)  // four rows: columns 0 and 4, 1 and 5, 2 and 6, 3 and 7
    for (int k = 0; k < 2; ++k) {
      b[i + k] = vreinterpretq_s64_s32(vtrn1q_s32(a[i + k], a[i + k + 2]));
      b[i + k + 2] = vreinterpretq_s64_s32(vtrn2q_s32(a[i + k], a[i + k + 2]));
    }
  for (int i = 0; i < 4; ++i) {
    v[i] = vreinterpretq_s16_s64(vtrn1q_s64(b[i], b[i + 4]));
    v[i + 4] = vreinterpretq_s16_s64(vtrn2q_s64(b[i], b[i + 4]));
  }
}

inline void block_neon(const int16_t *coefficients, const uint16_t *quantizers, uint8_t *pixels, size_t stride) {
  int16x8_t v[8];
  for (int i = 0; i < 8; ++i)
    v[i] = vmulq_s16(vld1q_s16(coefficients + 8 * i), vreinterpretq_s16_u16(vld1q_u16(quantizers + 8 * i)));
  one_dimension_neon<11>(v);
  transpose_neon(v);
  one_dimension_neon<18>(v);
  transpose_neon(v);
  for (size_t i = 0; i < 8; ++i)
    vst1_u8(pixels + i * stride, veor_u8(vreinterpret_u8_s8(vqmovn_s16(v[i])), vdup_n_u8(128)));
}

template <simd::Level LEVEL>
void two_blocks(const int16_t *first, const int16_t *second, const uint16_t *quantizers, uint8_t *to_first,
                       uint8_t *to_second, size_t stride) {
  block_neon(first, quantizers, to_first, stride);
  if (second != first) block_neon(second, quantizers, to_second, stride);
}

}  // namespace idct
