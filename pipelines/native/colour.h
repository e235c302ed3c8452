// Upsamples chroma and converts YCbCr to RGB, row by row. The results are bit-identical to libjpeg's "fancy" upsampling
// and colour conversion, because crops from this decoder and from libjpeg-turbo must be the same.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace colour {

// Interpolates a row between two rows of chroma: sums (n + 2) = 3 * near + far, starting one sample before the first.
ALWAYS_INLINE void mix_rows(const uint8_t *near, const uint8_t *far, uint16_t *sums, size_t n) {
  for (size_t i = 0; i < n + 2; ++i) sums[i] = static_cast<uint16_t>(3 * near[i] + far[i]);
}

ALWAYS_INLINE void put_two(uint8_t *output, uint32_t first, uint32_t second) {
  const uint16_t both = static_cast<uint16_t>(first | second << 8);
  std::memcpy(output, &both, sizeof both);
}

// The three functions below write two output samples for each input sample. Their input has n + 2 samples and starts
// one sample before the row. The first two interpolate, with weights 3/4 for the sample and 1/4 for its neighbour.
ALWAYS_INLINE void widen_sums(const uint16_t *sums, uint8_t *output, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    const uint16_t here = static_cast<uint16_t>(3 * sums[i + 1]);
    const uint16_t first = static_cast<uint16_t>(here + sums[i] + 8);
    const uint16_t second = static_cast<uint16_t>(here + sums[i + 2] + 7);
    put_two(output + 2 * i, first >> 4, second >> 4);
  }
}
ALWAYS_INLINE void widen_samples(const uint8_t *row, uint8_t *output, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    const uint16_t here = static_cast<uint16_t>(3 * row[i + 1]);
    const uint16_t first = static_cast<uint16_t>(here + row[i] + 1);
    const uint16_t second = static_cast<uint16_t>(here + row[i + 2] + 2);
    put_two(output + 2 * i, first >> 2, second >> 2);
  }
}
ALWAYS_INLINE void repeat_samples(const uint8_t *row, uint8_t *output, size_t n) {
  for (size_t i = 0; i < n; ++i) put_two(output + 2 * i, row[i + 1], row[i + 1]);
}
// Interpolates a row between two rows of chroma. `upper` says which of the two output rows of `near` is computed.
ALWAYS_INLINE void mix_samples(const uint8_t *near, const uint8_t *far, bool upper, uint8_t *output, size_t n) {
  const uint32_t bias = upper ? 1 : 2;
  for (size_t i = 0; i < n; ++i) output[i] = static_cast<uint8_t>((3u * near[i + 1] + far[i + 1] + bias) >> 2);
}

inline uint8_t clamp(int32_t value) { return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value); }

// rgb: uint8 (n, 3)
ALWAYS_INLINE void to_rgb(const uint8_t *y, const uint8_t *cb, const uint8_t *cr, uint8_t *rgb, size_t n) {
  for (size_t i = 0; i < n; ++i, rgb += 3) {
    const int32_t u = cb[i] - 128, v = cr[i] - 128;
    rgb[0] = clamp(y[i] + ((91881 * v + 32768) >> 16));
    rgb[1] = clamp(y[i] + ((-22554 * u - 46802 * v + 32768) >> 16));
    rgb[2] = clamp(y[i] + ((116130 * u + 32768) >> 16));
  }
}

inline void grey_to_rgb(const uint8_t *y, uint8_t *rgb, size_t n) {
  for (size_t i = 0; i < n; ++i, rgb += 3) rgb[0] = rgb[1] = rgb[2] = y[i];
}

}  // namespace colour

// to_rgb_vectors: as to_rgb, but it may read and write up to 31 pixels beyond the last. LEVEL is not PLAIN.
#if SIMD_X86
#include "colour_avx2.h"
#include "colour_avx512.h"
namespace colour {
template <simd::Level LEVEL>
ALWAYS_INLINE void to_rgb_vectors(const uint8_t *y, const uint8_t *cb, const uint8_t *cr, uint8_t *rgb, size_t n) {
  if (LEVEL == simd::Level::WIDE) {
    to_rgb_avx512(y, cb, cr, rgb, n);
  } else {
    to_rgb_avx2(y, cb, cr, rgb, n);
  }
}
}  // namespace colour
#elif SIMD_NEON
#include "colour_neon.h"
#else
namespace colour {
template <simd::Level LEVEL>
void to_rgb_vectors(const uint8_t *y, const uint8_t *cb, const uint8_t *cr, uint8_t *rgb, size_t n) {
  to_rgb(y, cb, cr, rgb, n);
}
}  // namespace colour
#endif
