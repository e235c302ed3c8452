// Reads the Huffman-coded coefficients of baseline JPEGs.
//
// Stricter than libjpeg: whatever is not perfectly regular is refused, and left to libjpeg, whose verdict counts.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace huffman {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "Reader swaps bytes");

constexpr int BLOCK = 64;         // coefficients
constexpr int MAX_DC_BITS = 11;   // of a DC difference, and
constexpr int MAX_AC_BITS = 10;   // of a coefficient: 8-bit samples give no larger ones
constexpr int LOOKUP_BITS = 11;   // whole codes, with the value behind them where it fits
constexpr int STEP_BITS = 12;     // several symbols to be passed over

// A table as a DHT segment has it: bits[n] codes of n bits, 1 <= n <= 16, and their symbols.
struct Spec {
  uint8_t bits[17], symbols[256];

  bool operator==(const Spec &other) const {
    return !std::memcmp(bits, other.bits, sizeof bits) && !std::memcmp(symbols, other.symbols, sizeof symbols);
  }
};

// Looks up one symbol and the value behind it.
struct Codes {
  // value << 16 | advance << 8 | bits taken. 0: a longer code, or none. Where the value is not in the window,
  // bits is that of the code alone, and WIDE with the size in the value's place stands for it.
  uint32_t lookup[1 << LOOKUP_BITS];
  uint32_t end[18];    // codes of this length or shorter, left-aligned in 16 bits, are below
  int32_t offset[17];  // symbol = symbols[(code >> (16 - length)) + offset[length]]
  const uint8_t *symbols;

  static constexpr uint32_t WIDE = 0x80;         // flag in the byte of bits
  static constexpr uint32_t END_OF_BLOCK = 128;  // advance: past every coefficient

  static constexpr uint32_t advance_of(uint32_t symbol) {
    return symbol == 0 ? END_OF_BLOCK : (symbol >> 4) + 1;
  }
  static int value_of(uint32_t bits, uint32_t size) {  // Figure F.12 of ITU-T T.81
    return bits < 1u << (size - 1) ? static_cast<int>(bits) - (1 << size) + 1 : static_cast<int>(bits);
  }

  // `ac`: symbols are run << 4 | size; else sizes of DC differences, whose advance is 1. The spec must stay.
  bool build(const Spec &spec, bool ac) {
    std::memset(lookup, 0, sizeof lookup);
    symbols = spec.symbols;
    uint32_t code = 0, used = 0;
    for (uint32_t length = 1; length <= 16; ++length) {
      const uint32_t count = spec.bits[length];
      if (code + count >= (1u << length) || used + count > 256) return false;
      offset[length] = static_cast<int32_t>(used) - static_cast<int32_t>(code);
      for (uint32_t i = 0; i < count; ++i, ++code, ++used) {
        const uint32_t symbol = symbols[used], size = ac ? symbol & 15 : symbol;
        if (!ac && symbol > 15) return false;
        if (length > LOOKUP_BITS) continue;
        uint32_t *to = lookup + (size_t{code} << (LOOKUP_BITS - length));
        const uint32_t advance = (ac ? advance_of(symbol) : 1) << 8;
        if (size > static_cast<uint32_t>(ac ? MAX_AC_BITS : MAX_DC_BITS)) continue;
        if (ac && size == 0 && symbol != 0 && symbol != 0xF0) continue;
        if (length + size > LOOKUP_BITS || !ac) {  // Reader::dc takes sizes alone: a branch less
          fill(to, size << 16 | advance | WIDE | length, size_t{1} << (LOOKUP_BITS - length));
        } else if (size == 0) {
          fill(to, advance | length, size_t{1} << (LOOKUP_BITS - length));
        } else {
          const size_t each = size_t{1} << (LOOKUP_BITS - length - size);
          for (uint32_t bits = 0; bits < 1u << size; ++bits, to += each)
            fill(to, static_cast<uint32_t>(value_of(bits, size)) << 16 | advance | (length + size), each);
        }
      }
      end[length] = code << (16 - length);
      code <<= 1;
    }
    return true;
  }

  static void fill(uint32_t *to, uint32_t entry, size_t count) {
    for (size_t i = 0; i < count; ++i) to[i] = entry;
  }
};

// Two symbols of AC coefficients in one look-up, for windows of LOOKUP_BITS bits: bits taken | (advance - 1) << 4 |
// second advance << 8 | second value << 16 | value << 24. The second advance is 0, and the second value the first,
// where there is only one symbol; the end of the block is past every coefficient. Bits taken are 0 where Codes do it.
struct Pairs {
  uint32_t lookup[1 << LOOKUP_BITS];

