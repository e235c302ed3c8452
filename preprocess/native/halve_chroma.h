// Averages the samples of a chroma plane two by two. Input and output are DCT coefficients.
//
// Averaging and the DCT are linear, so the coefficients of a halved block are a linear function of those of the four
// blocks that it replaces. This saves the inverse and the forward DCT, and the rounding to 8 bits between them. Of 443
// ImageNet originals within 500 pixels, 367 are 4:4:4 and need this step when they are re-encoded as 4:2:0.
//
// Blocks at the right and the bottom edge are transformed to samples, because libjpeg repeats the outermost samples of
// the image there.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../../pipelines/native/huffman.h"
#include "../../pipelines/native/simd.h"

namespace halve {

constexpr int SIDE = 8;
typedef float Row __attribute__((vector_size(32)));

struct Matrices {
  float fold[SIDE];       // averages pairs of samples of a block: x[k] * fold[k] - x[8 - k] * fold[8 - k]
  float odd[4][4];        // the odd frequencies of the merged block, from the folded frequencies
  float dct[SIDE][SIDE];  // (frequency, sample)
};

inline const Matrices &matrices() {
  static const Matrices made = [] {
    Matrices m{};
    const double pi = std::acos(-1.0);
    for (int k = 0; k < SIDE; ++k) {
      // The factor 0.5 is the norm of the 4-point DCT and that of the even frequencies of the 8-point DCT.
      m.fold[k] = static_cast<float>(0.5 * (k == 0 ? 1.0 : std::cos(k * pi / 16)));
      for (int j = 0; j < SIDE; ++j)
        m.dct[k][j] = static_cast<float>((k == 0 ? std::sqrt(0.125) : 0.5) * std::cos((2 * j + 1) * k * pi / 16));
    }
    for (int k = 0; k < 4; ++k)
      for (int n = 0; n < 4; ++n) {
        double sum = 0;
        for (int j = 0; j < 4; ++j)
          sum += std::cos((2 * j + 1) * (2 * k + 1) * pi / 16) * std::cos((2 * j + 1) * n * pi / 8);
        m.odd[k][n] = static_cast<float>(0.5 * std::sqrt(2.0) * (n == 0 ? 0.5 : std::sqrt(0.5)) * sum);
      }
    return m;
  }();
  return made;
}

// The factors of a component's coefficients before and after the step, in natural order (vertical frequency, horizontal
// frequency).
struct Scales {
  float fold[huffman::BLOCK];  // the quantizer, multiplied by Matrices::fold of both frequencies
  float quantizer[huffman::BLOCK];
  float target[huffman::BLOCK];    // 1 / quantizer of the halved plane, transposed
  int16_t limits[huffman::BLOCK];  // the largest magnitude of a coefficient that comes from an image

  void make(const uint16_t *source, const uint16_t *halved, int max_value) {  // natural order
    const Matrices &m = matrices();
    for (int v = 0; v < SIDE; ++v)
      for (int u = 0; u < SIDE; ++u) {
        const int k = SIDE * v + u;
        quantizer[k] = source[k];
        limits[k] = static_cast<int16_t>(max_value / source[k]);
        fold[k] = static_cast<float>(source[k]) * m.fold[v] * m.fold[u];
        target[SIDE * u + v] = 1.0f / static_cast<float>(halved[k]);
      }
  }
};

// Returns whether all coefficients of `count` blocks are within their limits.
inline bool within_plain(const int16_t *blocks, size_t count, const Scales &scales) {
  bool all = true;
  for (size_t i = 0; i < count * huffman::BLOCK; ++i) {
    const int limit = scales.limits[i % huffman::BLOCK];
    all &= blocks[i] <= limit && blocks[i] >= -limit;
  }
  return all;
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) inline bool within_avx2(const int16_t *blocks, size_t count, const Scales &scales) {
  __m256i beyond = _mm256_setzero_si256();
  for (; count != 0; --count, blocks += huffman::BLOCK)
    for (int k = 0; k < huffman::BLOCK; k += 16) {
      const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(blocks + k));
      const __m256i limits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(scales.limits + k));
      beyond = _mm256_or_si256(beyond, _mm256_cmpgt_epi16(_mm256_abs_epi16(values), limits));
    }
  return _mm256_testz_si256(beyond, beyond) != 0;
}
#endif

// Merges two blocks to one of half their total length, in one direction. The inputs are 8 frequencies each, already
// multiplied by Scales::fold; the output is the 8 frequencies of the averaged samples of both blocks.
ALWAYS_INLINE void merge(const Row *first, const Row *second, Row *merged, const float (*odd)[4]) {
  Row difference[4];
  for (int k = 0; k < 4; ++k) {
    const Row a = k == 0 ? first[0] : first[k] - first[SIDE - k];
    const Row b = k == 0 ? second[0] : second[k] - second[SIDE - k];
    merged[2 * k] = k % 2 == 0 ? a + b : a - b;
    difference[k] = k % 2 == 0 ? a - b : a + b;
  }
  for (int k = 0; k < 4; ++k) {
    Row sum = difference[0] * odd[k][0];
    for (int n = 1; n < 4; ++n) sum += difference[n] * odd[k][n];
    merged[2 * k + 1] = sum;
  }
}

inline void load_plain(const int16_t *block, const float *scales, Row *rows) {
  for (int v = 0; v < SIDE; ++v)
    for (int u = 0; u < SIDE; ++u) rows[v][u] = static_cast<float>(block[SIDE * v + u]) * scales[SIDE * v + u];
}

ALWAYS_INLINE void divide(const Row *rows, const float *factors, float *output) {
  for (int u = 0; u < SIDE; ++u)
    for (int v = 0; v < SIDE; ++v) output[SIDE * u + v] = rows[u][v] * factors[SIDE * u + v];
}

