// Antialiased bilinear resize of a box, as in Pillow and torchvision: a triangle filter as wide as the reduction.
//
// Rows are weighted first, then columns. The arithmetic is fixed-point: integer sums do not depend on their order, so
// that the plain and the vector code give the same bytes. Sums of rows have 16 bits, 7 of them fractional (255 levels
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
  simd::Level level = simd::level();
  Memory row_taps, row_weights, column_taps, column_weights, spread_weights, firsts, sums, last_row;
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

inline void resize_plain(const Pixels &source, const Taps &rows, const Taps &columns, int16_t *sums, uint8_t *output,
                         uint32_t height, uint32_t width) {
  for (uint32_t y = 0; y < height; ++y) {
    weigh_rows(source.rgb + rows.first[y] * source.stride, source.stride, rows.weights + size_t{y} * rows.count,
               used(rows, y), sums, 3 * size_t{source.width});
    weigh_columns(sums, columns, output + 3 * size_t{width} * y, width);
  }
}

}  // namespace crop

// resize_vectors: the same as resize_plain, with `scratch` for what it needs besides. Returns false if memory is short.
#if SIMD_X86
#include "resize_avx2.h"
#include "resize_avx512.h"
namespace crop {
inline bool resize_vectors(const Pixels &source, const Taps &rows, const Taps &columns, int16_t *sums,
                           ResizeScratch &scratch, uint8_t *output, uint32_t height, uint32_t width) {
  const bool wide = scratch.level == simd::Level::WIDE && are_near(columns, width);
  if (!scratch.spread_weights.reserve(size_t{width} * columns.count * (wide ? 16 : 8))) return false;
  uint8_t *spread = scratch.spread_weights.data, *last_row = scratch.last_row.data;
  if (!wide) {
    resize_avx2(source, rows, columns, sums, reinterpret_cast<__m256i *>(spread), last_row, output, height, width);
    return true;
  }
  if (!scratch.firsts.reserve(width * sizeof(uint32_t))) return false;
  uint32_t *firsts = reinterpret_cast<uint32_t *>(scratch.firsts.data);
  resize_avx512(source, rows, columns, sums, firsts, reinterpret_cast<__m512i *>(spread), last_row, output, height,
                width);
  return true;
}
}  // namespace crop
#elif SIMD_NEON
#include "resize_neon.h"
#else
namespace crop {
inline bool resize_vectors(const Pixels &source, const Taps &rows, const Taps &columns, int16_t *sums,
                           ResizeScratch &, uint8_t *output, uint32_t height, uint32_t width) {
  resize_plain(source, rows, columns, sums, output, height, width);
  return true;
}
}  // namespace crop
#endif

namespace crop {

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
  if (scratch.level != simd::Level::PLAIN)
    return resize_vectors(source, rows, columns, sums, scratch, output, height, width);
  resize_plain(source, rows, columns, sums, output, height, width);
  return true;
}

}  // namespace crop
