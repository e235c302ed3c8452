// Reads the scan of a regular baseline JPEG, MCU by MCU.
//
// The functions return false for every irregularity: damage, restart markers out of order, extra bytes before a marker,
// several scans. The file is then left to libjpeg-turbo, which decodes it or reports the damage.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>  // jpeglib.h needs FILE
#include <cstring>

#include <jpeglib.h>

#include "../../pipelines/native/huffman.h"
#include "huffman_writer.h"

namespace baseline {

struct SourceTables {  // kept by each thread, because the next image often has the same tables
  huffman::DcTable dc[2];
  huffman::AcTable ac[2];
};

struct Component {
  uint32_t across, down;  // the number of blocks in an MCU, horizontally and vertically
  int dc, ac;             // the numbers of its tables
  int prediction;         // the DC coefficient of the previous block
};

struct Source {
  int num_components = 0;
  Component components[3];
  uint32_t mcus = 0, rows = 0;  // the number of MCUs in a row, and the number of rows
  huffman::Reader reader;
  uint8_t *unstuffed = nullptr;  // the bytes of the current interval

  // Starts to read the scan. `in` must have been read up to its first scan. A Buffer has `data` and `grow`.
  template <typename Buffer>
  bool open(const jpeg_decompress_struct &in, Buffer &memory, SourceTables &tables) {
    if (in.progressive_mode || in.comps_in_scan != in.num_components) return false;
    if (in.num_components != 1 && in.num_components != 3) return false;
    if (in.Ss != 0 || in.Se != DCTSIZE2 - 1 || in.Ah != 0 || in.Al != 0) return false;
    num_components = in.num_components;
    for (int i = 0; i < num_components; ++i) {
      const jpeg_component_info &info = in.comp_info[i];
      if (in.cur_comp_info[i] != &info || info.dc_tbl_no > 1 || info.ac_tbl_no > 1) return false;
      if (i > 0 && (info.h_samp_factor != 1 || info.v_samp_factor != 1)) return false;
      const JHUFF_TBL *dc = in.dc_huff_tbl_ptrs[info.dc_tbl_no], *ac = in.ac_huff_tbl_ptrs[info.ac_tbl_no];
      if (dc == nullptr || !tables.dc[info.dc_tbl_no].build(huffman::spec_of(dc))) return false;
      if (ac == nullptr || !tables.ac[info.ac_tbl_no].build(huffman::spec_of(ac))) return false;
      const bool sampled = i == 0 && num_components == 3;  // a scan of one component is not interleaved
      components[i] = Component{sampled ? static_cast<uint32_t>(info.h_samp_factor) : 1,
                                sampled ? static_cast<uint32_t>(info.v_samp_factor) : 1, info.dc_tbl_no,
                                info.ac_tbl_no, 0};
    }
    const uint32_t across = 8 * components[0].across, down = 8 * components[0].down;
    mcus = (in.image_width + across - 1) / across;
    rows = (in.image_height + down - 1) / down;
    next_ = in.src->next_input_byte;
    end_ = next_ + in.src->bytes_in_buffer;
    interval_ = left_ = in.restart_interval;
    if (!memory.grow(in.src->bytes_in_buffer + huffman::READ_AHEAD)) return false;
    unstuffed = memory.data;
    return open_interval();
  }

  // The number of MCUs in the interval that has just been opened.
  uint32_t mcus_in_interval(uint64_t mcus_left) const {
    return interval_ != 0 && interval_ < mcus_left ? interval_ : static_cast<uint32_t>(mcus_left);
  }

  // Must be called before each MCU. Returns whether an interval ends there; then `next_interval` must be called.
  ALWAYS_INLINE bool interval_ends() { return interval_ != 0 && left_-- == 0; }

  bool next_interval() {
    left_ = interval_ - 1;
    if (!at_marker(0xD0 + marker_)) return false;
    next_ += 2;
    marker_ = (marker_ + 1) & 7;
    return open_interval();
  }

  // Whether the scan ends here, as it must after the last MCU.
  bool ends() const { return at_marker(0xD9); }

 private:
  const uint8_t *next_ = nullptr, *end_ = nullptr;  // `next_` points to the marker behind the interval
  uint32_t interval_ = 0, left_ = 0;
  int marker_ = 0;

  // Whether the codes fill all bytes up to this marker: fewer than 8 bits may be unused.
  bool at_marker(int marker) const { return reader.left() >= 0 && reader.left() < 8 && next_[1] == marker; }

  bool open_interval() {
    uint8_t *end = huffman::unstuff(unstuffed, next_, end_);
    if (end == nullptr) return false;
    std::memset(end, 0, huffman::READ_AHEAD);
    reader = huffman::Reader{unstuffed, end};
    for (Component &component : components) component.prediction = 0;
    return true;
  }
};

}  // namespace baseline
