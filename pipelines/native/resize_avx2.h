// The resize with AVX2: the part of resize.h for x86-64, which includes this file.

#pragma once

namespace crop {

AVX2 __m256i weighed_avx2(__m128i bytes, __m256i weight) {
  return _mm256_mulhrs_epi16(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), FRACTION_BITS), weight);
}

AVX2 void weigh_strip_avx2(const uint8_t *rows, size_t stride, const int16_t *weights, uint32_t count, int16_t *sums) {
  __m256i low = _mm256_setzero_si256(), high = low;
  for (uint32_t k = 0; k < count; ++k, rows += stride) {
    const __m256i weight = _mm256_set1_epi16(weights[k]);
    low = _mm256_add_epi16(low, weighed_avx2(_mm_loadu_si128(reinterpret_cast<const __m128i *>(rows)), weight));
    high = _mm256_add_epi16(high, weighed_avx2(_mm_loadu_si128(reinterpret_cast<const __m128i *>(rows + 16)), weight));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(sums), low);
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(sums + 16), high);
}

// n must be at least STRIP: the last strip overlaps the one before it.
AVX2 void weigh_rows_avx2(const uint8_t *rows, size_t stride, const int16_t *weights, uint32_t count, int16_t *sums,
                          size_t n) {
  for (size_t i = 0; i + STRIP <= n; i += STRIP) weigh_strip_avx2(rows + i, stride, weights, count, sums + i);
  if (n % STRIP != 0) weigh_strip_avx2(rows + n - STRIP, stride, weights, count, sums + n - STRIP);
}

// Lays out the column weights as the inner loop multiplies them: to (outputs / 2, count / 2) has the weights of two
// outputs for two inputs, repeated for each channel. Doing this once per image instead of in the inner loop takes the
// whole resize of an image from 195 to between 70 and 85 microseconds.
AVX2 void spread_weights_avx2(const Taps &taps, uint32_t outputs, __m256i *to) {
  for (uint32_t x = 0; x + 1 < outputs; x += 2)
    for (uint32_t k = 0; k < taps.count; k += 2) {
      int32_t first, second;
      std::memcpy(&first, taps.weights + size_t{x} * taps.count + k, 4);
      std::memcpy(&second, taps.weights + (size_t{x} + 1) * taps.count + k, 4);
      _mm256_store_si256(to++, _mm256_setr_epi32(first, first, first, first, second, second, second, second));
    }
}

// Returns two outputs: red, green and blue of each, in 32 bits.
AVX2 __m256i two_columns_avx2(const int16_t *sums, const uint32_t *firsts, const __m256i *weights, uint32_t pairs,
                              __m256i by_channel) {
  const int16_t *first = sums + 3 * size_t{firsts[0]}, *second = sums + 3 * size_t{firsts[1]};
  __m256i sum = _mm256_set1_epi32(1 << (FRACTION_BITS + COLUMN_BITS - 1));
  for (uint32_t k = 0; k < pairs; ++k, first += 6, second += 6) {
    const __m256i pixels = _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(first))),
        _mm_loadu_si128(reinterpret_cast<const __m128i *>(second)), 1);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, by_channel), weights[k]));
  }
  return _mm256_srai_epi32(sum, FRACTION_BITS + COLUMN_BITS);
}

// `width` must be a multiple of 4. Writes 4 bytes beyond the end of the output.
AVX2 void weigh_columns_avx2(const int16_t *sums, const uint32_t *firsts, const __m256i *weights, uint32_t pairs,
                             uint8_t *output, uint32_t width) {
  const __m256i by_channel = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, -128, -128, -128, -128));
  const __m128i without_gaps = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -128, -128, -128, -128);
  for (uint32_t x = 0; x < width; x += 4, output += 12, weights += 2 * pairs) {
    const __m256i words =
        _mm256_packs_epi32(two_columns_avx2(sums, firsts + x, weights, pairs, by_channel),
                           two_columns_avx2(sums, firsts + x + 2, weights + pairs, pairs, by_channel));
    const __m256i bytes = _mm256_packus_epi16(words, words);
    const __m128i four = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(output), _mm_shuffle_epi8(four, without_gaps));
  }
}

// weigh_columns_avx2 writes beyond the end of a row. Within the image, the next row overwrites these bytes; the last
// row is made in `last_row` and copied, because the bytes after the image belong to another sample.
__attribute__((target("avx2"), noinline)) inline void resize_avx2(const Pixels &source, const Taps &rows,
                                                                  const Taps &columns, int16_t *sums, __m256i *spread,
                                                                  uint8_t *last_row, uint8_t *output, uint32_t height,
                                                                  uint32_t width) {
  const size_t n = 3 * size_t{source.width};
  const uint32_t fours = width / 4 * 4, pairs = columns.count / 2;
  const Taps tail{columns.first + fours, columns.weights + size_t{fours} * columns.count, columns.count};
  spread_weights_avx2(columns, width, spread);
  for (uint32_t y = 0; y < height; ++y, output += 3 * size_t{width}) {
    const uint8_t *from = source.rgb + rows.first[y] * source.stride;
    const int16_t *weights = rows.weights + size_t{y} * rows.count;
    uint32_t count = used(rows, y);
    if (n >= STRIP && count <= FEW_ROWS) {
      weigh_rows_avx2(from, source.stride, weights, count, sums, n);
    } else {
      weigh_rows(from, source.stride, weights, count, sums, n);
    }
    uint8_t *to = y + 1 == height ? last_row : output;
    if (pairs == 1) {
      weigh_columns_avx2(sums, columns.first, spread, 1, to, fours);
    } else if (pairs == 2) {
      weigh_columns_avx2(sums, columns.first, spread, 2, to, fours);
    } else if (pairs == 3) {
      weigh_columns_avx2(sums, columns.first, spread, 3, to, fours);
    } else {
      weigh_columns_avx2(sums, columns.first, spread, pairs, to, fours);
    }
    if (fours != width) weigh_columns(sums, tail, to + 3 * size_t{fours}, width - fours);
    if (to == last_row) std::memcpy(output, last_row, 3 * size_t{width});
  }
}

}  // namespace crop
