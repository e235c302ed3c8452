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

// 8-bit samples give no larger coefficients, and the standard Huffman tables have no codes for larger ones.
constexpr int MAX_DC = 1023, MIN_DC = -1024, MAX_AC = 1023;

// The codes of one table, indexed by symbol. The low four bits of a symbol are the size of the value that follows it.
struct Encoder {
  // The code, followed by as many zeros as the value has bits, << 5 | the number of bits of both; 0 if there is no
  // code. Adding the value to the entry completes it, so that code and value are written at once.
  uint32_t entries[256];

  void build(const Spec &spec) {
    std::memset(entries, 0, sizeof entries);
    uint32_t code = 0, used = 0;
    for (uint32_t length = 1; length <= 16; ++length, code <<= 1)
      for (int i = 0; i < spec.bits[length]; ++i, ++used, ++code) {
        const uint32_t symbol = spec.symbols[used], size = symbol & 15;
        if (size <= static_cast<uint32_t>(MAX_DC_BITS)) entries[symbol] = code << size << 5 | (length + size);
      }
  }

  // Returns the code of a run and a value, with the value: bits << 5 | the number of bits.
  ALWAYS_INLINE uint32_t with_value(uint32_t run, int value) const {
    const uint32_t magnitude = static_cast<uint32_t>(value < 0 ? -value : value);
    const uint32_t size = 31 - static_cast<uint32_t>(__builtin_clz(magnitude << 1 | 1));
    const uint32_t low = static_cast<uint32_t>(value + (value >> 31)) & ((1u << size) - 1);
    return entries[run << 4 | size] + (low << 5);
  }
};

// An Encoder for AC coefficients, with a table of complete entries for small values.
struct AcEncoder {
  static constexpr int SMALL = 32;
  Encoder all;
  uint32_t small[16][2 * SMALL];  // (run, value + SMALL): code and value << 5 | the number of bits of both
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

// Copies bytes and inserts a zero after each 0xFF. `copy` must have room for twice as many bytes. Returns the end of
// the copy.
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

constexpr size_t MAX_BLOCK_BYTES = 224;  // 64 codes of at most 16 bits with 11 bits of value, and 8 bytes written ahead

// Writes bits to memory. Each `put` stores 8 bytes and then advances by the complete ones, so that it needs no branch;
// 8 bytes after the last complete one may be overwritten. Zeros after 0xFF are inserted later, for many bytes at once,
// by `stuff`.
struct Writer {
  uint8_t *next = nullptr;
  uint64_t bits = 0;  // the last `count` bits do not fill a byte yet
  int count = 0;      // less than 8

  ALWAYS_INLINE void put(uint64_t value, int length) {  // 1 <= length <= 56
    bits = bits << length | value;
    count += length;
    const uint64_t bytes = __builtin_bswap64(bits << (64 - count));
    std::memcpy(next, &bytes, 8);
    next += count >> 3;
    count &= 7;
  }
  ALWAYS_INLINE void put(uint32_t entry) { put(entry >> 5, static_cast<int>(entry & 31)); }

  // Writes the coefficients of a block, in zigzag order. Bit k of `mask` is set if coefficient k is not zero, so that
  // zeros are skipped without looking at each of them.
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
  // Writes a block without AC coefficients whose DC coefficient equals that of the block before it.
  ALWAYS_INLINE void put_flat_block(const Encoder &dc, const AcEncoder &ac) {
    put(dc.entries[0]);
    put(ac.all.entries[0]);
  }
  // Copies the bits from `from` up to `to` of the bytes at `source`, which must be followed by 16 readable bytes.
  ALWAYS_INLINE void copy(const uint8_t *source, size_t from, size_t to) {
    const uint8_t *at = source + (from >> 3);
    const int shift = static_cast<int>(from & 7);
    size_t left = to - from;
    for (; left >= 64; left -= 64, at += 8, next += 8) {  // whole words do not change `count`
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
  void end_of_interval() {  // the last byte of an interval is filled up with ones
    if (count != 0) put((1u << (8 - count)) - 1, 8 - count);
  }
};

}  // namespace huffman
