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

struct Encoder {  // of one Huffman table: the code of each symbol, and its length
  uint16_t code[256];
  uint8_t length[256];

  void build(const JHUFF_TBL *table) {
    std::memset(length, 0, sizeof length);
    uint32_t next = 0, used = 0;
    for (int bits = 1; bits <= 16; ++bits, next <<= 1)
      for (int i = 0; i < table->bits[bits]; ++i, ++used, ++next) {
        code[table->huffval[used]] = static_cast<uint16_t>(next);
        length[table->huffval[used]] = static_cast<uint8_t>(bits);
      }
  }
};

inline bool has_ff(uint64_t v) { return (~v - 0x0101010101010101u) & v & 0x8080808080808080u; }

struct Reader {
  const uint8_t *next, *end;
  uint64_t bits = 0;  // left-aligned; what follows the first `count` bits is zero or true
  int count = 0;      // below zero: bits were taken that are not there

  void refill() {
    if (end - next >= 8) {
      uint64_t v;
      std::memcpy(&v, next, 8);
      v = __builtin_bswap64(v);
      if (!has_ff(v)) {
        bits |= v >> count;
        next += (63 - count) >> 3;
        count |= 56;
        return;
      }
    }
    while (count <= 56 && next < end) {
      const uint8_t byte = *next;
      if (byte == 0xFF && (end - next < 2 || next[1] != 0)) return;  // a marker, or the end
      next += byte == 0xFF ? 2 : 1;
      bits |= static_cast<uint64_t>(byte) << (56 - count);
      count += 8;
    }
  }

  void skip(int n) {
    bits <<= n;
    count -= n;
  }

  // The next symbol, not yet skipped, as length << 8 | symbol; 0 for a code that does not exist.
  uint32_t peek(const Decoder &table) const {
    const uint32_t entry = table.lookup[bits >> (64 - LOOKUP_BITS)];
    if (entry != 0) return entry;
    const uint32_t code = static_cast<uint32_t>(bits >> 48);
    for (int length = LOOKUP_BITS + 1; length <= 16; ++length)
      if (code < table.end[length]) {
        const uint32_t index = (code >> (16 - length)) + table.offset[length];
        return static_cast<uint32_t>(length) << 8 | table.symbols[index & 255];
      }
    return 0;
  }

  // Between two markers there must be whole bytes and nothing else.
  bool at_marker(uint8_t marker) {
    refill();
    if (count >= 8 || end - next < 2 || next[0] != 0xFF || next[1] != marker) return false;
    next += 2;
    bits = 0;
    count = 0;
    return true;
  }
};

struct Writer {
  uint8_t *next;
  uint64_t bits = 0;  // the last `count` bits
  int count = 0;

  void byte(uint8_t value) { *next++ = value; }
  void word(uint32_t value) {
    byte(static_cast<uint8_t>(value >> 8));
    byte(static_cast<uint8_t>(value));
  }
  void stuffed(uint8_t value) {
    byte(value);
    if (value == 0xFF) byte(0);
  }
  void put(uint32_t value, int length) {  // at most 32 bits
    bits = bits << length | value;
    count += length;
    if (count < 32) return;
    count -= 32;
    const uint32_t out = static_cast<uint32_t>(bits >> count);
    if (has_ff(out)) {
      for (int shift = 24; shift >= 0; shift -= 8) stuffed(static_cast<uint8_t>(out >> shift));
    } else {
      const uint32_t swapped = __builtin_bswap32(out);
      std::memcpy(next, &swapped, 4);
      next += 4;
    }
  }
  void end_of_interval() {  // fills the last byte with ones
    const int padding = -count & 7;
    bits = bits << padding | ((1u << padding) - 1);
    for (count += padding; count > 0; count -= 8) stuffed(static_cast<uint8_t>(bits >> (count - 8)));
    bits = 0;
  }
};

}  // namespace rewrite
