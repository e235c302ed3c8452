// Copies a clean baseline scan block by block, with restart markers where they are wanted: the same coefficients as
// through libjpeg-turbo's arrays, at a fraction of the time, in the original's AC Huffman tables.
//
// Whatever is not perfectly regular (damage, restart markers out of order, bytes before a marker, several scans) is
// left to libjpeg, whose verdict counts: `rewrite_baseline` then returns 0, having changed nothing but its buffers.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>  // jpeglib.h needs FILE
#include <cstring>

#include <jpeglib.h>

#include "huffman_bits.h"

namespace rewrite {

struct Component {
  Decoder dc_decoder;
  int dc_encoder, ac_table;
  uint32_t across, down;       // blocks in an MCU
  int decoded_dc, encoded_dc;  // predictions
};

constexpr size_t MAX_MCU_BYTES = 6 * MAX_BLOCK_BYTES;

struct Rewriter {
  Component components[3];
  Encoder dc_encoders[2];
  AcTable ac_tables[2];
  uint8_t written[(1 << 15) + 2 * MAX_MCU_BYTES];  // not yet stuffed
};

// 8-bit samples give no larger ones, and standard Huffman tables have no codes for more.
constexpr int MAX_DC = 1023, MIN_DC = -1024, MAX_DC_BITS = 11;

// Copies a block's bits, but for its DC coefficient, whose prediction may have become another one.
inline bool rewrite_block(Reader &all_read, Writer &all_written, const uint8_t *source, Component &component,
                          const Encoder &dc, const AcTable &ac) {
  Reader reader = all_read;  // copies stay in registers: what is written through a uint8_t * may alias the originals
  Writer writer = all_written;
  reader.refill();
  const uint32_t entry = reader.peek(component.dc_decoder);
  const int size = static_cast<int>(entry & 255);
  if (entry == 0 || size > MAX_DC_BITS) return false;
  reader.skip(static_cast<int>(entry >> 8));
  if (size > 0) {
    const int value = static_cast<int>(reader.bits >> (64 - size));
    reader.skip(size);
    component.decoded_dc += value < 1 << (size - 1) ? value - (1 << size) + 1 : value;
  }
  if (component.decoded_dc < MIN_DC || component.decoded_dc > MAX_DC) return false;
  const int difference = component.decoded_dc - component.encoded_dc;
  component.encoded_dc = component.decoded_dc;
  const uint32_t magnitude = static_cast<uint32_t>(difference < 0 ? -difference : difference);
  const int bits = magnitude == 0 ? 0 : 32 - __builtin_clz(magnitude);
  const uint32_t value = static_cast<uint32_t>(difference < 0 ? difference - 1 : difference) & ((1u << bits) - 1);
  const uint32_t code = dc.entries[bits];
  writer.put(code >> 8 << bits | value, static_cast<int>(code & 255) + bits);
  const size_t start = reader.taken(source);
  if (!reader.skip_coefficients(ac) || reader.left() < 0) return false;
  writer.copy(source, start, reader.taken(source));
  all_read = reader;
  all_written = writer;
  return true;
}

struct Header {
  uint8_t *next;

