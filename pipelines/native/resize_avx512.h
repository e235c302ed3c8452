// The resize with AVX-512: a part of resize.h, which includes this file.

#pragma once

namespace crop {

constexpr uint32_t WIDE_STRIP = 2 * STRIP;
constexpr uint32_t WORDS = 32;  // 16-bit words of a register

AVX512 __m512i weighed_avx512(const uint8_t *bytes, __m512i weight) {
  const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(bytes)));
  return _mm512_mulhrs_epi16(_mm512_slli_epi16(words, FRACTION_BITS), weight);
}

AVX512 void weigh_strip_avx512(const uint8_t *rows, size_t stride, const int16_t *weights, uint32_t count,
                               int16_t *sums) {
  __m512i low = _mm512_setzero_si512(), high = low;
  for (uint32_t k = 0; k < count; ++k, rows += stride) {
    const __m512i weight = _mm512_set1_epi16(weights[k]);
    low = _mm512_add_epi16(low, weighed_avx512(rows, weight));
    high = _mm512_add_epi16(high, weighed_avx512(rows + WORDS, weight));
  }
  _mm512_storeu_si512(sums, low);
  _mm512_storeu_si512(sums + WORDS, high);
}

// n must be at least WIDE_STRIP: the last strip overlaps the one before it.
AVX512 void weigh_rows_avx512(const uint8_t *rows, size_t stride, const int16_t *weights, uint32_t count, int16_t *sums,
                              size_t n) {
  for (size_t i = 0; i + WIDE_STRIP <= n; i += WIDE_STRIP)
    weigh_strip_avx512(rows + i, stride, weights, count, sums + i);
  if (n % WIDE_STRIP != 0)
    weigh_strip_avx512(rows + n - WIDE_STRIP, stride, weights, count, sums + n - WIDE_STRIP);
}

// Whether the inputs of each four outputs fit into one register: up to a reduction of about 1.8. A permutation of its
// bytes can then bring each of them to its place.
inline bool are_near(const Taps &columns, uint32_t width) {
  for (uint32_t x = 0; x + 4 <= width; x += 4) {
    const uint32_t a = columns.first[x], b = columns.first[x + 3];  // the other way round in a mirrored crop
    if (3 * ((a < b ? b - a : a - b) + columns.count) > WORDS) return false;
  }
  return true;
}

// Lays out the column weights as the inner loop uses them. For each four outputs, `firsts` has their first input, and
// `to` (fours / 4, count / 2, 2) for each two inputs of an output the bytes at which they are found, and their weights.
// These registers hold four outputs, with four channels each, of which the last is not used, with two inputs each.
AVX512 void spread_columns_avx512(const Taps &columns, uint32_t fours, uint32_t *firsts, __m512i *to) {
  const __m512i output = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __m512i channel = _mm512_setr_epi32(0, 1, 2, 0, 0, 1, 2, 0, 0, 1, 2, 0, 0, 1, 2, 0);
  const __m512i each_byte = _mm512_set1_epi32(0x01010101), in_pair = _mm512_set1_epi32(0x07060100);
  const __m512i row = _mm512_mullo_epi32(output, _mm512_set1_epi32(static_cast<int>(columns.count)));
  for (uint32_t x = 0; x < fours; x += 4) {
    const uint32_t a = columns.first[x], b = columns.first[x + 3], low = a < b ? a : b;
    *firsts++ = low;
    const __m512i first = _mm512_permutexvar_epi32(
        output, _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i *>(columns.first + x))));
    const __m512i words = _mm512_add_epi32(
        _mm512_mullo_epi32(_mm512_sub_epi32(first, _mm512_set1_epi32(static_cast<int>(low))), _mm512_set1_epi32(3)),
        channel);
    for (uint32_t k = 0; k < columns.count; k += 2, to += 2) {
      const __m512i bytes = _mm512_slli_epi32(_mm512_add_epi32(words, _mm512_set1_epi32(static_cast<int>(3 * k))), 1);
      _mm512_store_si512(to, _mm512_add_epi32(_mm512_mullo_epi32(bytes, each_byte), in_pair));
      _mm512_store_si512(to + 1,
                         _mm512_i32gather_epi32(row, columns.weights + size_t{x} * columns.count + k, 2));
    }
  }
}

// Writes 4 bytes beyond the end of the output.
AVX512 void weigh_columns_avx512(const int16_t *sums, const uint32_t *firsts, const __m512i *spread, uint32_t pairs,
                                 uint8_t *output, uint32_t fours) {
  alignas(64) static constexpr uint8_t WITHOUT_GAPS[64] = {0, 4, 8, 16, 20, 24, 32, 36, 40, 48, 52, 56};
  const __m512i without_gaps = _mm512_load_si512(WITHOUT_GAPS);
  for (uint32_t x = 0; x < fours; x += 4, output += 12, spread += 2 * pairs) {
    const __m512i inputs = _mm512_loadu_si512(sums + 3 * size_t{*firsts++});
    __m512i sum = _mm512_set1_epi32(1 << (FRACTION_BITS + COLUMN_BITS - 1));
    for (uint32_t k = 0; k < pairs; ++k)
      sum = _mm512_dpwssd_epi32(sum, _mm512_permutexvar_epi8(spread[2 * k], inputs), spread[2 * k + 1]);
    // A result is between 0 and 255: weights and inputs are not negative.
    const __m512i bytes = _mm512_permutexvar_epi8(without_gaps, _mm512_srai_epi32(sum, FRACTION_BITS + COLUMN_BITS));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(output), _mm512_castsi512_si128(bytes));
  }
}

__attribute__((AVX512_TARGET, noinline)) inline void resize_avx512(const Pixels &source, const Taps &rows,
                                                                  const Taps &columns, int16_t *sums,
                                                                  uint32_t *firsts, __m512i *spread, uint8_t *last_row,
                                                                  uint8_t *output, uint32_t height, uint32_t width) {
  const size_t n = 3 * size_t{source.width};
  const uint32_t fours = width / 4 * 4, pairs = columns.count / 2;
  const Taps tail{columns.first + fours, columns.weights + size_t{fours} * columns.count, columns.count};
  spread_columns_avx512(columns, fours, firsts, spread);
  for (uint32_t y = 0; y < height; ++y, output += 3 * size_t{width}) {
    const uint8_t *from = source.rgb + rows.first[y] * source.stride;
    const int16_t *weights = rows.weights + size_t{y} * rows.count;
    uint32_t count = used(rows, y);
    if (n >= WIDE_STRIP && count <= FEW_ROWS) {
      weigh_rows_avx512(from, source.stride, weights, count, sums, n);
    } else {
      weigh_rows(from, source.stride, weights, count, sums, n);
    }
    uint8_t *to = y + 1 == height ? last_row : output;
    if (pairs == 1) {
      weigh_columns_avx512(sums, firsts, spread, 1, to, fours);
    } else if (pairs == 2) {
      weigh_columns_avx512(sums, firsts, spread, 2, to, fours);
    } else {
      weigh_columns_avx512(sums, firsts, spread, pairs, to, fours);
    }
    if (fours != width) weigh_columns(sums, tail, to + 3 * size_t{fours}, width - fours);
    if (to == last_row) std::memcpy(output, last_row, 3 * size_t{width});
  }
}

}  // namespace crop
