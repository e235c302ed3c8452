// Area averaging of RGB rows. The results are bit-identical to pipelines/images/area.py on every processor, so that the
// bytes of a shard do not depend on the machine. This needs -ffp-contract=off, because a fused multiplication and
// addition rounds once where the two operations round twice.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../../pipelines/native/simd.h"

namespace area {

// Output i is the weighted sum of `count` inputs, starting at `first`. `weights` is the index of its first weight.
struct Tap {
  uint32_t first, count, weights;
};

struct Taps {
  const Tap *taps = nullptr;
  const float *weights = nullptr;
};

// The number of bytes that make_taps needs. Neighbouring outputs share at most one input, which bounds the weights.
inline size_t taps_bytes(uint32_t length, uint32_t size) {
  return size * (sizeof(Tap) + sizeof(float)) + length * sizeof(float);
}

// Computes the weights that average `length` inputs to `size` outputs, size <= length. `memory` must have taps_bytes
// bytes and be aligned for floats.
inline Taps make_taps(uint8_t *memory, uint32_t length, uint32_t size) {
  Tap *taps = reinterpret_cast<Tap *>(memory);
  float *weights = reinterpret_cast<float *>(memory + size * sizeof(Tap));
  uint32_t used = 0;
  for (uint32_t i = 0; i < size; ++i) {
    const double start = static_cast<double>(static_cast<uint64_t>(i) * length) / size;
    const double end = static_cast<double>((static_cast<uint64_t>(i) + 1) * length) / size;
    const uint32_t first = static_cast<uint32_t>(start), last = static_cast<uint32_t>(std::ceil(end));
    taps[i] = Tap{first, last - first, used};
    for (uint32_t tap = first; tap < last; ++tap) {
      const double covered = std::fmin(end, tap + 1.0) - std::fmax(start, tap);
      weights[used++] = static_cast<float>(covered * size / length);
    }
  }
  return Taps{taps, weights};
}

// Sets sums (n) to row (n) * weight if the row is the first of an output row, and adds to them otherwise.
ALWAYS_INLINE void weigh_row(float *sums, const uint8_t *row, size_t n, float weight, bool first) {
  if (first) {
    for (size_t i = 0; i < n; ++i) sums[i] = row[i] * weight;
  } else {
    for (size_t i = 0; i < n; ++i) sums[i] += row[i] * weight;
  }
}

// Averages a row of sums to `width` RGB pixels. One more float must follow the last sum, because pixels of three floats
// are loaded as four.
ALWAYS_INLINE void average_columns(uint8_t *output, const float *sums, Taps columns, uint32_t width) {
  typedef float Four __attribute__((vector_size(16)));
  for (uint32_t x = 0; x < width; ++x) {
    const Tap tap = columns.taps[x];
    const float *weights = columns.weights + tap.weights;
    Four total{};
    for (uint32_t k = 0; k < tap.count; ++k) {
      Four pixel;
      std::memcpy(&pixel, sums + 3 * (static_cast<size_t>(tap.first) + k), sizeof pixel);
      total += pixel * weights[k];
    }
    for (int channel = 0; channel < 3; ++channel)
      output[3 * static_cast<size_t>(x) + channel] = static_cast<uint8_t>(total[channel] + 0.5f);
  }
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) inline void weigh_avx2(float *sums, const uint8_t *row, size_t n, float weight,
                                                       bool first) {
  weigh_row(sums, row, n, weight, first);
}
__attribute__((target("avx2"))) inline void average_avx2(uint8_t *output, const float *sums, Taps columns,
                                                         uint32_t width) {
  average_columns(output, sums, columns, width);
}
#endif

inline void weigh(float *sums, const uint8_t *row, size_t n, float weight, bool first) {
#if defined(__x86_64__)
  if (simd::avx2()) return weigh_avx2(sums, row, n, weight, first);
#endif
  weigh_row(sums, row, n, weight, first);
}

inline void average(uint8_t *output, const float *sums, Taps columns, uint32_t width) {
#if defined(__x86_64__)
  if (simd::avx2()) return average_avx2(output, sums, columns, width);
#endif
  average_columns(output, sums, columns, width);
}

}  // namespace area
