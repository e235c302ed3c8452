// Decodes the scan of a baseline JPEG to the samples of the requested blocks.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "baseline_frame.h"
#include "huffman.h"
#include "idct.h"
#include "memory.h"
#include "simd.h"

namespace crop {

// Reads the intervals between restart markers one at a time.
//
// Huffman codes have no fixed length, so the position of an MCU is known only after all codes before it have been
// decoded, and each DC coefficient is stored as a difference to the one before it. A restart marker interrupts both: it
// is aligned to a byte and resets the predictions. `jump` therefore skips all intervals above a crop by a search for
// 0xFF, without decoding a code. preprocess/ writes a marker at each MCU row for this purpose.
//
// Each marker has a number modulo 8. Every number is checked: if a marker is missing or out of order, the
// interval does not hold the expected MCUs, and the file is left to libjpeg-turbo.
struct Scan {
  const Frame &frame;
  Memory &memory;
  const uint8_t *next;    // the first byte of the next interval
  uint32_t interval = 0;  // the number of the next interval
  huffman::Reader reader;

  Scan(const Frame &of, Memory &unstuffed) : frame(of), memory(unstuffed), next(of.scan) {}

  bool marker_of(uint32_t number) const { return next[1] == 0xD0 + (number & 7); }

  // Skips whole intervals up to the interval with the number `to`.
  bool jump(uint32_t to) {
    while (interval < to) {
      next = static_cast<const uint8_t *>(std::memchr(next, 0xFF, static_cast<size_t>(frame.end - next)));
      if (next == nullptr || frame.end - next < 2) return false;
      if (next[1] != 0 && !marker_of(interval++)) return false;
      next += 2;
    }
    return true;
  }

  // Starts to read the interval at `next`. Afterwards `next` points to the marker behind the interval.
  bool open() {
    uint8_t *end = huffman::unstuff(memory.data, next, frame.end);
    if (end == nullptr) return false;
    std::memset(end, 0, huffman::READ_AHEAD);
    reader = huffman::Reader{memory.data, end};
    return true;
  }

  // Ends an interval. Returns false unless its codes fill all bytes up to the marker: fewer than 8 bits may be unused.
  bool close() {
    if (reader.left() < 0 || reader.left() >= 8) return false;
    if (++interval == number_of_intervals()) return next[1] == 0xD9;
    if (!marker_of(interval - 1)) return false;
    next += 2;
    return true;
  }

