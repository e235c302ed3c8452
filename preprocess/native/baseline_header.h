// Writes the segments before the scan of a baseline JPEG, in libjpeg's order.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>  // jpeglib.h needs FILE
#include <cstring>

#include <jpeglib.h>

#include "../../pipelines/native/huffman.h"

namespace baseline {

struct HuffmanTables {  // indexed by the number of the table; nullptr if the table is not used
  const huffman::Spec *dc[2] = {}, *ac[2] = {};
};

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
  void huffman_table(const huffman::Spec *spec, int id) {
    if (spec == nullptr) return;
    uint32_t num_symbols = 0;
    for (int length = 1; length <= 16; ++length) num_symbols += spec->bits[length];
    word(0xFFC4);
    word(19 + num_symbols);
    byte(id);
    bytes(spec->bits + 1, 16);
    bytes(spec->symbols, num_symbols);
  }
};

constexpr size_t MAX_HEADER_BYTES = 2048;

// Writes the segments JFIF, quantization tables, frame, Huffman tables, restart interval and scan. `dc` and `ac` are
// the numbers of each component's tables. Returns the end of the bytes that were written, or nullptr if a baseline JPEG
// cannot have the parameters in `out`.
inline uint8_t *write_header(uint8_t *to, const jpeg_compress_struct &out, const HuffmanTables &tables, const int *dc,
                             const int *ac, uint32_t restart_interval) {
  static const uint8_t JFIF[] = {0xFF, 0xD8, 0xFF, 0xE0, 0, 16, 'J', 'F', 'I', 'F', 0, 1, 1, 0, 0, 1, 0, 1, 0, 0};
  Header header{to};
  header.bytes(JFIF, sizeof JFIF);
  bool written[NUM_QUANT_TBLS] = {};
  for (int i = 0; i < out.num_components; ++i) {
    const int id = out.comp_info[i].quant_tbl_no;
    if (id < 0 || id >= NUM_QUANT_TBLS || out.quant_tbl_ptrs[id] == nullptr) return nullptr;
    if (written[id]) continue;
    written[id] = true;
    header.word(0xFFDB);
    header.word(67);
    header.byte(id);
    for (size_t k = 0; k < huffman::BLOCK; ++k) {
      const uint16_t quantizer = out.quant_tbl_ptrs[id]->quantval[huffman::NATURAL[k]];
      if (quantizer > 255) return nullptr;
      header.byte(quantizer);
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
    header.huffman_table(tables.dc[id], id);
    header.huffman_table(tables.ac[id], id | 0x10);
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
    header.byte(dc[i] << 4 | ac[i]);
  }
  header.word(63);  // the scan has the coefficients 0 to 63
  header.byte(0);
  return header.next;
}

}  // namespace baseline
