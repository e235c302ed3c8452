// The scan of a baseline JPEG on its way out: bits, stuffed zeros, restart markers.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>  // jpeglib.h needs FILE

#include <jpeglib.h>

#include "baseline_header.h"
#include "huffman_writer.h"

namespace baseline {

constexpr size_t MAX_MCU_BYTES = 10 * huffman::MAX_BLOCK_BYTES;  // no MCU has more blocks
constexpr size_t MAX_COPY = MAX_MCU_BYTES;                       // bytes between two calls of make_room

struct NotStuffed {  // kept by each thread
  uint8_t bytes[(1 << 15) + 2 * MAX_MCU_BYTES];
};

// Buffers have `data` and `grow`.
template <typename Buffer>
struct ScanOutput {
  Buffer &output;
  NotStuffed &memory;
  size_t size = 0;  // of what is in `output`
  huffman::Writer writer;
  uint32_t interval = 0;

  ScanOutput(Buffer &to, NotStuffed &not_stuffed) : output(to), memory(not_stuffed) {}

  // The header, and how many MCUs are between restart markers.
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

  // Whether an interval ends before the next MCU; call `restart` then.
  ALWAYS_INLINE bool interval_ends() { return interval != 0 && left_-- == 0; }

  bool restart() {
    left_ = interval - 1;
    const int marker = 0xD0 + marker_;
    marker_ = (marker_ + 1) & 7;
    return close(marker);
  }

  // Ends an interval: writes all bits, and the marker.
  bool close(int marker) {
    writer.end_of_interval();
    if (!store()) return false;
    output.data[size++] = 0xFF;
    output.data[size++] = static_cast<uint8_t>(marker);
    return true;
  }

  // Before each MCU: makes room for it.
  ALWAYS_INLINE bool make_room() {
    return memory.bytes + sizeof memory.bytes - writer.next >= static_cast<ptrdiff_t>(2 * MAX_MCU_BYTES) || store();
  }

  bool store() {  // all whole bytes
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