  static constexpr uint32_t END_OF_BLOCK = 128;

  static bool is_small(uint32_t entry) {
    const int32_t value = static_cast<int32_t>(entry) >> 16;
    return entry != 0 && (entry & Codes::WIDE) == 0 && value >= -128 && value <= 127;
  }

  void build(const Codes &codes) {
    constexpr uint32_t ALL = 1 << LOOKUP_BITS;
    for (uint32_t window = 0; window < ALL; ++window) {
      const uint32_t first = codes.lookup[window];
      lookup[window] = 0;
      if (!is_small(first)) continue;
      const uint32_t value = first >> 16 & 255, advance = first >> 8 & 255;
      uint32_t bits = first & 255, next_advance = 0, next_value = value;
      if (advance == Codes::END_OF_BLOCK) {  // as a coefficient of 0 and the rest of the way
        lookup[window] = bits | (END_OF_BLOCK - 1) << 8;
        continue;
      }
      const uint32_t second = codes.lookup[window << bits & (ALL - 1)];
      if (is_small(second) && bits + (second & 255) <= LOOKUP_BITS) {
        bits += second & 255;
        next_advance = second >> 8 & 255;
        next_value = second >> 16 & 255;
      }
      lookup[window] = bits | (advance - 1) << 4 | next_advance << 8 | next_value << 16 | value << 24;
    }
  }
};

// What a window of STEP_BITS bits says about the symbols in it: the bits that they and their values take, and the
// coefficients << BITS. Steps add up.
namespace step {

constexpr int BITS = 7;  // three steps take fewer than 128 bits
constexpr uint32_t DC = 64;   // the coefficients that a DC coefficient counts as,
constexpr uint32_t END = 257;  // and those that the end of a block does: sums tell by bit 7 what is irregular. It is set
                               // from DC + 64 on, and where END is added to DC + 63 (a whole block) or more, not to less.
constexpr uint16_t NONE = 65 << BITS, NO_DC = 128 << BITS;  // no code that is whole in the window

constexpr uint16_t of(uint32_t bits, uint32_t coefficients) {
  return static_cast<uint16_t>(bits | coefficients << BITS);
}
inline void fill(uint16_t *to, uint16_t step, size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] = step;
}

}  // namespace step

// Both ways to read the AC coefficients of a block: with their values, and past them, several symbols in one look-up.
struct AcTable {
  Pairs pairs;
  Codes codes;
  // For windows of 0, 1, ... STEP_BITS bits, one level behind the other: the steps over the symbols whose codes are in
  // them, the value of the last one included. Where there is not even one code, the widest has step::NONE, others 0.
  uint16_t levels[2 << STEP_BITS];
  Spec spec;  // most files have the same
  bool built = false, steps_built = false;

  const uint16_t *steps() const { return levels + (size_t{1} << STEP_BITS); }

  bool build(const Spec &wanted) {
    if (built && spec == wanted) return true;
    spec = wanted;
    steps_built = false;
    built = codes.build(spec, true);
    if (built) pairs.build(codes);
    return built;
  }

  void build_steps() {
    if (steps_built) return;
    for (uint32_t width = 0; width <= STEP_BITS; ++width) build_level(width);
    steps_built = true;
  }

  // A window is a symbol and a narrower window behind it: their steps add up.
  void build_level(uint32_t width) {
    uint16_t *level = levels + (size_t{1} << width);
    step::fill(level, width == STEP_BITS ? step::NONE : 0, size_t{1} << width);
    uint32_t code = 0;
    const uint8_t *symbol = spec.symbols;
    for (uint32_t length = 1; length <= width && length <= 16; ++length, code <<= 1)
      for (int i = 0; i < spec.bits[length]; ++i, ++symbol, ++code) {
        uint16_t *to = level + (size_t{code} << (width - length));
        const uint32_t size = *symbol & 15, used = length + size;
        if (*symbol == 0) {
          step::fill(to, step::of(length, step::END), size_t{1} << (width - length));
        } else if (size != 0 && size <= MAX_AC_BITS) {
          const uint16_t step = step::of(used, (*symbol >> 4) + 1u);
          if (used > width) {
            step::fill(to, step, size_t{1} << (width - length));
            continue;
          }
          const size_t count = size_t{1} << (width - used);
          const uint16_t *behind = levels + count;
          for (uint32_t value = 0; value < 1u << size; ++value, to += count)
            for (size_t k = 0; k < count; ++k) to[k] = static_cast<uint16_t>(behind[k] + step);
        }
      }
  }
};

