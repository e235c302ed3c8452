// The inverse DCT of libjpeg's JDCT_ISLOW (Loeffler, Ligtenberg and Moschytz, 1989). The results are bit-identical to
// libjpeg's, because a crop must not depend on which of the two decoders made it.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace idct {

// The constants of the algorithm, multiplied by 2^13.
constexpr int F_0_298 = 2446, F_0_390 = 3196, F_0_541 = 4433, F_0_765 = 6270, F_0_899 = 7373, F_1_175 = 9633,
              F_1_501 = 12299, F_1_847 = 15137, F_1_961 = 16069, F_2_053 = 16819, F_2_562 = 20995, F_3_072 = 25172;

inline uint8_t clamp(int32_t value) { return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value); }

// Transforms 8 values, `stride` apart, and calls out(i, value) for each result.
//
// Sums wrap around as they do in the vector instructions: sums of two inputs at 16 bits, all others at 32 bits. They
// overflow only with coefficients that no encoder makes. For those, libjpeg's SIMD and C code give different pixels,
// but our two versions must give the same ones.
template <int SHIFT, typename Out>
inline void one_dimension(const int16_t *in, size_t stride, Out out) {
  const auto at = [&](size_t i) { return static_cast<uint32_t>(int32_t{in[i * stride]}); };
  const auto sum_of = [&](size_t i, size_t k) {
    return static_cast<uint32_t>(int32_t{static_cast<int16_t>(in[i * stride] + in[k * stride])});
  };
  const uint32_t even0 = (at(0) + at(4)) * 8192, even1 = (at(0) - at(4)) * 8192;
  const uint32_t even2 = at(2) * F_0_541 + at(6) * (F_0_541 - F_1_847);
  const uint32_t even3 = at(2) * (F_0_541 + F_0_765) + at(6) * F_0_541;
  const uint32_t a = even0 + even3, d = even0 - even3, b = even1 + even2, c = even1 - even2;
  const uint32_t z3 = sum_of(7, 3), z4 = sum_of(5, 1);
  const uint32_t y3 = z3 * (F_1_175 - F_1_961) + z4 * F_1_175, y4 = z3 * F_1_175 + z4 * (F_1_175 - F_0_390);
  const uint32_t odd0 = at(7) * (F_0_298 - F_0_899) - at(1) * F_0_899 + y3;
  const uint32_t odd1 = at(5) * (F_2_053 - F_2_562) - at(3) * F_2_562 + y4;
  const uint32_t odd2 = at(3) * (F_3_072 - F_2_562) - at(5) * F_2_562 + y3;
  const uint32_t odd3 = at(1) * (F_1_501 - F_0_899) - at(7) * F_0_899 + y4;
  const uint32_t sums[8] = {a + odd3, b + odd2, c + odd1, d + odd0, d - odd0, c - odd1, b - odd2, a - odd3};
  constexpr uint32_t ROUND = uint32_t{1} << (SHIFT - 1);
  for (int i = 0; i < 8; ++i) out(i, static_cast<int32_t>(sums[i] + ROUND) >> SHIFT);
}

inline int16_t saturate(int32_t value) {
  return static_cast<int16_t>(value < -32768 ? -32768 : value > 32767 ? 32767 : value);
}

// Transforms a block. coefficients and quantizers: (8, 8). pixels: 8 rows, `stride` bytes apart.
//
// The first pass keeps two fractional bits (a shift by 11 instead of 13), as libjpeg's does; the second removes them,
// and the factor of 8 of a two-dimensional DCT, with a shift by 18.
inline void block_plain(const int16_t *coefficients, const uint16_t *quantizers, uint8_t *pixels, size_t stride) {
  int16_t columns[64], products[64];
  for (int i = 0; i < 64; ++i) products[i] = static_cast<int16_t>(coefficients[i] * quantizers[i]);
  for (size_t x = 0; x < 8; ++x)
    one_dimension<11>(products + x, 8, [&](int y, int32_t value) { columns[8 * y + x] = saturate(value); });
  for (size_t y = 0; y < 8; ++y)
    one_dimension<18>(columns + 8 * y, 1, [&](int x, int32_t value) {
      pixels[y * stride + x] = clamp(saturate(value) + 128);
    });
}

// The value of all pixels of a block without AC coefficients.
inline uint8_t only_dc(int16_t coefficient, uint16_t quantizer) {
  return clamp(((static_cast<int16_t>(coefficient * quantizer) + 4) >> 3) + 128);
}

inline void fill(uint8_t *pixels, size_t stride, uint8_t value) {
  for (size_t y = 0; y < 8; ++y) std::memset(pixels + y * stride, value, 8);
}

}  // namespace idct

// two_blocks: transforms two blocks, which may be the same, and writes each to its own place. LEVEL is not PLAIN.
#if SIMD_X86
#include "idct_avx2.h"
#elif SIMD_NEON
#include "idct_neon.h"
#else
namespace idct {
template <simd::Level LEVEL>
void two_blocks(const int16_t *first, const int16_t *second, const uint16_t *quantizers, uint8_t *to_first,
                uint8_t *to_second, size_t stride) {
  block_plain(first, quantizers, to_first, stride);
  block_plain(second, quantizers, to_second, stride);
}
}  // namespace idct
#endif
