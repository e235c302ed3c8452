// Parses the header of a baseline JPEG. The functions return false for every file that our decoder does not handle.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "huffman.h"
#include "libjpeg_errors.h"

namespace crop {

struct Component {
  uint32_t across, down;       // the number of blocks in an MCU, horizontally and vertically
  uint32_t height, width;      // the component's size in samples
  uint8_t quantizers, dc, ac;  // the numbers of its tables
  int prediction;              // the DC coefficient of the previous block
  uint32_t first_column, end_column, first_row, end_row;  // the requested blocks, in the component's grid of blocks
  uint8_t *samples;                                       // output; points to the first requested block
  size_t stride;                                          // bytes between two rows of `samples`
  int16_t *coefficients;  // (down, end_column - first_column, 64): the requested blocks of one MCU row
  uint8_t *only_dc;       // (down, end_column - first_column): 1 for a block without AC coefficients

  uint32_t columns() const { return end_column - first_column; }
};

struct Frame {
  uint32_t height = 0, width = 0, num_components = 0;
  Component components[3];
  uint32_t mcus = 0, mcu_rows = 0, restart_interval = 0;
  const uint8_t *scan = nullptr, *end = nullptr;
};

// The tables of the previous files are kept, because the next file often has the same ones.
struct Tables {
  uint16_t quantizers[4][huffman::BLOCK];  // natural order
  huffman::Spec dc_specs[2], ac_specs[2];
  huffman::DcTable dc[2];
  huffman::AcTable ac[2];
};

struct Segment {
  const uint8_t *next, *end;

