// Writes the scan of a baseline JPEG: bits, stuffed zeros and restart markers.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>  // jpeglib.h needs FILE

#include <jpeglib.h>

#include "baseline_header.h"
#include "huffman_writer.h"

namespace baseline {

constexpr size_t MAX_MCU_BYTES = 10 * huffman::MAX_BLOCK_BYTES;  // an MCU has at most 10 blocks
constexpr size_t MAX_COPY = MAX_MCU_BYTES;                       // the bytes that may be copied after one make_room

struct NotStuffed {  // kept by each thread
  uint8_t bytes[(1 << 15) + 2 * MAX_MCU_BYTES];
};

// Bits are collected in a small buffer, without stuffed zeros. When it is nearly full, `stuff` moves its bytes to the
// output with one search for 0xFF, instead of a test of each byte as it is written. A Buffer has `data` and `grow`.
template <typename Buffer>
struct ScanOutput {
  Buffer &output;
  NotStuffed &memory;
  size_t size = 0;  // the number of bytes in `output`
  huffman::Writer writer;
  uint32_t interval = 0;

  ScanOutput(Buffer &to, NotStuffed &not_stuffed) : output(to), memory(not_stuffed) {}

  // Writes the header and sets the restart interval.
  bool begin(const jpeg_compress_struct &out, const HuffmanTables &tables, const int *dc, const int *ac,
             uint32_t mcus_in_row) {
    const uint64_t wanted = static_cast<uint64_t>(out.restart_in_rows) * mcus_in_row;
    interval = left_ = static_cast<uint32_t>(wanted < 65535 ? wanted : 65535);
    if (!output.grow(MAX_HEADER_BYTES)) return false;
    const uint8_t *end = write_header(output.data, out, tables, dc, ac, interval);
    if (end == nullptr) return false;
    size = static_cast<size_t>(end - output.data);
    writer.next = memory.bytes;
    return true;
  }

  // Must be called before each MCU. Returns whether an interval ends there; then `restart` must be called.
  ALWAYS_INLINE bool interval_ends() { return interval != 0 && left_-- == 0; }

  bool restart() {
    left_ = interval - 1;
    const int marker = 0xD0 + marker_;
    marker_ = (marker_ + 1) & 7;
    return close(marker);
  }

  // Ends an interval: writes all bits and the marker.
  bool close(int marker) {
    writer.end_of_interval();
    if (!store()) return false;
    output.data[size++] = 0xFF;
    output.data[size++] = static_cast<uint8_t>(marker);
    return true;
  }

  // Makes room for one MCU. Must be called before each one.
  ALWAYS_INLINE bool make_room() {
    return memory.bytes + sizeof memory.bytes - writer.next >= static_cast<ptrdiff_t>(2 * MAX_MCU_BYTES) || store();
  }

  bool store() {  // moves all complete bytes to `output`
    const size_t length = static_cast<size_t>(writer.next - memory.bytes);
    if (!output.grow(size + 2 * length + 2)) return false;
    size = static_cast<size_t>(huffman::stuff(output.data + size, memory.bytes, writer.next) - output.data);
    writer.next = memory.bytes;
    return true;
  }

 private:
  uint32_t left_ = 0;
  int marker_ = 0;
};

}  // namespace baseline
