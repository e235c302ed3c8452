// Reads the Huffman-coded coefficients of baseline JPEGs.
//
// The reader is stricter than libjpeg. It rejects every irregularity, and the caller then gives the file to
// libjpeg-turbo, which decodes it or reports the damage. Thus both decoders accept the same files.
//
// A random resized crop of a 500-pixel image has 32,000 symbols in 1,700 blocks, and each look-up waits for the one
// before it, because the length of a code is known only after its look-up. The tables therefore resolve as much as
// possible in one look-up: a code with its value (Codes), two codes with their values (Pairs), and all codes in a
// window if their values are not needed (AcTable::levels). A table without values was slower: 525 microseconds a crop,
// where values in an 11-bit table took 380. Two symbols in one look-up gained another 3 to 10 %.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace huffman {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "Reader swaps bytes");

constexpr int BLOCK = 64;        // coefficients in a block
constexpr int MAX_DC_BITS = 11;  // the largest size of a DC difference; 8-bit samples give no larger ones
constexpr int MAX_AC_BITS = 10;  // the largest size of an AC coefficient, for the same reason
constexpr int LOOKUP_BITS = 11;  // the window of Codes and Pairs
constexpr int STEP_BITS = 12;    // the window of the tables that skip symbols; 11 and 13 bits were 2 % slower

// A Huffman table as it is stored in a DHT segment: bits[n] is the number of codes of n bits, 1 <= n <= 16.
struct Spec {
  uint8_t bits[17], symbols[256];

  bool operator==(const Spec &other) const {
    return !std::memcmp(bits, other.bits, sizeof bits) && !std::memcmp(symbols, other.symbols, sizeof symbols);
  }
};

// Looks up one symbol and the value behind it.
struct Codes {
  // value << 16 | advance << 8 | number of bits used, for each window of LOOKUP_BITS bits. An entry is 0 if the window
  // begins with a longer code, or with no code. If the value reaches beyond the window, the entry has the flag WIDE,
  // the size of the value in place of the value, and the length of the code alone as the number of bits.
  uint32_t lookup[1 << LOOKUP_BITS];
  uint32_t end[18];    // every code of at most `length` bits, left-aligned in 16 bits, is less than end[length]
  int32_t offset[17];  // symbol = symbols[(code >> (16 - length)) + offset[length]]
  const uint8_t *symbols;

  static constexpr uint32_t WIDE = 0x80;         // a flag in the byte of the number of bits
  static constexpr uint32_t END_OF_BLOCK = 128;  // an advance that passes every coefficient

  static constexpr uint32_t advance_of(uint32_t symbol) {
    return symbol == 0 ? END_OF_BLOCK : (symbol >> 4) + 1;
  }
  static int value_of(uint32_t bits, uint32_t size) {  // Figure F.12 of ITU-T T.81
    return bits < 1u << (size - 1) ? static_cast<int>(bits) - (1 << size) + 1 : static_cast<int>(bits);
  }

