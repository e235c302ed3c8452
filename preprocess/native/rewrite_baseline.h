// Copies a regular baseline scan and inserts restart markers. The coefficients do not change, and the file keeps its
// Huffman tables.
//
// A restart marker resets the DC predictions, so that the first block of each component after a marker needs another DC
// difference. All other bits are copied unchanged; they are decoded only as far as necessary to find where blocks
// begin. Copying through libjpeg-turbo's coefficient arrays is no faster than decoding and encoding: it takes a page
// fault for every 4 KiB of coefficients, and most of the time goes into Huffman coding. Copying the bits took 0.74 ms
// an image where rewriting the symbols one by one took 1.20, and optimised Huffman tables of the original are kept.
//
// For irregular files `rewrite_baseline` returns 0 and has changed nothing but its buffers. The file is then left to
// libjpeg-turbo, which rewrites it or reports the damage.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>  // jpeglib.h needs FILE
#include <cstring>

#include <jpeglib.h>

#include "../../pipelines/native/huffman.h"
#include "../../pipelines/native/simd.h"
#include "baseline_header.h"
#include "baseline_source.h"
#include "block_starts.h"
#include "huffman_writer.h"
#include "scan_output.h"

namespace rewrite {

struct State {  // kept by each thread
  baseline::SourceTables tables;
  huffman::Spec dc_specs[2];
  huffman::Encoder dc[2];
};

// Adds codes for the sizes of DC differences that have none, because the differences after a restart marker may have
// sizes that do not occur in the original. The existing codes do not change: the new ones begin with the code of all
// ones, which every table leaves unused. Returns false if the new codes would be too long.
inline bool complete(huffman::Spec &spec) {
  uint32_t longest = 0, used = 0, missing[huffman::MAX_DC_BITS + 1], num_missing = 0;
  for (uint32_t length = 1; length <= 16; ++length) {
    used += spec.bits[length];
    if (spec.bits[length] != 0) longest = length;
  }
  for (uint32_t size = 0; size <= huffman::MAX_DC_BITS; ++size)
    if (std::memchr(spec.symbols, static_cast<int>(size), used) == nullptr) missing[num_missing++] = size;
  if (num_missing == 0) return true;
  uint32_t length = longest;
  while (1u << (length - longest) <= num_missing) ++length;  // the code of all ones must stay unused
  if (length > 16) return false;
  spec.bits[length] = static_cast<uint8_t>(num_missing);
  for (uint32_t i = 0; i < num_missing; ++i) spec.symbols[used + i] = static_cast<uint8_t>(missing[i]);
  return true;
}

// Reads the DC coefficients of one MCU, whose blocks begin at the bits `starts`. FIRST means that the MCU is the first
// one after a marker of the source or the target. Then the bits up to the first block of each component are copied, and
// its DC difference is written anew. `from` is the first bit of the source that has not been copied; `written` has the
// predictions of the target.
template <bool FIRST>
ALWAYS_INLINE bool pass_mcu(baseline::Source &source, const State &state, const uint32_t *starts,
                            huffman::Writer &writer, size_t &from, const int *written) {
  for (int i = 0; i < source.num_components; ++i) {
    baseline::Component &component = source.components[i];
    const huffman::DcTable &dc = state.tables.dc[component.dc];
    for (uint32_t block = 0; block < component.across * component.down; ++block, ++starts) {
      huffman::Reader reader = huffman::Reader::at(source.unstuffed, *starts);
      if (FIRST && block == 0) writer.copy(source.unstuffed, from, *starts);
      if (!reader.dc_in_bits(dc, component.prediction)) return false;
      if (component.prediction < huffman::MIN_DC || component.prediction > huffman::MAX_DC) return false;
      if (FIRST && block == 0) {
        writer.put(state.dc[component.dc].with_value(0, component.prediction - written[i]));
        from = reader.taken(source.unstuffed);
      }
    }
  }
  return true;
}

template <typename Buffer>
ALWAYS_INLINE bool copy_scan(baseline::Source &source, State &state, Buffer &memory,
                             baseline::ScanOutput<Buffer> &scan) {
  block_starts::Kinds kinds;
  uint32_t num_blocks = 0;  // the number of blocks in an MCU
  for (int i = 0; i < source.num_components; ++i) {
    const baseline::Component &component = source.components[i];
    for (uint32_t block = 0; block < component.across * component.down; ++block, ++num_blocks)
      kinds.add(state.tables.dc[component.dc], state.tables.ac[component.ac]);
  }
  kinds.close();
  size_t from = 0;  // the first bit that has not been copied
  int written[3] = {};
  const uint32_t *starts = nullptr;  // where the blocks of the next MCU begin
  uint64_t mcus_left = uint64_t{source.mcus} * source.rows;
  const auto open_interval = [&] {
    const uint32_t mcus = source.mcus_in_interval(mcus_left);
    mcus_left -= mcus;
    const size_t blocks = size_t{num_blocks} * mcus;
    starts = block_starts::find(source.unstuffed, source.reader.end, blocks, kinds, memory);
    if (starts == nullptr) return false;
    source.reader = huffman::Reader::at(source.unstuffed, starts[blocks], source.reader.end);
    return true;
  };
  const auto copy = [&](size_t end) {
    while (end - from > 8 * baseline::MAX_COPY) {
      if (!scan.make_room()) return false;
      scan.writer.copy(source.unstuffed, from, from + 8 * baseline::MAX_COPY);
      from += 8 * baseline::MAX_COPY;
    }
    if (!scan.make_room()) return false;
    scan.writer.copy(source.unstuffed, from, end);
    from = end;
    return scan.make_room();
  };
  if (!open_interval()) return false;
  bool first = true;
  for (uint32_t row = 0; row < source.rows; ++row)
    for (uint32_t mcu = 0; mcu < source.mcus; ++mcu, starts += num_blocks) {
      const bool source_ends = source.interval_ends(), target_ends = scan.interval_ends();
      if (source_ends || target_ends) {
        if (!copy(*starts)) return false;
        for (int i = 0; i < source.num_components; ++i)
          written[i] = target_ends ? 0 : source.components[i].prediction;
        if (source_ends) {
          if (!source.next_interval() || !open_interval()) return false;
          from = 0;
        }
        if (target_ends && !scan.restart()) return false;
        first = true;
      }
      if (first) {
        huffman::Writer writer = scan.writer;
        if (!pass_mcu<true>(source, state, starts, writer, from, written)) return false;
        scan.writer = writer;
        first = false;
      } else if (!pass_mcu<false>(source, state, starts, scan.writer, from, written)) {
        return false;
      }
    }
  return source.ends() && copy(*starts) && scan.close(0xD9);
}

#if defined(__x86_64__)
template <typename Buffer>
__attribute__((target("avx2,bmi,bmi2,lzcnt"))) bool copy_scan_avx2(baseline::Source &source, State &state,
                                                                   Buffer &memory,
                                                                   baseline::ScanOutput<Buffer> &scan) {
  return copy_scan(source, state, memory, scan);
}
#endif

// Rewrites a JPEG into `output`. `in` must have been read up to its first scan, and `out` must have its parameters.
// Returns the number of bytes written, or 0 if the file must be left to libjpeg-turbo. A Buffer has `data` and `grow`.
template <typename Buffer>
__attribute__((noinline)) size_t rewrite_baseline(const jpeg_decompress_struct &in, const jpeg_compress_struct &out,
                                                  Buffer &output, Buffer &unstuffed, Buffer &starts, State &state,
                                                  baseline::NotStuffed &not_stuffed) {
  baseline::Source source;
  if (!source.open(in, unstuffed, state.tables)) return 0;
  baseline::HuffmanTables tables;
  int dc[3] = {}, ac[3] = {};
  for (int i = 0; i < source.num_components; ++i) {
    dc[i] = source.components[i].dc;
    ac[i] = source.components[i].ac;
    huffman::Spec &spec = state.dc_specs[dc[i]];
    spec = state.tables.dc[dc[i]].spec;
    if (!complete(spec)) return 0;
    state.dc[dc[i]].build(spec);
    tables.dc[dc[i]] = &spec;
    tables.ac[ac[i]] = &state.tables.ac[ac[i]].spec;
    state.tables.dc[dc[i]].build_steps();
    state.tables.ac[ac[i]].build_steps();
  }
  baseline::ScanOutput<Buffer> scan(output, not_stuffed);
  if (!scan.begin(out, tables, dc, ac, source.mcus)) return 0;
#if defined(__x86_64__)
  if (simd::avx2()) return copy_scan_avx2(source, state, starts, scan) ? scan.size : 0;
#endif
  return copy_scan(source, state, starts, scan) ? scan.size : 0;
}

}  // namespace rewrite
