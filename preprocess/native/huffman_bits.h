// Reads and writes the Huffman-coded bits of a JPEG scan.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>  // jpeglib.h needs FILE
#include <cstring>

#include <jpeglib.h>

namespace rewrite {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "Reader and Writer swap bytes");

constexpr int LOOKUP_BITS = 11;

struct Decoder {  // of one Huffman table
  uint16_t lookup[1 << LOOKUP_BITS];  // length << 8 | symbol; 0: a longer code, or none
  uint32_t end[18];                   // codes of this length or shorter, left-aligned in 16 bits, are below
  int32_t offset[17];                 // symbol = symbols[(code >> (16 - length)) + offset[length]]
  const uint8_t *symbols;

  bool build(const JHUFF_TBL *table, int max_symbol) {  // no more lenient than libjpeg
    if (table == nullptr) return false;
    std::memset(lookup, 0, sizeof lookup);
    symbols = table->huffval;
    uint32_t code = 0, used = 0;
    for (int length = 1; length <= 16; ++length) {
      const uint32_t count = table->bits[length];
      if (code + count >= (1u << length) || used + count > 256) return false;
      for (uint32_t i = 0; i < count; ++i)
        if (symbols[used + i] > max_symbol) return false;
      offset[length] = static_cast<int32_t>(used) - static_cast<int32_t>(code);
      if (length <= LOOKUP_BITS) {
        const uint32_t repeat = 1u << (LOOKUP_BITS - length);
        for (uint32_t i = 0; i < count * repeat; ++i)
          lookup[code * repeat + i] = static_cast<uint16_t>(length << 8 | symbols[used + i / repeat]);
      }
      code += count;
      used += count;
      end[length] = code << (16 - length);
      code <<= 1;
    }
    return true;
  }
};

struct Encoder {  // of one Huffman table
  uint32_t entries[256];  // of each symbol: code << 8 | length

  void build(const JHUFF_TBL *table) {
    std::memset(entries, 0, sizeof entries);
    uint32_t code = 0, used = 0;
    for (uint32_t length = 1; length <= 16; ++length, code <<= 1)
      for (int i = 0; i < table->bits[length]; ++i, ++used, ++code) entries[table->huffval[used]] = code << 8 | length;
  }
};

// Copies the bytes from `next` to the next marker without the zeros that are stuffed behind each 0xFF. Returns the end
// of the copy, and leaves `next` at the marker; nullptr if there is no marker before `end`.
inline uint8_t *unstuff(uint8_t *copy, const uint8_t *&next, const uint8_t *end) {
  for (;;) {
    const uint8_t *found = static_cast<const uint8_t *>(std::memchr(next, 0xFF, static_cast<size_t>(end - next)));
    if (found == nullptr || end - found < 2) return nullptr;
    const size_t length = static_cast<size_t>(found - next);
    std::memcpy(copy, next, length);
    copy += length;
    next = found;
    if (found[1] != 0) return copy;
    *copy++ = 0xFF;
    next += 2;
  }
}

// The reverse: at most twice as many bytes. Returns the end of the copy.
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

constexpr size_t MAX_BLOCK_BYTES = 256;  // 64 codes of at most 16 bits with 11 bits more, and 8 bytes read ahead

// Takes bits from unstuffed bytes, behind which MAX_BLOCK_BYTES can be read.
struct Reader {
  const uint8_t *next = nullptr, *end = nullptr;
  uint64_t bits = 0;  // left-aligned; what follows the first `count` is zero or true
  int count = 0;

  void refill() {  // to 56 bits or more
    uint64_t bytes;
    std::memcpy(&bytes, next, 8);
    bits |= __builtin_bswap64(bytes) >> count;
    next += (63 - count) >> 3;
    count |= 56;
  }
  void skip(int n) {
    bits <<= n;
    count -= n;
  }
  // Bits not yet taken; below zero when too many were.
  ptrdiff_t left() const { return 8 * (end - next) + count; }

  // The next symbol, not yet skipped, as length << 8 | symbol; 0 for a code that does not exist.
  uint32_t peek(const Decoder &table) const {
    const uint32_t entry = table.lookup[bits >> (64 - LOOKUP_BITS)];
    if (entry != 0) return entry;
    const uint32_t code = static_cast<uint32_t>(bits >> 48);
    for (int length = LOOKUP_BITS + 1; length <= 16; ++length)
      if (code < table.end[length]) {
        const uint32_t index = (code >> (16 - length)) + static_cast<uint32_t>(table.offset[length]);
        return static_cast<uint32_t>(length) << 8 | table.symbols[index & 255];
      }
    return 0;
  }
};

// Writes bits into bytes that are not yet stuffed, behind which 8 more may be overwritten.
struct Writer {
  uint8_t *next = nullptr;
  uint64_t bits = 0;  // the last `count` are not yet in a byte
  int count = 0;      // below 8

  void put(uint32_t value, int length) {  // 1 to 32 bits
    bits = bits << length | value;
    count += length;
    const uint64_t bytes = __builtin_bswap64(bits << (64 - count));
    std::memcpy(next, &bytes, 8);
    next += count >> 3;
    count &= 7;
  }
  void put(uint32_t entry) { put(entry >> 8, static_cast<int>(entry & 255)); }
  void end_of_interval() {  // fills the last byte with ones
    if (count != 0) put((1u << (8 - count)) - 1, 8 - count);
  }
};

}  // namespace rewrite
