// Finds the positions where the blocks of a baseline scan begin, without decoding its coefficients.
//
// A look-up must wait for the one before it, because the length of a code is known only after its look-up, and a branch
// at the end of each block would often be mispredicted. The scan is therefore cut into two parts that are read at the
// same time, in turns and without branches: while the look-up of one part is waiting, the processor works on the other.
//
// The second part begins at an arbitrary bit, most likely inside a code. A Huffman decoder that starts at a wrong bit
// soon falls into step with the correct codes, and then with the blocks. The first part is read on until both have a
// block that begins at the same bit; only from there on do the starts of the second part count. If they never meet,
// everything comes from the first part. Thus the result is always exact.
//
// Keeping an ImageNet original takes 353 microseconds this way, instead of 440 in one part with branches (200 images of
// 111 kB). One part without branches takes longer than with them (507 against 469 microseconds), and three or four
// parts are 2 to 20 % slower than two, whose state just fits into the registers.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../../pipelines/native/huffman.h"
#include "../../pipelines/native/simd.h"

namespace block_starts {

constexpr int MAX_BLOCKS = 10;  // in an MCU
constexpr int MAX_PARTS = 2;    // the state of more parts does not fit into the registers
constexpr size_t MIN_PART_BITS = 1 << 15;
constexpr size_t SEARCH_BITS = 1000;           // the bits that are read at a time until two parts meet
constexpr size_t MAX_BYTES = size_t{1} << 28;  // positions in bits are stored in 32 bits
constexpr int LOOKUPS = 3;                     // a load has 57 bits: two steps of at most 22, and a window of 12
constexpr size_t MAX_TURN_BITS = 2 * 22 + 27;  // two steps, and a symbol that is in no table of steps
constexpr size_t MARGIN = 1 + LOOKUPS;         // starts may be written beyond the last one that is needed
constexpr int MAX_RESTARTS = 1000;             // of a part that finds invalid codes

// One block of an MCU: its tables, and those of the next block.
struct Kind {
  const uint16_t *ac_steps, *next_dc_steps;
  const Kind *next;
  const huffman::AcTable *ac;
  const huffman::DcTable *dc;
};

// The blocks of an MCU in their order. `period` is the length after which the sequence of tables repeats; it may be
// shorter than an MCU, and then two parts meet sooner.
struct Kinds {
  Kind kinds[MAX_BLOCKS];
  uint32_t period = 0;

  void add(const huffman::DcTable &dc, const huffman::AcTable &ac) {
    kinds[period++] = Kind{ac.steps(), nullptr, nullptr, &ac, &dc};
  }
  void close() {
    const uint32_t all = period;
    for (period = 1; period < all; ++period)
      if (all % period == 0 && repeats(all)) break;
    for (uint32_t i = 0; i < period; ++i) {
      kinds[i].next = kinds + (i + 1) % period;
      kinds[i].next_dc_steps = kinds[i].next->dc->steps;
    }
  }

 private:
  bool repeats(uint32_t all) const {
    for (uint32_t i = period; i < all; ++i)
      if (!(kinds[i].ac->spec == kinds[i - period].ac->spec) || !(kinds[i].dc->spec == kinds[i - period].dc->spec))
        return false;
    return true;
  }
};

// `state` is 0 before the DC coefficient, and otherwise (63 + the zigzag index of the next coefficient) << step::BITS.
// The lower bits are the number of bits taken in this turn. The bit IRREGULAR is set by an invalid code, by more
// coefficients than a block has, and by an end of block after the last coefficient (see huffman::step).
constexpr uint32_t END = huffman::step::DC + huffman::BLOCK - 1;
constexpr uint32_t BITS_TAKEN = (1 << huffman::step::BITS) - 1, IRREGULAR = 128 << huffman::step::BITS;

struct Place {
  size_t position;  // in bits
  uint32_t state;
  const uint16_t *steps;  // the table of the next look-up
  const Kind *kind;       // the kind of the block at `position`
  size_t block;           // the index of that block among all starts

  void open(size_t at, const Kind *first) {
    position = at;
    state = 0;
    kind = first;
    steps = kind->dc->steps;
  }
};

struct Part : Place {
  size_t limit, end;   // the position where the part stops, and the end of the interval
  size_t first, full;  // the index of the first block, and the index where the part stops
  int restarts;        // the number of restarts that are still allowed; 0 for the first part
  const Kind *first_kind;
  bool failed;