inline void transpose_plain(const Row *in, Row *out) {
  for (int v = 0; v < SIDE; ++v)
    for (int u = 0; u < SIDE; ++u) out[u][v] = in[v][u];
}

#if defined(__x86_64__)
AVX2 void load_avx2(const int16_t *block, const float *scales, Row *rows) {
  for (int v = 0; v < SIDE; ++v) {
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i *>(block + SIDE * v));
    rows[v] = reinterpret_cast<Row>(
        _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(values)), _mm256_loadu_ps(scales + SIDE * v)));
  }
}

AVX2 void transpose_avx2(const Row *in, Row *out) {
  __m256 a[8], b[8];
  for (int i = 0; i < 4; ++i) {
    const __m256 x = reinterpret_cast<__m256>(in[2 * i]), y = reinterpret_cast<__m256>(in[2 * i + 1]);
    a[2 * i] = _mm256_unpacklo_ps(x, y);
    a[2 * i + 1] = _mm256_unpackhi_ps(x, y);
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j) {
      b[4 * i + 2 * j] = _mm256_shuffle_ps(a[4 * i + j], a[4 * i + 2 + j], 0x44);
      b[4 * i + 2 * j + 1] = _mm256_shuffle_ps(a[4 * i + j], a[4 * i + 2 + j], 0xEE);
    }
  for (int i = 0; i < 4; ++i) {
    out[i] = reinterpret_cast<Row>(_mm256_permute2f128_ps(b[i], b[i + 4], 0x20));
    out[i + 4] = reinterpret_cast<Row>(_mm256_permute2f128_ps(b[i], b[i + 4], 0x31));
  }
}
#endif

// Merges two by two blocks to one. The output is transposed, and divided by the quantizers but not rounded.
inline void four_blocks_plain(const int16_t *const (&blocks)[4], const Scales &scales, float *output) {
  const float(*odd)[4] = matrices().odd;
  Row upper[SIDE], lower[SIDE], merged[SIDE], turned[2][SIDE];
  for (int side = 0; side < 2; ++side) {
    load_plain(blocks[side], scales.fold, upper);
    load_plain(blocks[2 + side], scales.fold, lower);
    merge(upper, lower, merged, odd);
    transpose_plain(merged, turned[side]);
  }
  merge(turned[0], turned[1], merged, odd);
  divide(merged, scales.target, output);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) inline void four_blocks_avx2(const int16_t *const (&blocks)[4], const Scales &scales,
                                                             float *output) {
  const float(*odd)[4] = matrices().odd;
  Row upper[SIDE], lower[SIDE], merged[SIDE], turned[2][SIDE];
  for (int side = 0; side < 2; ++side) {
    load_avx2(blocks[side], scales.fold, upper);
    load_avx2(blocks[2 + side], scales.fold, lower);
    merge(upper, lower, merged, odd);
    transpose_avx2(merged, turned[side]);
  }
  merge(turned[0], turned[1], merged, odd);
  divide(merged, scales.target, output);
}
#endif

// The same for blocks at the edge of the image: of the 16 x 16 samples, only `height` x `width` belong to the image. A
// block that does not exist is nullptr.
inline void at_edge(const int16_t *const (&blocks)[4], const Scales &scales, uint32_t height, uint32_t width,
                    float *output) {
  const auto &dct = matrices().dct;
  float samples[2 * SIDE][2 * SIDE] = {}, averages[SIDE][SIDE], half[SIDE][SIDE];
  for (int i = 0; i < 4; ++i) {
    if (blocks[i] == nullptr) continue;
    for (int v = 0; v < SIDE; ++v)
      for (int x = 0; x < SIDE; ++x) {
        half[v][x] = 0;
        for (int u = 0; u < SIDE; ++u)
          half[v][x] += static_cast<float>(blocks[i][SIDE * v + u]) * scales.quantizer[SIDE * v + u] * dct[u][x];
      }
    for (int y = 0; y < SIDE; ++y)
      for (int x = 0; x < SIDE; ++x) {
        float sum = 0;
        for (int v = 0; v < SIDE; ++v) sum += half[v][x] * dct[v][y];
        samples[SIDE * (i / 2) + y][SIDE * (i % 2) + x] = sum;
      }
  }
  for (uint32_t y = 0; y < 2 * SIDE; ++y)
    for (uint32_t x = width; x < 2 * SIDE; ++x) samples[y][x] = samples[y][width - 1];
  const uint32_t last = (height - 1) / 2;  // the last row of averages that contains samples of the image
  for (uint32_t y = 0; y < SIDE; ++y) {
    const uint32_t upper = 2 * (y < last ? y : last), lower = upper + 1 < height ? upper + 1 : upper;
    for (uint32_t x = 0; x < SIDE; ++x)
      averages[y][x] = 0.25f * (samples[upper][2 * x] + samples[upper][2 * x + 1] + samples[lower][2 * x] +
                                samples[lower][2 * x + 1]);
  }
  for (int y = 0; y < SIDE; ++y)
    for (int u = 0; u < SIDE; ++u) {
      half[y][u] = 0;
      for (int x = 0; x < SIDE; ++x) half[y][u] += averages[y][x] * dct[u][x];
    }
  for (int u = 0; u < SIDE; ++u)
    for (int v = 0; v < SIDE; ++v) {
      float sum = 0;
      for (int y = 0; y < SIDE; ++y) sum += half[y][u] * dct[v][y];
      output[SIDE * u + v] = sum * scales.target[SIDE * u + v];
    }
}

}  // namespace halve