  size_t left() const { return static_cast<size_t>(end - next); }
  uint32_t byte() { return *next++; }
  uint32_t word() {
    next += 2;
    return static_cast<uint32_t>(next[-2]) << 8 | next[-1];
  }
};

inline bool read_quantizers(Segment segment, Tables &tables, uint32_t &defined) {
  while (segment.left() >= 65) {
    const uint32_t id = segment.byte();
    if (id > 3) return false;  // the upper four bits are set for tables of 16 bits
    for (size_t k = 0; k < huffman::BLOCK; ++k)
      tables.quantizers[id][huffman::NATURAL[k]] = static_cast<uint16_t>(segment.byte());
    defined |= 1u << id;
  }
  return segment.left() == 0;
}

inline bool read_huffman_tables(Segment segment, Tables &tables, uint32_t &defined) {
  while (segment.left() >= 17) {
    const uint32_t id = segment.byte();
    if ((id & ~0x11u) != 0) return false;
    huffman::Spec &spec = (id & 0x10 ? tables.ac_specs : tables.dc_specs)[id & 1];
    spec = huffman::Spec{};
    size_t count = 0;
    for (int length = 1; length <= 16; ++length) count += spec.bits[length] = static_cast<uint8_t>(segment.byte());
    if (count > 256 || count > segment.left()) return false;
    std::memcpy(spec.symbols, segment.next, count);
    segment.next += count;
    defined |= 1u << (id & 0x10 ? 2 + (id & 1) : id & 1);
  }
  return segment.left() == 0;
}

inline bool read_frame(Segment segment, Frame &frame, uint32_t *ids) {
  if (segment.left() < 6 || segment.byte() != 8) return false;
  frame.height = segment.word();
  frame.width = segment.word();
  frame.num_components = segment.byte();
  if (frame.num_components != 1 && frame.num_components != 3) return false;
  if (segment.left() != 3 * size_t{frame.num_components} || frame.height == 0 || frame.width == 0) return false;
  if (uint64_t{frame.height} * frame.width > libjpeg::MAX_PIXELS) return false;
  for (uint32_t i = 0; i < frame.num_components; ++i) {
    Component &component = frame.components[i];
    ids[i] = segment.byte();
    const uint32_t sampling = segment.byte(), table = segment.byte();
    if (table > 3) return false;
    component.quantizers = static_cast<uint8_t>(table);
    component.across = sampling >> 4;
    component.down = sampling & 15;
    if (component.across - 1 > 3 || component.down - 1 > 3) return false;  // libjpeg rejects them, also in grey images
  }
  Component &luma = frame.components[0];
  if (frame.num_components == 1) luma.across = luma.down = 1;  // a scan of one component is not interleaved
  if (luma.across < 1 || luma.across > 2 || luma.down < 1 || luma.down > 2) return false;
  for (uint32_t i = 1; i < frame.num_components; ++i)
    if (frame.components[i].across != 1 || frame.components[i].down != 1) return false;
  frame.mcus = (frame.width + 8 * luma.across - 1) / (8 * luma.across);
  frame.mcu_rows = (frame.height + 8 * luma.down - 1) / (8 * luma.down);
  for (uint32_t i = 0; i < frame.num_components; ++i) {
    Component &component = frame.components[i];
    component.height = i == 0 ? frame.height : (frame.height + luma.down - 1) / luma.down;
    component.width = i == 0 ? frame.width : (frame.width + luma.across - 1) / luma.across;
  }
  return true;
}

inline bool read_scan(Segment segment, Frame &frame, const uint32_t *ids) {
  if (segment.left() != 4 + 2 * size_t{frame.num_components} || segment.byte() != frame.num_components) return false;
  for (uint32_t i = 0; i < frame.num_components; ++i) {
    if (segment.byte() != ids[i]) return false;
    const uint32_t both = segment.byte();
    if ((both & ~0x11u) != 0) return false;
    frame.components[i].dc = static_cast<uint8_t>(both >> 4);
    frame.components[i].ac = static_cast<uint8_t>(both & 15);
  }
  return segment.byte() == 0 && segment.byte() == 63 && segment.byte() == 0;
}

// Reads all segments up to the first byte of the scan.
inline bool read_header(const uint8_t *data, size_t size, Frame &frame, Tables &tables) {
  Segment file{data, data + size};
  if (file.left() < 4 || file.word() != 0xFFD8) return false;
  uint32_t quantizers = 0, huffman_tables = 0, ids[3] = {};
  bool jfif = false;
  for (;;) {
    if (file.left() < 4) return false;
    const uint32_t marker = file.word(), length = file.word();
    if (length < 2 || length - 2 > file.left()) return false;
    const Segment segment{file.next, file.next + (length - 2)};
    file.next = segment.end;
    if (marker == 0xFFDB) {
      if (!read_quantizers(segment, tables, quantizers)) return false;
    } else if (marker == 0xFFC4) {
      if (!read_huffman_tables(segment, tables, huffman_tables)) return false;
    } else if (marker == 0xFFC0) {
      if (frame.num_components != 0 || !read_frame(segment, frame, ids)) return false;
    } else if (marker == 0xFFDD) {
      if (segment.left() != 2) return false;
      frame.restart_interval = static_cast<uint32_t>(segment.next[0]) << 8 | segment.next[1];
    } else if (marker == 0xFFDA) {
      if (frame.num_components == 0 || !read_scan(segment, frame, ids)) return false;
      break;
    } else if (marker == 0xFFE0) {
      jfif |= segment.left() >= 14 && !std::memcmp(segment.next, "JFIF", 5);
    } else if (marker == 0xFFEE || ((marker & 0xFFF0) != 0xFFE0 && marker != 0xFFFE)) {
      return false;  // an Adobe segment may announce other colours; other markers do not occur in a baseline file
    }
  }
  if (frame.num_components == 3 && !jfif && (ids[0] != 1 || ids[1] != 2 || ids[2] != 3)) return false;
  for (uint32_t i = 0; i < frame.num_components; ++i) {
    const Component &component = frame.components[i];
    if ((quantizers >> component.quantizers & 1) == 0) return false;
    if ((huffman_tables >> component.dc & 1) == 0 || (huffman_tables >> (2 + component.ac) & 1) == 0) return false;
    if (!tables.dc[component.dc].build(tables.dc_specs[component.dc])) return false;
    if (!tables.ac[component.ac].build(tables.ac_specs[component.ac])) return false;
  }
  frame.scan = file.next;
  frame.end = file.end;
  return true;
}

}  // namespace crop