  // Returns false if the table is not a valid one. If `ac`, symbols are run << 4 | size; otherwise they are the sizes
  // of DC differences, and the advance is 1. `spec` must outlive this object.
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
        if (length + size > LOOKUP_BITS || !ac) {  // DC entries never hold values: this saves Reader::dc a branch
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

// Looks up two symbols of AC coefficients with their values.
//
// An entry is: number of bits used | (advance - 1) << 4 | second advance << 8 | second value << 16 | value << 24. If
// the window holds only one symbol, the second advance is 0 and the second value is the first. The reader then writes
// the same coefficient twice and needs no branch. The end of a block is an advance that passes every coefficient. The
// number of bits is 0 if the symbol must be read with Codes.
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
      if (advance == Codes::END_OF_BLOCK) {  // stored as a coefficient of 0 and an advance past the end
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

// A step describes the symbols in a window of STEP_BITS bits: the number of bits that they and their values take, and
// the number of coefficients << BITS. Steps can be added.
//
// The counts are chosen so that bit 7 of a sum is set if and only if the block is irregular, and one test covers all
// cases. A DC coefficient counts as 64 coefficients, so more than 63 AC coefficients after it give 128 or more. The end
// of a block counts as 257: added to fewer than DC + 63 it leaves bit 7 clear, added to DC + 63 (a complete block,
// which has no end code) it sets bit 7. NONE sets it from every state within a block, and NO_DC before the DC
// coefficient.
namespace step {

constexpr int BITS = 7;  // three steps take fewer than 128 bits
constexpr uint32_t DC = 64, END = 257;
constexpr uint16_t NONE = 65 << BITS, NO_DC = 128 << BITS;  // the window begins with a longer code, or with no code

constexpr uint16_t of(uint32_t bits, uint32_t coefficients) {
  return static_cast<uint16_t>(bits | coefficients << BITS);
}
inline void fill(uint16_t *to, uint16_t step, size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] = step;
}

}  // namespace step

// The tables for both ways to read the AC coefficients of a block: with their values, and skipping them.
struct AcTable {
  Pairs pairs;
  Codes codes;
  // The steps for windows of 0, 1, ... STEP_BITS bits, one level after the other. A step covers all symbols whose codes
  // lie in the window, including the value of the last one even if it reaches beyond the window. If the window holds no
  // complete code, the step is step::NONE at the last level and 0 at the others.
  uint16_t levels[2 << STEP_BITS];
  Spec spec;  // the tables are rebuilt only for another spec: many files have the same one
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

  // A window consists of a symbol and a narrower window behind it, and its step is the sum of their steps. Nearly every
  // original has Huffman tables of its own, so that this table is built for nearly every image that is kept by
  // preprocess/.
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
  uint16_t steps[1 << STEP_BITS];  // each step covers one symbol
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

// The position in the block of coefficient k of the zigzag order. Indices beyond the last coefficient map to the
// position of the last one, so that Reader::ac can store before it checks the index.
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

// Copies the bytes from `next` to the next marker, without the zeros that are stuffed behind each 0xFF. Returns the end
// of the copy and sets `next` to the marker. Returns nullptr if there is no marker before `end`.
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

// A block of 64 codes of at most 16 bits, each with 11 bits of value, may be read beyond the end of the bytes.
constexpr size_t READ_AHEAD = 512;

// Takes bits from unstuffed bytes, which must be followed by READ_AHEAD zeros.
//
// The methods do not check for the end of the bytes; the caller must check `left` after each block. Methods that are
// inlined into a function for `avx2,bmi2` are ALWAYS_INLINE: without it, GCC compiled them once, for plain x86-64. The
// caller must use a local copy of the reader; otherwise each symbol writes the state back to memory.
struct Reader {
  const uint8_t *next = nullptr, *end = nullptr;
  uint64_t bits = 0;  // left-aligned; bits after the first `count` are zero or already the correct ones
  int count = 0;

  ALWAYS_INLINE void refill() {  // afterwards `count` is at least 56
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
  // Returns a reader that starts at bit `position`.
  static ALWAYS_INLINE Reader at(const uint8_t *start, size_t position, const uint8_t *end = nullptr) {
    Reader reader{start + (position >> 3), end};
    reader.refill();
    reader.skip(static_cast<int>(position & 7));
    return reader;
  }
  // The number of bits taken since `start`.
  size_t taken(const uint8_t *start) const {
    return 8 * static_cast<size_t>(next - start) - static_cast<size_t>(count);
  }
  // The number of bits not yet taken; negative if more bits were taken than there are.
  ptrdiff_t left() const { return 8 * (end - next) + count; }

  // Decodes a code that is too long for the look-up. Returns length << 8 | symbol, or 0 if there is no such code.
  // It is static because a call with the address of the reader would keep the reader's state out of registers.
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

  // Refills, reads the next block's DC difference and adds it to `prediction`. Returns false if the code is invalid.
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
    // The same as value_of, but 0 if the size is 0. It has no branch.
    const int value = static_cast<int>(bits >> 1 >> (63 - size)), positive = -static_cast<int>(bits >> 63);
    skip(static_cast<int>(size));
    const int difference = value + (~positive & (1 - (1 << size)));
    // Damaged files may overflow the sum, which is defined for unsigned integers only.
    prediction = static_cast<int>(static_cast<uint32_t>(prediction) + static_cast<uint32_t>(difference));
    return true;
  }

  // Reads the AC coefficients of a block into `block`, which must be zero, at the positions given by `order`. Returns
  // the zigzag index of the last coefficient, 0 if there is none, or -1 if a code is invalid or irregular.
  //
  // Up to four look-ups of 11 bits fit into one refill. Values are stored before the index is checked: `order` maps
  // indices beyond the block to its last position.
  ALWAYS_INLINE int ac(const AcTable &table, const Order &order, int16_t *block) {
    uint32_t k = 0;
    for (;;) {
      refill();
      uint32_t entry;
      for (int i = 0; i < 4; ++i) {
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
            // The block is complete with the first symbol, so the second one belongs to another table. Undo it.
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

  // Skips the AC coefficients of a block. Returns false if a code is invalid or irregular.
  ALWAYS_INLINE bool skip_ac(const AcTable &table) {
    uint32_t k = 1;
    const uint16_t *steps = table.steps();
    __asm__("" : "+r"(steps));  // without this, GCC computes the address again for each look-up
    for (;;) {
      refill();
      bool rare = false;
      for (int i = 0; i < 2; ++i) {  // a step takes at most 22 bits: a window of 12 and a value of 10
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
