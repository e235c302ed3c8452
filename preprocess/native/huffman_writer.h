// Writes the Huffman-coded bits of a JPEG scan.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>  // jpeglib.h needs FILE
#include <cstring>

#include <jpeglib.h>

#include "../../pipelines/native/huffman.h"
#include "../../pipelines/native/simd.h"

namespace huffman {

// 8-bit samples give no larger coefficients, and standard tables have no codes for more.
constexpr int MAX_DC = 1023, MIN_DC = -1024, MAX_AC = 1023;

struct Encoder {  // of one table; a symbol's low four bits are the size of the value that follows it
  uint32_t entries[256];  // code, with zeros in the value's place << 5 | bits of both; 0: no code

  void build(const Spec &spec) {
    std::memset(entries, 0, sizeof entries);
    uint32_t code = 0, used = 0;
    for (uint32_t length = 1; length <= 16; ++length, code <<= 1)
      for (int i = 0; i < spec.bits[length]; ++i, ++used, ++code) {
        const uint32_t symbol = spec.symbols[used], size = symbol & 15;
        if (size <= static_cast<uint32_t>(MAX_DC_BITS)) entries[symbol] = code << size << 5 | (length + size);
      }
  }

  // The code of a run and a value, and the value: bits << 5 | how many.
  ALWAYS_INLINE uint32_t with_value(uint32_t run, int value) const {
    const uint32_t magnitude = static_cast<uint32_t>(value < 0 ? -value : value);
    const uint32_t size = 31 - static_cast<uint32_t>(__builtin_clz(magnitude << 1 | 1));
    const uint32_t low = static_cast<uint32_t>(value + (value >> 31)) & ((1u << size) - 1);
    return entries[run << 4 | size] + (low << 5);
  }
};

struct AcEncoder {
  static constexpr int SMALL = 32;
  Encoder all;
  uint32_t small[16][2 * SMALL];  // run, value + SMALL: code and value << 5 | bits of both
  bool built = false;

  void build(const Spec &spec) {
    all.build(spec);
    for (uint32_t run = 0; run < 16; ++run)
      for (int value = -SMALL; value < SMALL; ++value) small[run][value + SMALL] = all.with_value(run, value);
    built = true;
  }
};

inline Spec spec_of(const JHUFF_TBL *table) {
  Spec spec{};
  uint32_t used = 0;
  for (int length = 1; length <= 16; ++length) used += spec.bits[length] = table->bits[length];
  std::memcpy(spec.symbols, table->huffval, used < sizeof spec.symbols ? used : sizeof spec.symbols);
  return spec;
}

// Copies bytes and stuffs a zero behind each 0xFF: at most twice as many. Returns the end of the copy.
inline uint8_t *stuff(uint8_t *copy, const uint8_t *next, const uint8_t *end) {
  for (;;) {
    const uint8_t *found = static_cast<const uint8_t *>(std::memchr(next, 0xFF, static_cast<size_t>(end - next)));
    const size_t length = static_cast<size_t>((found == nullptr ? end : found) - next);
    std::memcpy(copy, next, length);
    copy += length;
    if (found == nullptr) return copy;
    *copy++ = 0xFF;
    *copy++ = 0;
    next = found + 1;
  }
}

constexpr size_t MAX_BLOCK_BYTES = 224;  // 64 codes of at most 16 bits with 11 bits more, and 8 bytes written ahead

// Writes bits into bytes that are not yet stuffed, behind which 8 more may be overwritten.
struct Writer {
  uint8_t *next = nullptr;
  uint64_t bits = 0;  // the last `count` are not yet in a byte
  int count = 0;      // below 8

  ALWAYS_INLINE void put(uint64_t value, int length) {  // 1 to 56 bits
    bits = bits << length | value;
    count += length;
    const uint64_t bytes = __builtin_bswap64(bits << (64 - count));
    std::memcpy(next, &bytes, 8);
    next += count >> 3;
    count &= 7;
  }
  ALWAYS_INLINE void put(uint32_t entry) { put(entry >> 5, static_cast<int>(entry & 31)); }

  // The coefficients of a block, in zigzag order; bit k of `mask` says whether k is not zero.
  ALWAYS_INLINE void put_block(const Encoder &dc, const AcEncoder &ac, const int16_t *block, uint64_t mask,
                               int &prediction) {
    put(dc.with_value(0, block[0] - prediction));
    prediction = block[0];
    mask &= ~uint64_t{1};
    uint32_t last = 0;
    const auto next = [&] {
      const uint32_t k = static_cast<uint32_t>(__builtin_ctzll(mask));
      mask &= mask - 1;
      uint32_t run = k - last - 1;
      last = k;
      for (; run >= 16; run -= 16) put(ac.all.entries[0xF0]);
      const uint32_t shifted = static_cast<uint32_t>(block[k] + AcEncoder::SMALL);
      return shifted < 2 * AcEncoder::SMALL ? ac.small[run][shifted] : ac.all.with_value(run, block[k]);
    };
    while (mask != 0) put(next());
    if (last != BLOCK - 1) put(ac.all.entries[0]);
  }
  // A block that is flat, and like the one before it.
  ALWAYS_INLINE void put_flat_block(const Encoder &dc, const AcEncoder &ac) {
    put(dc.entries[0]);
    put(ac.all.entries[0]);
  }
  // Of the bytes from `source` on, the bits from `from` up to `to`. 16 bytes more can be read.
  ALWAYS_INLINE void copy(const uint8_t *source, size_t from, size_t to) {
    const uint8_t *at = source + (from >> 3);
    const int shift = static_cast<int>(from & 7);
    size_t left = to - from;
    for (; left >= 64; left -= 64, at += 8, next += 8) {  // `count` stays
      const uint64_t word = load(at) << shift | uint64_t{at[8]} >> (8 - shift);
      const uint64_t bytes = __builtin_bswap64(bits << 1 << (63 - count) | word >> count);
      std::memcpy(next, &bytes, 8);
      bits = word;
    }
    if (left > 56) {
      put(load(at) << shift >> 32, 32);
      at += 4;
      left -= 32;
    }
    if (left != 0) put(load(at) << shift >> (64 - left), static_cast<int>(left));
  }
  static ALWAYS_INLINE uint64_t load(const uint8_t *from) {
    uint64_t bytes;
    std::memcpy(&bytes, from, 8);
    return __builtin_bswap64(bytes);
  }
  void end_of_interval() {  // fills the last byte with ones
    if (count != 0) put((1u << (8 - count)) - 1, 8 - count);
  }
};

}  // namespace huffman