  bool stopped() const { return failed || position >= limit || block >= full; }
};

ALWAYS_INLINE uint64_t load(const uint8_t *data, size_t position) {
  uint64_t bytes;
  std::memcpy(&bytes, data + (position >> 3), 8);
  return __builtin_bswap64(bytes) << (position & 7);
}

// Returns the step over one symbol and its value if no table of steps holds it; 0 if the symbol is irregular. It is
// never inlined because it is rare: 920 of 80,000 look-ups of an image.
__attribute__((noinline)) inline uint32_t rare_step(const Kind &kind, uint32_t state, uint64_t bits) {
  const uint32_t before = state >> huffman::step::BITS;
  const huffman::Codes &codes = before == 0 ? kind.dc->codes : kind.ac->codes;
  const uint32_t code = huffman::Reader::long_code(codes, bits), symbol = code & 255, size = symbol & 15;
  const uint32_t taken = (code >> 8) + size;
  if (code == 0) return 0;
  if (before == 0) return symbol > huffman::MAX_DC_BITS ? 0 : huffman::step::of(taken, huffman::step::DC);
  if (symbol == 0) return huffman::step::of(taken, huffman::step::END);
  const uint32_t run = (symbol >> 4) + 1, behind = before + run;
  const bool regular = size == 0 ? symbol == 0xF0 && behind < END : behind <= END && size <= huffman::MAX_AC_BITS;
  return regular ? huffman::step::of(taken, run) : 0;
}

// Restarts a part one bit after a position where no regular symbol was found. Returns false if the part must stop.
__attribute__((noinline)) inline bool restart(Part &part, uint32_t *starts) {
  part.position += part.state & BITS_TAKEN;
  part.state &= ~BITS_TAKEN;
  part.failed = part.restarts == 0 || starts[part.block] + 8 > part.end;  // it may be in the padding of the last byte
  if (part.failed) return false;
  --part.restarts;
  part.open(part.position + 1, part.first_kind);
  part.block = part.first;
  starts[part.block] = static_cast<uint32_t>(part.position);
  return true;
}

// Moves on to the next block if this one has ended. The conditional moves are written in assembly because GCC compiles
// the C++ code below to branches.
ALWAYS_INLINE void end_block(Place &place, uint32_t taken) {
#if defined(__x86_64__)
  __asm__("cmpl %[end], %[state]\n\t"
          "cmovae %[next_dc_steps], %[steps]\n\t"
          "cmovae %[next], %[kind]\n\t"
          "cmovae %[taken], %[state]\n\t"
          "sbbq $-1, %[block]"
          : [state] "+&r"(place.state), [steps] "+&r"(place.steps), [kind] "+r"(place.kind), [block] "+&r"(place.block)
          : [end] "i"(END << huffman::step::BITS), [next_dc_steps] "m"(place.kind->next_dc_steps),
            [next] "m"(place.kind->next), [taken] "r"(taken)
          : "cc");
#else
  const bool ended = place.state >= END << huffman::step::BITS;
  place.steps = ended ? place.kind->next_dc_steps : place.steps;
  place.kind = ended ? place.kind->next : place.kind;
  place.state = ended ? taken : place.state;
  place.block += ended;
#endif
}

// Does LOOKUPS look-ups with one load of bits. Returns false if the part has stopped.
ALWAYS_INLINE bool take_turn(Place &place, Part &part, const uint8_t *data, uint32_t *starts) {
  uint64_t bits = load(data, place.position);
#pragma GCC unroll 3
  for (int i = 0; i < LOOKUPS; ++i) {
    uint32_t step = place.steps[bits >> (64 - huffman::STEP_BITS)], state = place.state + step;
    if (__builtin_expect(state & IRREGULAR, 0)) {
      step = rare_step(*place.kind, place.state, load(data, place.position + (place.state & BITS_TAKEN)));
      if (step == 0) {
        static_cast<Place &>(part) = place;
        const bool running = restart(part, starts);
        place = part;
        return running;
      }
      state = place.state + step;
      i = LOOKUPS;  // the loaded bits may not suffice for another look-up
    }
    bits <<= step & 63;
    const uint32_t taken = state & BITS_TAKEN;
    starts[place.block + 1] = static_cast<uint32_t>(place.position + taken);
    place.steps = place.kind->ac_steps;
    place.state = state;
    end_block(place, taken);
  }
  place.position += place.state & BITS_TAKEN;
  place.state &= ~BITS_TAKEN;
  return true;
}

// Reads N parts in turns until one of them stops. The inner loop has no tests of position and block count; the number
// of turns that are safe without them is computed beforehand.
template <int N>
ALWAYS_INLINE void read_on(Part *const *parts, const uint8_t *data, uint32_t *starts) {
  Place places[N];
  for (int i = 0; i < N; ++i) places[i] = *parts[i];
  bool running = true;
  do {
    size_t turns = ~size_t{0};
    for (int i = 0; i < N; ++i) {
      const size_t by_bits = (parts[i]->limit - places[i].position + MAX_TURN_BITS - 1) / MAX_TURN_BITS;
      const size_t by_blocks = (parts[i]->full - places[i].block + LOOKUPS - 1) / LOOKUPS;
      const size_t fewer = by_bits < by_blocks ? by_bits : by_blocks;
      turns = fewer < turns ? fewer : turns;
    }
    do {
#pragma GCC unroll 2
      for (int i = 0; i < N; ++i) running &= take_turn(places[i], *parts[i], data, starts);
    } while (running && --turns != 0);
    for (int i = 0; i < N; ++i) {
      static_cast<Place &>(*parts[i]) = places[i];
      running &= !parts[i]->stopped();
    }
  } while (running);
}

#if defined(__x86_64__)
template <int N>
__attribute__((target("avx2,bmi,bmi2,lzcnt"), noinline)) void read_on_bmi(Part *const *parts, const uint8_t *data,
                                                                          uint32_t *starts) {
  read_on<N>(parts, data, starts);
}
#endif
template <int N>
__attribute__((noinline)) void read_on_plain(Part *const *parts, const uint8_t *data, uint32_t *starts) {
  read_on<N>(parts, data, starts);
}

template <int N>
void read_parts(Part *const *parts, const uint8_t *data, uint32_t *starts) {
#if defined(__x86_64__)
  if (simd::avx2()) return read_on_bmi<N>(parts, data, starts);
#endif
  read_on_plain<N>(parts, data, starts);
}

// Reads all parts until each has stopped.
inline void read_all(Part *parts, int num_parts, const uint8_t *data, uint32_t *starts) {
  for (;;) {
    Part *running[MAX_PARTS];
    int n = 0;
    for (int i = 0; i < num_parts; ++i)
      if (!parts[i].stopped()) running[n++] = parts + i;
    if (n == 0) return;
    if (n == 1) {
      read_parts<1>(running, data, starts);
    } else {
      read_parts<2>(running, data, starts);
    }
  }
}

// Appends the starts of `later` to those of `part`, from the first block on that begins at the same bit in both. Reads
// `part` on until there is such a block. It must also be the same block of the period: equal positions with different
// tables do not mean that both read the same codes from there on.
inline void join(Part &part, const Part &later, uint32_t period, const uint8_t *data, uint32_t *starts) {
  size_t ours = part.block, theirs = later.first;
  while (ours > part.first && starts[ours - 1] >= starts[theirs]) --ours;
  for (;;) {
    for (; ours <= part.block; ++ours) {
      while (starts[theirs] < starts[ours])
        if (++theirs > later.block) return;
      if (starts[theirs] != starts[ours] || (ours - part.first) % period != (theirs - later.first) % period) continue;
      const size_t room = part.full - ours, wanted = later.block - theirs, count = room < wanted ? room : wanted;
      std::memmove(starts + ours, starts + theirs, (count + 1) * sizeof *starts);
      static_cast<Place &>(part) = later;
      part.block = ours + count;
      part.failed = later.failed;
      return;
    }
    part.limit = part.position + SEARCH_BITS < part.end ? part.position + SEARCH_BITS : part.end;
    if (part.stopped()) return;
    read_all(&part, 1, data, starts);
  }
}

// Returns num_blocks + 1 positions in bits, counted from `data`: the start of each block of the interval, and the end
// of the last one. Returns nullptr if a block is irregular. `end` must be followed by READ_AHEAD zeros. A Buffer has
// `data` and `grow`.
template <typename Buffer>
const uint32_t *find(const uint8_t *data, const uint8_t *end, size_t num_blocks, const Kinds &kinds, Buffer &memory) {
  const size_t size = static_cast<size_t>(end - data), bits = 8 * size;
  if (size > MAX_BYTES || num_blocks > bits / 2) return nullptr;  // a block has at least two codes
  const size_t fitting = bits / MIN_PART_BITS;
  const size_t num_parts = fitting < 1 ? 1 : fitting < MAX_PARTS ? fitting : MAX_PARTS;
  const size_t part_bits = bits / num_parts, capacity = num_blocks + MARGIN;
  if (!memory.grow(num_parts * capacity * sizeof(uint32_t))) return nullptr;
  uint32_t *starts = reinterpret_cast<uint32_t *>(memory.data);
  Part parts[MAX_PARTS];
  for (size_t i = 0; i < num_parts; ++i) {
    Part &part = parts[i];
    part.open(i * part_bits, kinds.kinds);
    part.first_kind = kinds.kinds;
    part.limit = i + 1 < num_parts ? (i + 1) * part_bits : bits;
    part.end = bits;
    part.first = part.block = i * capacity;
    part.full = part.first + num_blocks;
    part.restarts = i == 0 ? 0 : MAX_RESTARTS;
    part.failed = false;
    starts[part.first] = static_cast<uint32_t>(part.position);
  }
  read_all(parts, static_cast<int>(num_parts), data, starts);
  for (size_t i = 1; i < num_parts; ++i) {
    parts[0].limit = i * part_bits;
    read_all(parts, 1, data, starts);
    join(parts[0], parts[i], kinds.period, data, starts);
  }
  parts[0].limit = bits;
  read_all(parts, 1, data, starts);
  return parts[0].block >= num_blocks ? starts : nullptr;
}

}  // namespace block_starts
