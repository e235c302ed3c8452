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

constexpr int STEP_BITS = 12;
constexpr int MAX_AC_BITS = 10;  // of a coefficient: 8-bit samples give no larger ones

// Finds the end of a block's AC coefficients without their values, several symbols in one look-up.
struct AcTable {
  Decoder decoder;
  // For windows of 0, 1, ... STEP_BITS bits, one level behind the other: what the whole symbols in them are together,
  // as bits | coefficients << 4 | the block ends << 15.
  uint16_t levels[2 << STEP_BITS];
  uint8_t bits[17], values[256];     // of the table that this was built from: most files have the same
  bool built = false;

  bool build(const JHUFF_TBL *table) {
    if (table == nullptr) return false;
    if (built && !std::memcmp(bits, table->bits, sizeof bits) && !std::memcmp(values, table->huffval, sizeof values))
      return true;
    built = false;
    std::memcpy(bits, table->bits, sizeof bits);
    std::memcpy(values, table->huffval, sizeof values);
    if (!decoder.build(table, 255)) return false;
    decoder.symbols = values;
    for (uint32_t width = 0; width <= STEP_BITS; ++width) build_level(width);
    built = true;
    return true;
  }

  // A window is a symbol and a narrower window behind it: their steps add up.
  void build_level(uint32_t width) {
    uint16_t *level = levels + (size_t{1} << width);
    std::memset(level, 0, sizeof *level << width);
    uint32_t code = 0;
    const uint8_t *symbol = values;
    for (uint32_t length = 1; length <= width && length <= 16; ++length, code <<= 1)
      for (int i = 0; i < bits[length]; ++i, ++symbol, ++code) {
        uint16_t *to = level + (size_t{code} << (width - length));
        const uint32_t size = *symbol & 15, used = length + size;
        if (*symbol == 0) {
          for (uint16_t *end = to + (size_t{1} << (width - length)); to < end; ++to)
            *to = static_cast<uint16_t>(length | 1 << 15);
        } else if (size != 0 && size <= MAX_AC_BITS && used <= width) {
          const uint16_t step = static_cast<uint16_t>(used | ((*symbol >> 4) + 1u) << 4);
          const size_t count = size_t{1} << (width - used);
          const uint16_t *behind = levels + count;
          for (uint32_t value = 0; value < 1u << size; ++value, to += count)
            for (size_t k = 0; k < count; ++k) to[k] = static_cast<uint16_t>(behind[k] + step);
        }
      }
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
  // Bits taken since `start`.
  size_t taken(const uint8_t *start) const { return 8 * static_cast<size_t>(next - start) - static_cast<size_t>(count); }
  // Bits not yet taken; below zero when too many were.
  ptrdiff_t left() const { return 8 * (end - next) + count; }

  // Passes over the AC coefficients of a block. False where a code is not one, or irregular.
  bool skip_coefficients(const AcTable &table) {
    uint32_t k = 1;
    for (;;) {
      refill();
      for (int i = 0; i < 3; ++i) {  // 2 x 11 bits and one code of 16 with 10 bits more are there
        const uint32_t step = table.levels[(1 << STEP_BITS) + (bits >> (64 - STEP_BITS))];
        const uint32_t next_k = k + (step >> 4 & 255), ends = step >> 15;
        if (step != 0 && next_k + ends <= DCTSIZE2) {
          skip(static_cast<int>(step & 15));
          k = next_k;
          if (ends != 0 || k == DCTSIZE2) return true;
          continue;
        }
        const uint32_t entry = peek(table.decoder);
        if (entry == 0) return false;
        skip(static_cast<int>(entry >> 8));
        const uint32_t symbol = entry & 255, size = symbol & 15;
        if (symbol == 0) return true;
        k += (symbol >> 4) + 1;
        if (size == 0 ? symbol != 0xF0 || k >= DCTSIZE2 : k > DCTSIZE2 || size > MAX_AC_BITS) return false;
        skip(static_cast<int>(size));
        if (k == DCTSIZE2) return true;
        break;
      }
    }
  }

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

  void put(uint64_t value, int length) {  // 1 to 56 bits
    bits = bits << length | value;
    count += length;
    const uint64_t bytes = __builtin_bswap64(bits << (64 - count));
    std::memcpy(next, &bytes, 8);
    next += count >> 3;
    count &= 7;
  }
  // Of the bytes from `source` on, the bits from `from` up to `to`. 8 bytes more can be read.
  void copy(const uint8_t *source, size_t from, size_t to) {
    while (from < to) {
      uint64_t bytes;
      std::memcpy(&bytes, source + (from >> 3), 8);
      const int length = to - from < 56 ? static_cast<int>(to - from) : 56;
      put(__builtin_bswap64(bytes) << (from & 7) >> (64 - length), length);
      from += static_cast<size_t>(length);
    }
  }
  void end_of_interval() {  // fills the last byte with ones
    if (count != 0) put((1u << (8 - count)) - 1, 8 - count);
  }
};

}  // namespace rewrite
