// The resize with NEON: the part of resize.h for aarch64, which includes this file.

#pragma once

namespace crop {

// vqrdmulh is (2 * a * b + 2^15) >> 16, which is what AVX2's pmulhrsw gives for all inputs but two of -32768.
ALWAYS_INLINE int16x8_t weighed_neon(uint8x8_t bytes, int16_t weight) {
  return vqrdmulhq_n_s16(vreinterpretq_s16_u16(vshll_n_u8(bytes, FRACTION_BITS)), weight);
}

ALWAYS_INLINE void weigh_strip_neon(const uint8_t *rows, size_t stride, const int16_t *weights, uint32_t count,
                                    int16_t *sums) {
  int16x8_t total[STRIP / 8];
  for (uint32_t i = 0; i < STRIP / 8; ++i) total[i] = vdupq_n_s16(0);
  for (uint32_t k = 0; k < count; ++k, rows += stride)
    for (uint32_t i = 0; i < STRIP / 16; ++i) {
      const uint8x16_t bytes = vld1q_u8(rows + 16 * i);
      total[2 * i] = vaddq_s16(total[2 * i], weighed_neon(vget_low_u8(bytes), weights[k]));
      total[2 * i + 1] = vaddq_s16(total[2 * i + 1], weighed_neon(vget_high_u8(bytes), weights[k]));
    }
  for (uint32_t i = 0; i < STRIP / 8; ++i) vst1q_s16(sums + 8 * i, total[i]);
}

// n must be at least STRIP: the last strip overlaps the one before it.
ALWAYS_INLINE void weigh_rows_neon(const uint8_t *rows, size_t stride, const int16_t *weights, uint32_t count,
                                   int16_t *sums, size_t n) {
  for (size_t i = 0; i + STRIP <= n; i += STRIP) weigh_strip_neon(rows + i, stride, weights, count, sums + i);
  if (n % STRIP != 0) weigh_strip_neon(rows + n - STRIP, stride, weights, count, sums + n - STRIP);
}

// Returns one output: red, green and blue in 16 bits, and a fourth value that does not matter.
ALWAYS_INLINE int16x4_t column_neon(const int16_t *sums, const int16_t *weights, uint32_t count) {
  int32x4_t sum = vdupq_n_s32(1 << (FRACTION_BITS + COLUMN_BITS - 1));
  for (uint32_t k = 0; k < count; ++k, sums += 3) sum = vmlal_n_s16(sum, vld1_s16(sums), weights[k]);
  return vqmovn_s32(vshrq_n_s32(sum, FRACTION_BITS + COLUMN_BITS));
}

// `width` must be a multiple of 4. Writes 4 bytes beyond the end of the output.
ALWAYS_INLINE void weigh_columns_neon(const int16_t *sums, const uint32_t *firsts, const int16_t *weights,
                                      uint32_t count, uint8_t *output, uint32_t width) {
  const uint8_t order[16] = {0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 255, 255, 255, 255};
  const uint8x16_t without_gaps = vld1q_u8(order);
  const auto column = [&](uint32_t x) {
    return column_neon(sums + 3 * size_t{firsts[x]}, weights + size_t{x} * count, count);
  };
  for (uint32_t x = 0; x < width; x += 4, output += 12) {
    const uint8x8_t first = vqmovun_s16(vcombine_s16(column(x), column(x + 1)));
    const uint8x8_t second = vqmovun_s16(vcombine_s16(column(x + 2), column(x + 3)));
    vst1q_u8(output, vqtbl1q_u8(vcombine_u8(first, second), without_gaps));
  }
}

// weigh_columns_neon writes beyond the end of a row. Within the image, the next row overwrites these bytes; the last
// row is made in `last_row` and copied, because the bytes after the image belong to another sample.
inline bool resize_vectors(const Pixels &source, const Taps &rows, const Taps &columns, int16_t *sums,
                           ResizeScratch &scratch, uint8_t *output, uint32_t height, uint32_t width) {
  const size_t n = 3 * size_t{source.width};
  const uint32_t fours = width / 4 * 4;
  const Taps tail{columns.first + fours, columns.weights + size_t{fours} * columns.count, columns.count};
  for (uint32_t y = 0; y < height; ++y, output += 3 * size_t{width}) {
    const uint8_t *from = source.rgb + rows.first[y] * source.stride;
    const int16_t *weights = rows.weights + size_t{y} * rows.count;
    const uint32_t count = used(rows, y);
    if (n >= STRIP && count <= FEW_ROWS) {
      weigh_rows_neon(from, source.stride, weights, count, sums, n);
    } else {
      weigh_rows(from, source.stride, weights, count, sums, n);
    }
    uint8_t *to = y + 1 == height ? scratch.last_row.data : output;
    if (columns.count == 2) {  // the loops over a known number of weights are unrolled
      weigh_columns_neon(sums, columns.first, columns.weights, 2, to, fours);
    } else if (columns.count == 4) {
      weigh_columns_neon(sums, columns.first, columns.weights, 4, to, fours);
    } else if (columns.count == 6) {
      weigh_columns_neon(sums, columns.first, columns.weights, 6, to, fours);
    } else {
      weigh_columns_neon(sums, columns.first, columns.weights, columns.count, to, fours);
    }
    if (fours != width) weigh_columns(sums, tail, to + 3 * size_t{fours}, width - fours);
    if (to == scratch.last_row.data) std::memcpy(output, to, 3 * size_t{width});
  }
  return true;
}

}  // namespace crop
