// The AVX-512 instructions that the decoder uses, in plain C++: for processors that do not have them. Each is written as
// Intel's Intrinsics Guide describes it. Included before everything else (-include); the decoder then takes its path for
// AVX-512.

#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#pragma GCC diagnostic ignored "-Wpsabi"  // registers of 64 bytes as arguments

#define AVX512_TARGET target("avx2,bmi,bmi2,lzcnt")
#define SIMD_LEVEL simd::Level::WIDE

namespace emulated {

struct alignas(64) Register {
  uint8_t bytes[64];

  template <typename T>
  T at(size_t i) const {
    T value;
    std::memcpy(&value, bytes + i * sizeof(T), sizeof(T));
    return value;
  }
  template <typename T>
  void set(size_t i, T value) {
    std::memcpy(bytes + i * sizeof(T), &value, sizeof(T));
  }
};

// A register whose lane i of type T is of(i).
template <typename T, typename Of>
Register make(Of of) {
  Register made;
  for (size_t i = 0; i < 64 / sizeof(T); ++i) made.set<T>(i, static_cast<T>(of(i)));
  return made;
}

template <typename To>
int32_t saturated(int32_t value) {
  constexpr int32_t low = sizeof(To) == 2 ? -32768 : 0, high = sizeof(To) == 2 ? 32767 : 255;
  return value < low ? low : value > high ? high : value;
}

// ---- memory and constants
inline Register load(const void *from) {
  Register loaded;
  std::memcpy(loaded.bytes, from, 64);
  return loaded;
}
inline void store(void *to, Register value) { std::memcpy(to, value.bytes, 64); }
inline Register load_bytes(uint64_t mask, const void *from) {
  return make<uint8_t>([=](size_t i) { return mask >> i & 1 ? static_cast<const uint8_t *>(from)[i] : 0; });
}
inline void store_bytes(void *to, uint64_t mask, Register value) {
  for (size_t i = 0; i < 64; ++i)
    if (mask >> i & 1) static_cast<uint8_t *>(to)[i] = value.bytes[i];
}
inline Register zero() {
  return make<uint8_t>([](size_t) { return 0; });
}
inline Register set16(int16_t value) {
  return make<int16_t>([=](size_t) { return value; });
}
inline Register set32(int32_t value) {
  return make<int32_t>([=](size_t) { return value; });
}
template <typename... Values>
Register list32(Values... values) {
  const int32_t all[16] = {values...};
  return load(all);
}
inline Register gather32(Register index, const void *base, int scale) {
  return make<int32_t>([=](size_t i) {
    int32_t value;
    std::memcpy(&value, static_cast<const char *>(base) + std::ptrdiff_t{index.at<int32_t>(i)} * scale, 4);
    return value;
  });
}
inline Register from128(__m128i low) {
  Register made = zero();
  std::memcpy(made.bytes, &low, 16);
  return made;
}
inline __m128i to128(Register value) {
  __m128i low;
  std::memcpy(&low, value.bytes, 16);
  return low;
}

// ---- arithmetic; it wraps around unless the name says otherwise
inline Register add16(Register a, Register b) {
  return make<int16_t>([=](size_t i) { return a.at<int16_t>(i) + b.at<int16_t>(i); });
}
inline Register sub16(Register a, Register b) {
  return make<int16_t>([=](size_t i) { return a.at<int16_t>(i) - b.at<int16_t>(i); });
}
inline Register add32(Register a, Register b) {
  return make<uint32_t>([=](size_t i) { return a.at<uint32_t>(i) + b.at<uint32_t>(i); });
}
inline Register sub32(Register a, Register b) {
  return make<uint32_t>([=](size_t i) { return a.at<uint32_t>(i) - b.at<uint32_t>(i); });
}
inline Register mullo32(Register a, Register b) {
  return make<uint32_t>([=](size_t i) { return a.at<uint32_t>(i) * b.at<uint32_t>(i); });
}
inline Register mulhi16(Register a, Register b) {
  return make<int16_t>([=](size_t i) { return a.at<int16_t>(i) * b.at<int16_t>(i) >> 16; });
}
inline Register mulhrs16(Register a, Register b) {
  return make<int16_t>([=](size_t i) { return ((a.at<int16_t>(i) * b.at<int16_t>(i) >> 14) + 1) >> 1; });
}
inline Register dpwssd(Register sum, Register a, Register b) {
  return make<uint32_t>([=](size_t i) {
    uint32_t total = sum.at<uint32_t>(i);
    for (size_t k = 2 * i; k < 2 * i + 2; ++k)
      total += static_cast<uint32_t>(int32_t{a.at<int16_t>(k)} * b.at<int16_t>(k));
    return total;
  });
}
inline Register slli16(Register a, unsigned bits) {
  return make<uint16_t>([=](size_t i) { return a.at<uint16_t>(i) << bits; });
}
inline Register slli32(Register a, unsigned bits) {
  return make<uint32_t>([=](size_t i) { return a.at<uint32_t>(i) << bits; });
}
inline Register srai16(Register a, unsigned bits) {
  return make<int16_t>([=](size_t i) { return a.at<int16_t>(i) >> bits; });
}
inline Register srai32(Register a, unsigned bits) {
  return make<int32_t>([=](size_t i) { return a.at<int32_t>(i) >> bits; });
}

// ---- lanes: pack and unpack work within the parts of 128 bits
inline Register widen(__m256i bytes) {
  uint8_t all[32];
  std::memcpy(all, &bytes, 32);
  return make<uint16_t>([&](size_t i) { return all[i]; });
}
template <typename T, bool HIGH>
Register unpack(Register a, Register b) {
  constexpr size_t in_part = 16 / sizeof(T);
  return make<T>([=](size_t i) {
    const size_t at = i / in_part * in_part + i % in_part / 2 + (HIGH ? in_part / 2 : 0);
    return (i % 2 == 0 ? a : b).template at<T>(at);
  });
}
template <typename From, typename To>
Register pack(Register a, Register b) {
  constexpr size_t in_part = 16 / sizeof(From);
  return make<To>([=](size_t i) {
    const size_t part = i / (2 * in_part), in = i % (2 * in_part);
    return saturated<To>((in < in_part ? a : b).template at<From>(part * in_part + in % in_part));
  });
}
inline Register permute32(Register index, Register a) {
  return make<uint32_t>([=](size_t i) { return a.at<uint32_t>(index.at<uint32_t>(i) & 15); });
}
inline Register permute8(Register index, Register a) {
  return make<uint8_t>([=](size_t i) { return a.bytes[index.bytes[i] & 63]; });
}
inline Register permute8_masked(Register other, uint64_t mask, Register index, Register a) {
  return make<uint8_t>([=](size_t i) { return mask >> i & 1 ? a.bytes[index.bytes[i] & 63] : other.bytes[i]; });
}
inline Register permute8_of_two(Register a, Register index, Register b) {
  return make<uint8_t>([=](size_t i) { return (index.bytes[i] & 64 ? b : a).bytes[index.bytes[i] & 63]; });
}

}  // namespace emulated