struct DcTable {
  Codes codes;
  uint16_t steps[1 << STEP_BITS];  // over one symbol
  Spec spec;
  bool built = false, steps_built = false;

  bool build(const Spec &wanted) {
    if (built && spec == wanted) return true;
    spec = wanted;
    steps_built = false;
    return built = codes.build(spec, false);
  }

  void build_steps() {
    if (steps_built) return;
    constexpr size_t EACH = 1 << (STEP_BITS - LOOKUP_BITS);
    for (size_t window = 0; window < 1 << LOOKUP_BITS; ++window) {
      const uint32_t entry = codes.lookup[window];
      const uint16_t step = step::of((entry & 63) + (entry >> 16), step::DC);
      step::fill(steps + EACH * window, entry == 0 ? step::NO_DC : step, EACH);
    }
    steps_built = true;
  }
};

// Where coefficient k of the zigzag order goes. Behind the end stands the last one's place: for a zero, or for damage.
struct Order {
  uint8_t places[2 * BLOCK + Pairs::END_OF_BLOCK];

  constexpr uint8_t operator[](size_t k) const { return places[k]; }
};

constexpr Order padded(Order order) {
  for (size_t k = BLOCK; k < sizeof order.places; ++k) order.places[k] = BLOCK - 1;
  return order;
}
constexpr Order identity() {
  Order order{};
  for (size_t k = 0; k < BLOCK; ++k) order.places[k] = static_cast<uint8_t>(k);
  return padded(order);
}

constexpr Order ZIGZAG = identity();
constexpr Order NATURAL = padded(Order{
    {0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
     41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
     30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63}});

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

constexpr size_t READ_AHEAD = 512;  // a block of 64 codes of at most 16 bits with 11 bits more may be read past the end

// Takes bits from unstuffed bytes, behind which READ_AHEAD zeros can be read. Check `left` after each block.
struct Reader {
  const uint8_t *next = nullptr, *end = nullptr;
  uint64_t bits = 0;  // left-aligned; what follows the first `count` is zero or true
  int count = 0;

  ALWAYS_INLINE void refill() {  // to 56 bits or more
    uint64_t bytes;
    std::memcpy(&bytes, next, 8);
    bits |= __builtin_bswap64(bytes) >> count;
    next += (63 - count) >> 3;
    count |= 56;
  }
  ALWAYS_INLINE void skip(int n) {
    bits <<= n;
    count -= n;
  }
  // From bit `position` on.
  static ALWAYS_INLINE Reader at(const uint8_t *start, size_t position, const uint8_t *end = nullptr) {
    Reader reader{start + (position >> 3), end};
    reader.refill();
    reader.skip(static_cast<int>(position & 7));
    return reader;
  }
  // Bits taken since `start`.
  size_t taken(const uint8_t *start) const {
    return 8 * static_cast<size_t>(next - start) - static_cast<size_t>(count);
  }
  // Bits not yet taken; below zero when too many were.
  ptrdiff_t left() const { return 8 * (end - next) + count; }

  // A code too long for the look-up, or none: its symbol and length as length << 8 | symbol; 0 for none.
  // Not a member of the reader's state: its address would keep that out of registers.
  __attribute__((noinline)) static uint32_t long_code(const Codes &table, uint64_t bits) {
    const uint32_t code = static_cast<uint32_t>(bits >> 48);
    for (int length = 1; length <= 16; ++length)
      if (code < table.end[length]) {
        const uint32_t index = (code >> (16 - length)) + static_cast<uint32_t>(table.offset[length]);
        return static_cast<uint32_t>(length) << 8 | table.symbols[index & 255];
      }
    return 0;
  }

  ALWAYS_INLINE int take_value(uint32_t size) {  // 1 <= size
    const uint32_t value = static_cast<uint32_t>(bits >> (64 - size));
    skip(static_cast<int>(size));
    return Codes::value_of(value, size);
  }

  // Adds the difference of the next block's DC coefficient to its prediction. Refills.
  ALWAYS_INLINE bool dc(const DcTable &table, int &prediction) {
    refill();
    return dc_in_bits(table, prediction);
  }
  ALWAYS_INLINE bool dc_in_bits(const DcTable &table, int &prediction) {
    const uint32_t entry = table.codes.lookup[bits >> (64 - LOOKUP_BITS)];
    uint32_t size = entry >> 16;
    if (__builtin_expect(entry == 0, 0)) {
      const uint32_t code = long_code(table.codes, bits);
      size = code & 255;
      if (code == 0 || size > MAX_DC_BITS) return false;
      skip(static_cast<int>(code >> 8));
    } else {
      skip(static_cast<int>(entry & 63));
    }
    // As value_of, and 0 for no bits.
    const int value = static_cast<int>(bits >> 1 >> (63 - size)), positive = -static_cast<int>(bits >> 63);
    skip(static_cast<int>(size));
    const int difference = value + (~positive & (1 - (1 << size)));
    prediction = static_cast<int>(static_cast<uint32_t>(prediction) + static_cast<uint32_t>(difference));  // may wrap
    return true;
  }