  uint32_t number_of_intervals() const {
    const uint64_t mcus = uint64_t{frame.mcus} * frame.mcu_rows;
    return frame.restart_interval == 0
               ? 1
               : static_cast<uint32_t>((mcus + frame.restart_interval - 1) / frame.restart_interval);
  }
};

// Skips one MCU and updates the DC predictions.
//
// The bits left are checked after each block, here and in `read_mcu`. A check after each MCU is not enough: with a
// table of 255 long codes, a scan of few bytes was read up to 1,200 bytes beyond its end.
ALWAYS_INLINE bool skip_mcu(huffman::Reader &shared, Frame &frame, Tables &tables) {
  huffman::Reader reader = shared;  // a local copy stays in registers
  for (uint32_t i = 0; i < frame.num_components; ++i) {
    Component &component = frame.components[i];
    for (uint32_t block = 0; block < component.across * component.down; ++block)
      if (!reader.dc(tables.dc[component.dc], component.prediction) || !reader.skip_ac(tables.ac[component.ac]) ||
          reader.left() < 0)
        return false;
  }
  shared = reader;
  return true;
}

// GCC compiles a memset of 128 bytes to `rep stos`, which cost 20 % of the whole decode. This is faster.
ALWAYS_INLINE void clear(int16_t *block) {
  typedef int16_t Row __attribute__((vector_size(16), may_alias));
  for (int i = 0; i < 8; ++i) reinterpret_cast<Row *>(block)[i] = Row{};
}

// Reads the coefficients of the requested blocks of one MCU and skips its other blocks.
ALWAYS_INLINE bool read_mcu(huffman::Reader &shared, Frame &frame, Tables &tables, uint32_t row,
                            uint32_t column) {
  huffman::Reader reader = shared;
  for (uint32_t i = 0; i < frame.num_components; ++i) {
    Component &component = frame.components[i];
    const huffman::DcTable &dc = tables.dc[component.dc];
    const huffman::AcTable &ac = tables.ac[component.ac];
    for (uint32_t v = 0; v < component.down; ++v)
      for (uint32_t h = 0; h < component.across; ++h) {
        if (!reader.dc(dc, component.prediction)) return false;
        const uint32_t y = row * component.down + v, x = column * component.across + h;
        if (y < component.first_row || y >= component.end_row || x < component.first_column ||
            x >= component.end_column) {
          if (!reader.skip_ac(ac) || reader.left() < 0) return false;
          continue;
        }
        const size_t at = size_t{v} * component.columns() + (x - component.first_column);
        int16_t *block = component.coefficients + huffman::BLOCK * at;
        clear(block);
        const int last = reader.ac(ac, huffman::NATURAL, block);
        if (last < 0 || reader.left() < 0) return false;
        block[0] = static_cast<int16_t>(component.prediction);
        component.only_dc[at] = last == 0;
      }
  }
  shared = reader;
  return true;
}

// Transforms the requested blocks of one MCU row to samples. AVX2 code transforms two blocks at once, one in each half
// of the registers. Blocks without AC coefficients need no transform, so the two blocks are not always neighbours.
template <simd::Level LEVEL>
ALWAYS_INLINE void transform_row(const Component &component, const uint16_t *quantizers, uint32_t mcu_row) {
  const uint32_t columns = component.columns();
  for (uint32_t v = 0; v < component.down; ++v) {
    const uint32_t y = mcu_row * component.down + v;
    if (y < component.first_row || y >= component.end_row) continue;
    uint8_t *to = component.samples + 8 * component.stride * (y - component.first_row);
    const int16_t *blocks = component.coefficients + huffman::BLOCK * size_t{v} * columns;
    const uint8_t *only_dc = component.only_dc + size_t{v} * columns;
    uint32_t waiting = columns;  // the first block of an incomplete pair, or `columns` if there is none
    for (uint32_t x = 0; x < columns; ++x) {
      const int16_t *block = blocks + huffman::BLOCK * size_t{x};
      if (only_dc[x]) {
        idct::fill(to + 8 * x, component.stride, idct::only_dc(block[0], quantizers[0]));
        continue;
      }
      if (LEVEL != simd::Level::PLAIN) {
        if (waiting == columns) {
          waiting = x;
        } else {
          idct::two_blocks<LEVEL>(blocks + huffman::BLOCK * size_t{waiting}, block, quantizers, to + 8 * waiting,
                                  to + 8 * x, component.stride);
          waiting = columns;
        }
        continue;
      }
      idct::block_plain(block, quantizers, to + 8 * x, component.stride);
    }
    if (LEVEL != simd::Level::PLAIN && waiting != columns) {
      const int16_t *block = blocks + huffman::BLOCK * size_t{waiting};
      idct::two_blocks<LEVEL>(block, block, quantizers, to + 8 * waiting, to + 8 * waiting, component.stride);
    }
  }
}

// Decodes all requested blocks to samples.
template <simd::Level LEVEL>
ALWAYS_INLINE bool decode_blocks(Frame &frame, Tables &tables, Memory &unstuffed, uint32_t first_mcu, uint32_t end_mcu,
                                 uint32_t first_row, uint32_t end_row) {
  Scan scan(frame, unstuffed);
  const uint32_t interval = frame.restart_interval;
  uint64_t at = 0;  // the number of the next MCU
  bool opened = false;
  // Must be called before each MCU. Moves on to the next interval if the MCU is the first of one.
  const auto enter = [&] {
    if (opened && (interval == 0 || at % interval != 0)) return true;
    if (opened && !scan.close()) return false;
    for (uint32_t i = 0; i < frame.num_components; ++i) frame.components[i].prediction = 0;
    return opened = scan.open();
  };
  for (uint32_t row = first_row; row < end_row; ++row) {
    const uint64_t wanted = uint64_t{row} * frame.mcus + first_mcu;
    if (interval != 0 && wanted / interval > at / interval) {
      const uint32_t target = static_cast<uint32_t>(wanted / interval);
      if (opened) {  // `next` points to the marker behind the interval that was read last
        if (!scan.marker_of(scan.interval)) return false;
        scan.next += 2;
        ++scan.interval;
      }
      if (!scan.jump(target)) return false;
      at = uint64_t{target} * interval;
      opened = false;
    }
    for (; at < wanted; ++at)
      if (!enter() || !skip_mcu(scan.reader, frame, tables)) return false;
    for (uint32_t mcu = first_mcu; mcu < end_mcu; ++mcu, ++at)
      if (!enter() || !read_mcu(scan.reader, frame, tables, row, mcu)) return false;
    for (uint32_t i = 0; i < frame.num_components; ++i) {
      const Component &component = frame.components[i];
      transform_row<LEVEL>(component, tables.quantizers[component.quantizers], row);
    }
  }
  return true;
}

}  // namespace crop