// Macros of the compiler; most of them only without optimisation.
#undef _mm512_i32gather_epi32
#undef _mm512_setr_epi32
#undef _mm512_slli_epi16
#undef _mm512_slli_epi32
#undef _mm512_srai_epi16
#undef _mm512_srai_epi32

#define __m512i emulated::Register
#define _mm512_add_epi16 emulated::add16
#define _mm512_add_epi32 emulated::add32
#define _mm512_castsi128_si512 emulated::from128
#define _mm512_castsi512_si128 emulated::to128
#define _mm512_cvtepu8_epi16 emulated::widen
#define _mm512_dpwssd_epi32 emulated::dpwssd
#define _mm512_i32gather_epi32 emulated::gather32
#define _mm512_load_si512 emulated::load
#define _mm512_loadu_si512 emulated::load
#define _mm512_mask_permutexvar_epi8 emulated::permute8_masked
#define _mm512_mask_storeu_epi8 emulated::store_bytes
#define _mm512_maskz_loadu_epi8 emulated::load_bytes
#define _mm512_mulhi_epi16 emulated::mulhi16
#define _mm512_mulhrs_epi16 emulated::mulhrs16
#define _mm512_mullo_epi32 emulated::mullo32
#define _mm512_packs_epi32 emulated::pack<int32_t, int16_t>
#define _mm512_packus_epi16 emulated::pack<int16_t, uint8_t>
#define _mm512_permutex2var_epi8 emulated::permute8_of_two
#define _mm512_permutexvar_epi32 emulated::permute32
#define _mm512_permutexvar_epi8 emulated::permute8
#define _mm512_set1_epi16(value) emulated::set16(static_cast<int16_t>(value))
#define _mm512_set1_epi32 emulated::set32
#define _mm512_setr_epi32 emulated::list32
#define _mm512_setzero_si512 emulated::zero
#define _mm512_slli_epi16 emulated::slli16
#define _mm512_slli_epi32 emulated::slli32
#define _mm512_srai_epi16 emulated::srai16
#define _mm512_srai_epi32 emulated::srai32
#define _mm512_store_si512 emulated::store
#define _mm512_storeu_si512 emulated::store
#define _mm512_sub_epi16 emulated::sub16
#define _mm512_sub_epi32 emulated::sub32
#define _mm512_unpackhi_epi16 emulated::unpack<uint16_t, true>
#define _mm512_unpackhi_epi8 emulated::unpack<uint8_t, true>
#define _mm512_unpacklo_epi16 emulated::unpack<uint16_t, false>
#define _mm512_unpacklo_epi8 emulated::unpack<uint8_t, false>