  // The AC coefficients of a block of zeros, in the order that is wanted. Returns the zigzag index of the last one, 0
  // if there is none, or -1 where a code is not one, or irregular.
  ALWAYS_INLINE int ac(const AcTable &table, const Order &order, int16_t *block) {
    uint32_t k = 0;
    for (;;) {
      refill();
      uint32_t entry;
      for (int i = 0; i < 4; ++i) {  // windows of 11 bits
        entry = table.pairs.lookup[bits >> (64 - LOOKUP_BITS)];
        if ((entry & 15) == 0) break;
        const uint64_t window = bits;
        skip(static_cast<int>(entry & 15));
        k += (entry >> 4 & 15) + 1;
        block[order[k]] = static_cast<int8_t>(entry >> 24);
        k += entry >> 8 & 255;
        block[order[k]] = static_cast<int8_t>(entry >> 16);
        if (k >= BLOCK - 1) {
          const uint32_t next_advance = entry >> 8 & 255;
          if (k - next_advance == BLOCK - 1 && next_advance != Pairs::END_OF_BLOCK - 1) {
            // The block ended with the first symbol: the second is not of this table.
            const uint32_t first = table.codes.lookup[window >> (64 - LOOKUP_BITS)];
            bits = window << (first & 63);
            count += static_cast<int>(entry & 15) - static_cast<int>(first & 63);
            block[BLOCK - 1] = static_cast<int8_t>(entry >> 24);
            return BLOCK - 1;
          }
          if (k >= Pairs::END_OF_BLOCK) k -= Pairs::END_OF_BLOCK;
          return k < BLOCK ? static_cast<int>(k) : -1;
        }
      }
      if ((entry & 15) != 0) continue;
      refill();
      entry = table.codes.lookup[bits >> (64 - LOOKUP_BITS)];
      if (entry != 0) {
        skip(static_cast<int>(entry & 63));
        k += entry >> 8 & 255;
        if (k >= BLOCK) return -1;
        const int value = static_cast<int32_t>(entry) >> 16;
        block[order[k]] = static_cast<int16_t>(entry & Codes::WIDE ? take_value(entry >> 16) : value);
      } else {
        const uint32_t code = long_code(table.codes, bits), symbol = code & 255, size = symbol & 15;
        if (code == 0 || size > MAX_AC_BITS || (size == 0 && symbol != 0 && symbol != 0xF0)) return -1;
        skip(static_cast<int>(code >> 8));
        if (symbol == 0) return static_cast<int>(k);
        k += (symbol >> 4) + 1;
        if (k >= BLOCK) return -1;
        if (size != 0) block[order[k]] = static_cast<int16_t>(take_value(size));
      }
      if (k == BLOCK - 1) return BLOCK - 1;
    }
  }

  // Passes over the AC coefficients of a block. False where a code is not one, or irregular.
  ALWAYS_INLINE bool skip_ac(const AcTable &table) {
    uint32_t k = 1;
    const uint16_t *steps = table.steps();
    __asm__("" : "+r"(steps));  // else its address is computed again for each look-up
    for (;;) {
      refill();
      bool rare = false;
      for (int i = 0; i < 2; ++i) {  // windows of 12 bits, and values of up to 10
        const uint32_t step = steps[bits >> (64 - STEP_BITS)], next_k = k + (step >> step::BITS);
        if (next_k >= BLOCK) {
          rare = true;
          if (next_k != BLOCK && next_k - step::END >= BLOCK) break;
          skip(static_cast<int>(step & 63));
          return true;
        }
        skip(static_cast<int>(step & 63));
        k = next_k;
      }
      if (!rare) continue;
      refill();
      const uint32_t code = long_code(table.codes, bits);
      if (code == 0) return false;
      skip(static_cast<int>(code >> 8));
      const uint32_t symbol = code & 255, size = symbol & 15;
      if (symbol == 0) return true;
      k += (symbol >> 4) + 1;
      if (size == 0 ? symbol != 0xF0 || k >= BLOCK : k > BLOCK || size > MAX_AC_BITS) return false;
      skip(static_cast<int>(size));
      if (k == BLOCK) return true;
    }
  }
};

}  // namespace huffman
