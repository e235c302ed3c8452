// Antialiased bilinear resize of a box, as in Pillow and torchvision: a triangle filter as wide as the reduction.
//
// Rows are weighted first, then columns. The arithmetic is fixed-point: integer sums do not depend on their order, so
// that the plain and the AVX2 code give the same bytes. Sums of rows have 16 bits, 7 of them fractional (255 levels
// then take 15 bits), and the vector instructions handle 16 of them at once. Sums of columns have 32 bits.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "memory.h"
#include "simd.h"
#include "task.h"

namespace crop {

struct ResizeScratch {  // one for each thread
  bool avx2 = simd::avx2();
  Memory row_taps, row_weights, column_taps, column_weights, spread_weights, sums, last_row;
};

constexpr int FRACTION_BITS = 7;                // fractional bits of a weighted sum of rows
constexpr int ROW_BITS = 15, COLUMN_BITS = 14;  // fractional bits of the weights
constexpr uint32_t STRIP = 32;                  // the number of elements that are weighted at a time
// Up to this number of rows, each product is rounded to 16 bits on its own, which is what the fast instruction
// (pmulhrsw) does. The sum is then off by at most 1/16 of a level. With more rows the roundings add up to more than 16
// bits hold: over 254 white rows, white became black. Then the products are summed in 32 bits and rounded once.
constexpr uint32_t FEW_ROWS = 16;

// The weights of a resize in one direction. Output i is the weighted sum of `count` inputs, starting at first[i].
struct Taps {
  uint32_t *first;   // (outputs,)
  int16_t *weights;  // (outputs, count): 0 for inputs that an output does not need
  uint32_t count;    // even, because the column pass multiplies two inputs at a time
};

// Computes the weights. The weights of an output add up to 2^bits, except that 1.0 in 15 bits is 32767; the rounding
// error goes to the largest weight. If `mirror`, the outputs are in reverse order. Returns false if memory is short.
inline bool make_taps(Memory &firsts, Memory &weights, double start, double box, uint32_t length, uint32_t outputs,
                      int bits, bool mirror, Taps &taps) {
  const double scale = box / outputs, reach = scale > 1 ? scale : 1, inverse = 1 / reach;
  taps.count = (static_cast<uint32_t>(std::ceil(2 * reach)) + 1) & ~1u;
  if (!firsts.reserve(outputs * sizeof *taps.first)) return false;
  if (!weights.reserve(size_t{outputs} * taps.count * sizeof *taps.weights)) return false;
  taps.first = reinterpret_cast<uint32_t *>(firsts.data);
  taps.weights = reinterpret_cast<int16_t *>(weights.data);
  const int32_t one = 1 << bits;
  for (uint32_t i = 0; i < outputs; ++i) {
    const double centre = start + (i + 0.5) * scale, low = centre - reach + 0.5;
    const uint32_t first = low < 0 ? 0 : static_cast<uint32_t>(low);
    uint32_t end = static_cast<uint32_t>(centre + reach + 0.5);  // one beyond the last input
    end = end > length ? length : end;
    const uint32_t n = end - first < taps.count ? end - first : taps.count;
    const uint32_t at = mirror ? outputs - 1 - i : i;
    int16_t *to = taps.weights + size_t{at} * taps.count;
    const double offset = first + 0.5 - centre;
    double total = 0;
    for (uint32_t k = 0; k < n; ++k) total += 1 - std::fabs(k + offset) * inverse;
    const double factor = one / total;
    int32_t rest = one;
    uint32_t largest = 0;
    for (uint32_t k = 0; k < n; ++k) {
      const int32_t rounded = static_cast<int32_t>((1 - std::fabs(k + offset) * inverse) * factor + 0.5);
      to[k] = static_cast<int16_t>(rounded > 32767 ? 32767 : rounded);
      rest -= rounded;
      if (to[k] > to[largest]) largest = k;
    }
    for (uint32_t k = n; k < taps.count; ++k) to[k] = 0;
    const int32_t corrected = to[largest] + rest;
    to[largest] = static_cast<int16_t>(corrected > 32767 ? 32767 : corrected);
    taps.first[at] = first;
  }
  return true;
}

// The number of weights that an output needs. Inputs beyond the last row of the image are never needed, and thus not
// read.
inline uint32_t used(const Taps &taps, uint32_t output) {
  const int16_t *weights = taps.weights + size_t{output} * taps.count;
  uint32_t count = taps.count;
  while (count > 1 && weights[count - 1] == 0) --count;
  return count;
}

// sums (n): the weighted sum of `count` rows, which are `stride` bytes apart.
ALWAYS_INLINE void weigh_rows(const uint8_t *rows, size_t stride, const int16_t *weights, uint32_t count, int16_t *sums,
                              size_t n) {
  constexpr int EXCESS = ROW_BITS - FRACTION_BITS;
  for (size_t i = 0; i < n; ++i) {
    int32_t sum = 0;
    for (uint32_t k = 0; k < count; ++k) {
      const int32_t product = rows[k * stride + i] * weights[k];
      sum += count <= FEW_ROWS ? (product + (1 << (EXCESS - 1))) >> EXCESS : product;
    }
    sums[i] = static_cast<int16_t>(count <= FEW_ROWS ? sum : (sum + (1 << (EXCESS - 1))) >> EXCESS);
  }
}

// Weights the columns of a row of sums. output: uint8 (width, 3).
ALWAYS_INLINE void weigh_columns(const int16_t *sums, const Taps &taps, uint8_t *output, uint32_t width) {
  constexpr int SHIFT = FRACTION_BITS + COLUMN_BITS;
  for (uint32_t x = 0; x < width; ++x)
    for (size_t c = 0; c < 3; ++c) {
      int32_t sum = 1 << (SHIFT - 1);
      for (uint32_t k = 0; k < taps.count; ++k)
        sum += sums[3 * (size_t{taps.first[x]} + k) + c] * taps.weights[size_t{x} * taps.count + k];
      output[3 * size_t{x} + c] = static_cast<uint8_t>(sum >> SHIFT);  // the sum is at most 255 * 2^7 * 2^14 + 2^20
    }
}

#if defined(__x86_64__)
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
#endif

// Resizes the box of `source`. output: uint8 (height, width, 3). If `flip`, the output is mirrored left-right. Returns
// false if memory is short.
inline bool resize(const Pixels &source, uint8_t *output, uint32_t height, uint32_t width, bool flip,
                   ResizeScratch &scratch) {
  Taps rows, columns;
  if (!make_taps(scratch.row_taps, scratch.row_weights, source.top, source.box_height, source.height, height, ROW_BITS,
                 false, rows) ||
      !make_taps(scratch.column_taps, scratch.column_weights, source.left, source.box_width, source.width, width,
                 COLUMN_BITS, flip, columns))
    return false;
  const size_t n = 3 * size_t{source.width}, beyond = 3 * size_t{columns.count} + STRIP;
  if (!scratch.sums.reserve((n + beyond) * sizeof(int16_t)) || !scratch.last_row.reserve(3 * size_t{width} + 16))
    return false;
  int16_t *sums = reinterpret_cast<int16_t *>(scratch.sums.data);
  std::memset(sums + n, 0, beyond * sizeof *sums);
#if defined(__x86_64__)
  if (scratch.avx2) {
    if (!scratch.spread_weights.reserve(size_t{width} * columns.count * 8)) return false;
    resize_avx2(source, rows, columns, sums, reinterpret_cast<__m256i *>(scratch.spread_weights.data),
                scratch.last_row.data, output, height, width);
    return true;
  }
#endif
  for (uint32_t y = 0; y < height; ++y) {
    weigh_rows(source.rgb + rows.first[y] * source.stride, source.stride, rows.weights + size_t{y} * rows.count,
               used(rows, y), sums, n);
    weigh_columns(sums, columns, output + 3 * size_t{width} * y, width);
  }
  return true;
}

}  // namespace crop