  void byte(int value) { *next++ = static_cast<uint8_t>(value); }
  void word(uint32_t value) {
    byte(static_cast<int>(value >> 8 & 255));
    byte(static_cast<int>(value & 255));
  }
  void bytes(const uint8_t *values, size_t count) {
    std::memcpy(next, values, count);
    next += count;
  }
  void huffman_table(const JHUFF_TBL *table, int id) {
    uint32_t num_symbols = 0;
    for (int length = 1; length <= 16; ++length) num_symbols += table->bits[length];
    word(0xFFC4);
    word(19 + num_symbols);
    byte(id);
    bytes(table->bits + 1, 16);
    bytes(table->huffval, num_symbols);
  }
};

constexpr size_t MAX_HEADER_BYTES = 2048;

// The order of libjpeg: JFIF, quantization tables, frame, Huffman tables, restart interval, scan. AC tables are those
// of `in`, by the numbers that they have there.
inline bool write_header(Header &header, const jpeg_decompress_struct &in, const jpeg_compress_struct &out,
                         uint32_t restart_interval) {
  static const uint8_t JFIF[] = {0xFF, 0xD8, 0xFF, 0xE0, 0, 16, 'J', 'F', 'I', 'F', 0, 1, 1, 0, 0, 1, 0, 1, 0, 0};
  // Zigzag order to natural order; libjpeg has such a table but does not export it.
  static const uint8_t NATURAL[DCTSIZE2] = {
      0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
      41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
      30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};
  header.bytes(JFIF, sizeof JFIF);
  bool written[NUM_QUANT_TBLS] = {};
  for (int i = 0; i < out.num_components; ++i) {
    const int id = out.comp_info[i].quant_tbl_no;
    if (id < 0 || id >= NUM_QUANT_TBLS || out.quant_tbl_ptrs[id] == nullptr) return false;
    if (written[id]) continue;
    written[id] = true;
    header.word(0xFFDB);
    header.word(67);
    header.byte(id);
    for (uint8_t k : NATURAL) {
      if (out.quant_tbl_ptrs[id]->quantval[k] > 255) return false;
      header.byte(out.quant_tbl_ptrs[id]->quantval[k]);
    }
  }
  header.word(0xFFC0);
  header.word(static_cast<uint32_t>(8 + 3 * out.num_components));
  header.byte(8);
  header.word(out.image_height);
  header.word(out.image_width);
  header.byte(out.num_components);
  for (int i = 0; i < out.num_components; ++i) {
    const jpeg_component_info &component = out.comp_info[i];
    header.byte(component.component_id);
    header.byte(component.h_samp_factor << 4 | component.v_samp_factor);
    header.byte(component.quant_tbl_no);
  }
  for (int id = 0; id < 2; ++id) {
    bool dc_used = false, ac_used = false;
    for (int i = 0; i < out.num_components; ++i) {
      dc_used |= out.comp_info[i].dc_tbl_no == id;
      ac_used |= in.comp_info[i].ac_tbl_no == id;
    }
    if (dc_used) header.huffman_table(out.dc_huff_tbl_ptrs[id], id);
    if (ac_used) header.huffman_table(in.ac_huff_tbl_ptrs[id], id | 0x10);
  }
  if (restart_interval != 0) {
    header.word(0xFFDD);
    header.word(4);
    header.word(restart_interval);
  }
  header.word(0xFFDA);
  header.word(static_cast<uint32_t>(6 + 2 * out.num_components));
  header.byte(out.num_components);
  for (int i = 0; i < out.num_components; ++i) {
    header.byte(out.comp_info[i].component_id);
    header.byte(out.comp_info[i].dc_tbl_no << 4 | in.comp_info[i].ac_tbl_no);
  }
  header.word(63);  // all coefficients: 0 to 63
  header.byte(0);
  return true;
}

// `in` has been read up to its first scan, and `out` has its parameters and libjpeg's standard Huffman tables.
// Returns the number of bytes written into `output`, or 0. Buffers have `data` and `grow`.
template <typename Buffer>
__attribute__((noinline)) size_t rewrite_baseline(const jpeg_decompress_struct &in, const jpeg_compress_struct &out,
                                                  Buffer &output, Buffer &unstuffed, Rewriter &state) {
  if (in.progressive_mode || in.comps_in_scan != in.num_components || in.num_components > 3) return 0;
  if (in.Ss != 0 || in.Se != DCTSIZE2 - 1 || in.Ah != 0 || in.Al != 0) return 0;
  const bool grey = in.num_components == 1;
  const uint32_t across = grey ? 1 : static_cast<uint32_t>(in.comp_info[0].h_samp_factor);
  const uint32_t down = grey ? 1 : static_cast<uint32_t>(in.comp_info[0].v_samp_factor);
  const uint32_t mcus = (in.image_width + 8 * across - 1) / (8 * across);
  const uint32_t rows = (in.image_height + 8 * down - 1) / (8 * down);
  for (int i = 0; i < in.num_components; ++i) {
    const jpeg_component_info &info = in.comp_info[i];
    if (in.cur_comp_info[i] != &info || info.dc_tbl_no >= NUM_HUFF_TBLS || info.ac_tbl_no > 1) return 0;
    Component &component = state.components[i];
    if (!component.dc_decoder.build(in.dc_huff_tbl_ptrs[info.dc_tbl_no], 15)) return 0;
    if (!state.ac_tables[info.ac_tbl_no].build(in.ac_huff_tbl_ptrs[info.ac_tbl_no])) return 0;
    component.dc_encoder = out.comp_info[i].dc_tbl_no;
    component.ac_table = info.ac_tbl_no;
    component.across = i == 0 ? across : 1;
    component.down = i == 0 ? down : 1;
    component.decoded_dc = component.encoded_dc = 0;
  }
  for (int id = 0; id < 2; ++id) state.dc_encoders[id].build(out.dc_huff_tbl_ptrs[id]);
  const uint64_t wanted_interval = static_cast<uint64_t>(out.restart_in_rows) * mcus;
  const uint32_t interval = static_cast<uint32_t>(wanted_interval < 65535 ? wanted_interval : 65535);
  const uint8_t *source = in.src->next_input_byte, *source_end = source + in.src->bytes_in_buffer;
  if (!unstuffed.grow(in.src->bytes_in_buffer + MAX_BLOCK_BYTES) || !output.grow(MAX_HEADER_BYTES)) return 0;
  Header header{output.data};
  if (!write_header(header, in, out, interval)) return 0;
  size_t size = static_cast<size_t>(header.next - output.data);
  Reader reader;
  Writer writer;
  writer.next = state.written;

  const auto open_interval = [&] {
    uint8_t *end = unstuff(unstuffed.data, source, source_end);
    if (end == nullptr) return false;
    std::memset(end, 0, MAX_BLOCK_BYTES);
    reader = Reader{unstuffed.data, end};
    for (Component &component : state.components) component.decoded_dc = 0;
    return true;
  };
  // Between two markers there must be whole bytes of codes and nothing else.
  const auto at_marker = [&](int marker) {
    if (reader.left() >= 8 || source[1] != marker) return false;
    source += 2;
    return true;
  };
  const auto store = [&] {  // all whole bytes
    const size_t length = static_cast<size_t>(writer.next - state.written);
    if (!output.grow(size + 2 * length + 2)) return false;
    size = static_cast<size_t>(stuff(output.data + size, state.written, writer.next) - output.data);
    writer.next = state.written;
    return true;
  };
  const auto close_interval = [&](int marker) {
    writer.end_of_interval();
    if (!store()) return false;
    output.data[size++] = 0xFF;
    output.data[size++] = static_cast<uint8_t>(marker);
    for (Component &component : state.components) component.encoded_dc = 0;
    return true;
  };

  if (!open_interval()) return 0;
  uint32_t left_to_read = in.restart_interval, left_to_write = interval;
  int next_read = 0, next_written = 0;
  for (uint32_t row = 0; row < rows; ++row)
    for (uint32_t mcu = 0; mcu < mcus; ++mcu) {
      if (in.restart_interval != 0 && left_to_read-- == 0) {
        if (!at_marker(0xD0 + next_read) || !open_interval()) return 0;
        next_read = (next_read + 1) & 7;
        left_to_read = in.restart_interval - 1;
      }
      if (interval != 0 && left_to_write-- == 0) {
        if (!close_interval(0xD0 + next_written)) return 0;
        next_written = (next_written + 1) & 7;
        left_to_write = interval - 1;
      } else if (state.written + sizeof state.written - writer.next < ptrdiff_t{2 * MAX_MCU_BYTES}) {
        if (!store()) return 0;
      }
      for (int i = 0; i < in.num_components; ++i) {
        Component &component = state.components[i];
        const Encoder &dc = state.dc_encoders[component.dc_encoder];
        const AcTable &ac = state.ac_tables[component.ac_table];
        for (uint32_t block = 0; block < component.across * component.down; ++block)
          if (!rewrite_block(reader, writer, unstuffed.data, component, dc, ac)) return 0;
      }
    }
  return at_marker(0xD9) && close_interval(0xD9) ? size : 0;
}

}  // namespace rewrite
