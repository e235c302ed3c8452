// Copies a clean baseline scan, with restart markers where they are wanted: the same coefficients as through
// libjpeg-turbo's arrays, at a fraction of the time, in the original's Huffman tables.
//
// Only the first block of each component behind a marker has another DC difference than in the original; all other
// bits are copied as they are, and passed over only to find where blocks begin.
//
// Whatever is not perfectly regular is left to libjpeg, whose verdict counts: `rewrite_baseline` then returns 0, having
// changed nothing but its buffers.

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

// Gives codes to the sizes of DC differences that have none, without changing the others: their common prefix is the
// code of all ones, which every table leaves unused. False where they would be too long.
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
  while (1u << (length - longest) <= num_missing) ++length;  // and the code of all ones stays unused
  if (length > 16) return false;
  spec.bits[length] = static_cast<uint8_t>(num_missing);
  for (uint32_t i = 0; i < num_missing; ++i) spec.symbols[used + i] = static_cast<uint8_t>(missing[i]);
  return true;
}

// One MCU, whose blocks begin at the bits `starts`. FIRST: the first one behind a marker of the source or the target:
// what of the source has not been copied yet begins at bit `from`, and the DC differences are to `written`, the
// target's predictions.
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
  uint32_t num_blocks = 0;  // in an MCU
  for (int i = 0; i < source.num_components; ++i) {
    const baseline::Component &component = source.components[i];
    for (uint32_t block = 0; block < component.across * component.down; ++block, ++num_blocks)
      kinds.add(state.tables.dc[component.dc], state.tables.ac[component.ac]);
  }
  kinds.close();
  size_t from = 0;  // the first bit that is not copied yet
  int written[3] = {};
  const uint32_t *starts = nullptr;  // of the MCU's blocks
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

// `in` has been read up to its first scan, and `out` has its parameters. Returns the number of bytes written into
// `output`, or 0. Buffers have `data` and `grow`.
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
