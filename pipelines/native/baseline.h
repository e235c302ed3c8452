// Decodes a box of a baseline JPEG: only the MCU rows and columns that it touches, to libjpeg's pixels.
//
// For the JPEGs that preprocess/ writes, and most others: 8 bits, one interleaved scan, grey or YCbCr with chroma
// halved or not in either direction. Where restart markers stand at known MCUs it jumps to them. Everything else, and
// whatever is not perfectly regular where it is read, is left to libjpeg (`decode_baseline` returns false).

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "colour.h"
#include "huffman.h"
#include "idct.h"
#include "memory.h"
#include "simd.h"
#include "task.h"

namespace crop {

struct Component {
  uint32_t across, down;    // blocks in an MCU
  uint32_t height, width;   // samples in the image
  uint8_t quantizers, dc, ac;  // numbers of its tables
  int prediction;
  // The blocks that are wanted, in the image's grid of them; and where their samples go.
  uint32_t first_column, end_column, first_row, end_row;
  uint8_t *samples;  // of the first wanted block; rows `stride` apart
  size_t stride;
  int16_t *coefficients;  // of one MCU row's wanted blocks: (down, end_column - first_column, 64)
  uint8_t *only_dc;       // of each of those blocks: whether it has no AC coefficients

  uint32_t columns() const { return end_column - first_column; }
};

struct Frame {
  uint32_t height = 0, width = 0, num_components = 0;
  Component components[3];
  uint32_t mcus = 0, mcu_rows = 0, restart_interval = 0;
  const uint8_t *scan = nullptr, *end = nullptr;
};

struct BaselineScratch {  // one per thread
  bool avx2 = simd::avx2();
  uint16_t quantizers[4][huffman::BLOCK];  // natural order
  huffman::Spec dc_specs[2], ac_specs[2];
  huffman::DcTable dc[2];
  huffman::AcTable ac[2];
  Memory unstuffed, coefficients, flags, planes, upsampled, pixels;
};

// ---- the header

struct Segment {
  const uint8_t *next, *end;

  size_t left() const { return static_cast<size_t>(end - next); }
  uint32_t byte() { return *next++; }
  uint32_t word() {
    next += 2;
    return static_cast<uint32_t>(next[-2]) << 8 | next[-1];
  }
};

inline bool read_quantizers(Segment segment, BaselineScratch &scratch, uint32_t &defined) {
  while (segment.left() >= 65) {
    const uint32_t id = segment.byte();
    if (id > 3) return false;  // also 16-bit ones
    for (size_t k = 0; k < huffman::BLOCK; ++k)
      scratch.quantizers[id][huffman::NATURAL[k]] = static_cast<uint16_t>(segment.byte());
    defined |= 1u << id;
  }
  return segment.left() == 0;
}

inline bool read_huffman_tables(Segment segment, BaselineScratch &scratch, uint32_t &defined) {
  while (segment.left() >= 17) {
    const uint32_t id = segment.byte();
    if ((id & ~0x11u) != 0) return false;
    huffman::Spec &spec = (id & 0x10 ? scratch.ac_specs : scratch.dc_specs)[id & 1];
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
  for (uint32_t i = 0; i < frame.num_components; ++i) {
    Component &component = frame.components[i];
    ids[i] = segment.byte();
    const uint32_t sampling = segment.byte(), table = segment.byte();
    if (table > 3) return false;
    component.quantizers = static_cast<uint8_t>(table);
    component.across = sampling >> 4;
    component.down = sampling & 15;
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
    const uint32_t tables = segment.byte();
    if ((tables & ~0x11u) != 0) return false;
    frame.components[i].dc = static_cast<uint8_t>(tables >> 4);
    frame.components[i].ac = static_cast<uint8_t>(tables & 15);
  }
  return segment.byte() == 0 && segment.byte() == 63 && segment.byte() == 0;
}

// Up to the scan's first byte.
inline bool read_header(const uint8_t *data, size_t size, Frame &frame, BaselineScratch &scratch) {
  Segment file{data, data + size};
  if (file.left() < 4 || file.word() != 0xFFD8) return false;
  uint32_t quantizers = 0, tables = 0, ids[3] = {};
  bool jfif = false;
  for (;;) {
    if (file.left() < 4) return false;
    const uint32_t marker = file.word(), length = file.word();
    if (length < 2 || length - 2 > file.left()) return false;
    const Segment segment{file.next, file.next + (length - 2)};
    file.next = segment.end;
    if (marker == 0xFFDB) {
      if (!read_quantizers(segment, scratch, quantizers)) return false;
    } else if (marker == 0xFFC4) {
      if (!read_huffman_tables(segment, scratch, tables)) return false;
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
      return false;  // Adobe's colours, or what has no place in a baseline file
    }
  }
  if (frame.num_components == 3 && !jfif && (ids[0] != 1 || ids[1] != 2 || ids[2] != 3)) return false;
  for (uint32_t i = 0; i < frame.num_components; ++i) {
    const Component &component = frame.components[i];
    if ((quantizers >> component.quantizers & 1) == 0) return false;
    if ((tables >> component.dc & 1) == 0 || (tables >> (2 + component.ac) & 1) == 0) return false;
    if (!scratch.dc[component.dc].build(scratch.dc_specs[component.dc])) return false;
    if (!scratch.ac[component.ac].build(scratch.ac_specs[component.ac])) return false;
  }
  frame.scan = file.next;
  frame.end = file.end;
  return true;
}

// ---- the scan

// The entropy-coded segments between restart markers, one at a time.
struct Scan {
  const Frame &frame;
  Memory &memory;
  const uint8_t *next;    // the first byte of the next interval
  uint32_t interval = 0;  // number of the next interval
  huffman::Reader reader;

  Scan(const Frame &of, Memory &unstuffed) : frame(of), memory(unstuffed), next(of.scan) {}

  bool marker_of(uint32_t number) const { return next[1] == 0xD0 + (number & 7); }

  // Passes over whole intervals up to this one.
  bool jump(uint32_t to) {
    while (interval < to) {
      next = static_cast<const uint8_t *>(std::memchr(next, 0xFF, static_cast<size_t>(frame.end - next)));
      if (next == nullptr || frame.end - next < 2) return false;
      if (next[1] != 0 && !marker_of(interval++)) return false;
      next += 2;
    }
    return true;
  }

  // Leaves `next` at the marker behind it.
  bool open() {
    uint8_t *end = huffman::unstuff(memory.data, next, frame.end);
    if (end == nullptr) return false;
    std::memset(end, 0, huffman::READ_AHEAD);
    reader = huffman::Reader{memory.data, end};
    return true;
  }

  // Between two markers there must be whole bytes of codes and nothing else.
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

// One MCU without its values, but for the predictions.
ALWAYS_INLINE bool skip_mcu(huffman::Reader &all_read, Frame &frame, BaselineScratch &scratch) {
  huffman::Reader reader = all_read;  // a copy stays in registers
  for (uint32_t i = 0; i < frame.num_components; ++i) {
    Component &component = frame.components[i];
    for (uint32_t block = 0; block < component.across * component.down; ++block)
      if (!reader.dc(scratch.dc[component.dc], component.prediction) || !reader.skip_ac(scratch.ac[component.ac]))
        return false;
  }
  all_read = reader;
  return reader.left() >= 0;
}

// Not memset, which GCC makes a slow string instruction of.
ALWAYS_INLINE void clear(int16_t *block) {
  typedef int16_t Row __attribute__((vector_size(16), may_alias));
  for (int i = 0; i < 8; ++i) reinterpret_cast<Row *>(block)[i] = Row{};
}

// One MCU's wanted blocks.
ALWAYS_INLINE bool read_mcu(huffman::Reader &all_read, Frame &frame, BaselineScratch &scratch, uint32_t row,
                            uint32_t column) {
  huffman::Reader reader = all_read;
  for (uint32_t i = 0; i < frame.num_components; ++i) {
    Component &component = frame.components[i];
    const huffman::DcTable &dc = scratch.dc[component.dc];
    const huffman::AcTable &ac = scratch.ac[component.ac];
    for (uint32_t v = 0; v < component.down; ++v)
      for (uint32_t h = 0; h < component.across; ++h) {
        if (!reader.dc(dc, component.prediction)) return false;
        const uint32_t y = row * component.down + v, x = column * component.across + h;
        if (y < component.first_row || y >= component.end_row || x < component.first_column ||
            x >= component.end_column) {
          if (!reader.skip_ac(ac)) return false;
          continue;
        }
        const size_t at = size_t{v} * component.columns() + (x - component.first_column);
        int16_t *block = component.coefficients + huffman::BLOCK * at;
        clear(block);
        const int last = reader.ac(ac, block);
        if (last < 0) return false;
        block[0] = static_cast<int16_t>(component.prediction);
        component.only_dc[at] = last == 0;
      }
  }
  all_read = reader;
  return reader.left() >= 0;
}

template <bool HAS_AVX2>
ALWAYS_INLINE void transform_row(const Component &component, const uint16_t *quantizers, uint32_t mcu_row) {
  const uint32_t columns = component.columns();
  for (uint32_t v = 0; v < component.down; ++v) {
    const uint32_t y = mcu_row * component.down + v;
    if (y < component.first_row || y >= component.end_row) continue;
    uint8_t *to = component.samples + 8 * component.stride * (y - component.first_row);
    const int16_t *blocks = component.coefficients + huffman::BLOCK * size_t{v} * columns;
    const uint8_t *only_dc = component.only_dc + size_t{v} * columns;
    uint32_t waiting = columns;  // a block whose partner has not come
    for (uint32_t x = 0; x < columns; ++x) {
      const int16_t *block = blocks + huffman::BLOCK * size_t{x};
      if (only_dc[x]) {
        idct::fill(to + 8 * x, component.stride, idct::only_dc(block[0], quantizers[0]));
        continue;
      }
#if defined(__x86_64__)
      if (HAS_AVX2) {
        if (waiting == columns) {
          waiting = x;
        } else {
          idct::two_blocks_avx2(blocks + huffman::BLOCK * size_t{waiting}, block, quantizers, to + 8 * waiting,
                                to + 8 * x, component.stride);
          waiting = columns;
        }
        continue;
      }
#endif
      idct::block_plain(block, quantizers, to + 8 * x, component.stride);
    }
#if defined(__x86_64__)
    if (HAS_AVX2 && waiting != columns)
      idct::two_blocks_avx2(blocks + huffman::BLOCK * size_t{waiting}, blocks + huffman::BLOCK * size_t{waiting},
                            quantizers, to + 8 * waiting, to + 8 * waiting, component.stride);
#endif
  }
}

// All wanted blocks to samples.
template <bool HAS_AVX2>
ALWAYS_INLINE bool decode_blocks(Frame &frame, BaselineScratch &scratch, uint32_t first_mcu, uint32_t end_mcu,
                                 uint32_t first_row, uint32_t end_row) {
  Scan scan(frame, scratch.unstuffed);
  const uint32_t interval = frame.restart_interval;
  uint64_t at = 0;  // the MCU that the reader is at
  bool opened = false;
  // Before each MCU: another interval begins where one does.
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
      if (opened) {  // `next` is at the marker behind the interval that was left
        if (!scan.marker_of(scan.interval)) return false;
        scan.next += 2;
        ++scan.interval;
      }
      if (!scan.jump(target)) return false;
      at = uint64_t{target} * interval;
      opened = false;
    }
    for (; at < wanted; ++at)
      if (!enter() || !skip_mcu(scan.reader, frame, scratch)) return false;
    for (uint32_t mcu = first_mcu; mcu < end_mcu; ++mcu, ++at)
      if (!enter() || !read_mcu(scan.reader, frame, scratch, row, mcu)) return false;
    for (uint32_t i = 0; i < frame.num_components; ++i) {
      const Component &component = frame.components[i];
      transform_row<HAS_AVX2>(component, scratch.quantizers[component.quantizers], row);
    }
  }
  return true;
}

// ---- samples to pixels

struct Box {
  uint32_t top, left, height, width;
};

// A row of samples at `y` (clamped to the image), whose neighbours beyond the image's sides repeat the outer samples.
// Returns the sample at column `x`.
inline uint8_t *row_at(const Component &component, int64_t y, uint32_t x) {
  const int64_t last = component.height - 1;
  const uint32_t inside = static_cast<uint32_t>(y < 0 ? 0 : y > last ? last : y);
  uint8_t *row = component.samples + component.stride * (inside - 8 * component.first_row);
  if (component.first_column == 0) row[-1] = row[0];
  if (8 * component.end_column >= component.width) {
    uint8_t *end = row + component.width - 8 * component.first_column;
    end[0] = end[-1];
  }
  return row + x - 8 * component.first_column;
}

// Chroma at the resolution of luma: `n` samples of it, two for each column from `x` on where it is halved.
ALWAYS_INLINE void upsample(const Component &chroma, bool halved_x, bool halved_y, uint32_t y, uint32_t x, size_t n,
                            uint16_t *sums, uint8_t *output) {
  const bool upper = y % 2 == 0;
  const int64_t near = halved_y ? y / 2 : y, far = upper ? near - 1 : near + 1;
  const uint8_t *row = row_at(chroma, near, x) - 1;
  // libjpeg repeats the samples of images of one or two.
  const bool fancy = chroma.width > 2;
  if (halved_x && halved_y) {
    if (!fancy) return colour::repeat_samples(row, output, n);
    colour::mix_rows(row, row_at(chroma, far, x) - 1, sums, n);
    return colour::widen_sums(sums, output, n);
  }
  if (halved_x) return fancy ? colour::widen_samples(row, output, n) : colour::repeat_samples(row, output, n);
  colour::mix_samples(row, row_at(chroma, far, x) - 1, upper, output, n);
}

template <bool HAS_AVX2>
ALWAYS_INLINE void convert(const Frame &frame, const Box &box, uint16_t *sums, uint8_t *cb_row, uint8_t *cr_row,
                           uint8_t *rgb, size_t stride) {
  const Component &luma = frame.components[0];
  const bool halved_x = luma.across == 2, halved_y = luma.down == 2;
  const uint32_t x = halved_x ? box.left / 2 : box.left, end = box.left + box.width;
  const size_t n = (halved_x ? (end + 1) / 2 : end) - x, skipped = box.left - (halved_x ? 2 * x : x);
  for (uint32_t y = box.top; y < box.top + box.height; ++y, rgb += stride) {
    const uint8_t *row = row_at(luma, y, box.left);
    if (frame.num_components == 1) {
      colour::grey_to_rgb(row, rgb, box.width);
      continue;
    }
    const uint8_t *cb = cb_row, *cr = cr_row;
    if (halved_x || halved_y) {
      upsample(frame.components[1], halved_x, halved_y, y, x, n, sums, cb_row);
      upsample(frame.components[2], halved_x, halved_y, y, x, n, sums, cr_row);
    } else {
      cb = row_at(frame.components[1], y, x);
      cr = row_at(frame.components[2], y, x);
    }
#if defined(__x86_64__)
    if (HAS_AVX2) {
      colour::to_rgb_avx2(row, cb + skipped, cr + skipped, rgb, box.width);
      continue;
    }
#endif
    colour::to_rgb(row, cb + skipped, cr + skipped, rgb, box.width);
  }
}

// ---- the whole

constexpr size_t MARGIN = 64;  // bytes that may be read or written beside a row

// Which blocks the box needs, with one more sample of chroma on each side where it is halved.
inline void choose_blocks(const Frame &frame, const Box &box, Component &component, bool is_chroma) {
  const Component &luma = frame.components[0];
  const auto choose = [&](uint32_t start, uint32_t length, bool halved, uint32_t size, uint32_t &first,
                          uint32_t &end_block) {
    uint32_t low = start, high = start + length - 1;  // the outer samples
    if (is_chroma && halved) {
      low = start == 0 ? 0 : (start - 1) / 2;
      high = (start + length) / 2;
    }
    if (high > size - 1) high = size - 1;
    first = low / 8;
    end_block = high / 8 + 1;
  };
  choose(box.top, box.height, luma.down == 2, component.height, component.first_row, component.end_row);
  choose(box.left, box.width, luma.across == 2, component.width, component.first_column, component.end_column);
}

template <bool HAS_AVX2>
ALWAYS_INLINE bool decode_box(Frame &frame, BaselineScratch &scratch, const Box &box, Pixels &pixels) {
  uint32_t first_mcu = UINT32_MAX, end_mcu = 0, first_row = UINT32_MAX, end_row = 0;
  size_t num_samples = MARGIN, num_blocks = 0;
  for (uint32_t i = 0; i < frame.num_components; ++i) {
    Component &component = frame.components[i];
    choose_blocks(frame, box, component, i > 0);
    const uint32_t first = component.first_column / component.across, top = component.first_row / component.down;
    const uint32_t end = (component.end_column - 1) / component.across + 1;
    const uint32_t bottom = (component.end_row - 1) / component.down + 1;
    first_mcu = first < first_mcu ? first : first_mcu;
    first_row = top < first_row ? top : first_row;
    end_mcu = end > end_mcu ? end : end_mcu;
    end_row = bottom > end_row ? bottom : end_row;
    component.stride = 8 * size_t{component.columns()} + MARGIN;
    num_samples += component.stride * 8 * (component.end_row - component.first_row);
    num_blocks += size_t{component.down} * component.columns();
  }
  const size_t row_bytes = size_t{box.width} + 2 * MARGIN;
  const size_t stride = 3 * size_t{box.width};
  if (!scratch.planes.reserve(num_samples) || !scratch.flags.reserve(num_blocks) ||
      !scratch.coefficients.reserve(num_blocks * huffman::BLOCK * sizeof(int16_t)) ||
      !scratch.unstuffed.reserve(static_cast<size_t>(frame.end - frame.scan) + huffman::READ_AHEAD) ||
      !scratch.upsampled.reserve(4 * row_bytes) || !scratch.pixels.reserve(stride * box.height + 4 * MARGIN))
    return false;
  uint8_t *samples = scratch.planes.data + MARGIN / 2, *flags = scratch.flags.data;
  int16_t *coefficients = reinterpret_cast<int16_t *>(scratch.coefficients.data);
  for (uint32_t i = 0; i < frame.num_components; ++i) {
    Component &component = frame.components[i];
    component.samples = samples;
    component.coefficients = coefficients;
    component.only_dc = flags;
    samples += component.stride * 8 * (component.end_row - component.first_row);
    coefficients += size_t{component.down} * component.columns() * huffman::BLOCK;
    flags += size_t{component.down} * component.columns();
    scratch.ac[component.ac].build_steps();
  }
  if (!decode_blocks<HAS_AVX2>(frame, scratch, first_mcu, end_mcu, first_row, end_row)) return false;
  uint8_t *rows = scratch.upsampled.data;
  convert<HAS_AVX2>(frame, box, reinterpret_cast<uint16_t *>(rows), rows + 2 * row_bytes, rows + 3 * row_bytes,
                    scratch.pixels.data, stride);
  pixels = Pixels{scratch.pixels.data, stride, box.height, box.width, 0, 0, static_cast<double>(box.height),
                  static_cast<double>(box.width)};
  return true;
}

#if defined(__x86_64__)
__attribute__((target("avx2,bmi,bmi2,lzcnt"), noinline)) inline bool decode_box_avx2(Frame &frame,
                                                                                     BaselineScratch &scratch,
                                                                                     const Box &box, Pixels &pixels) {
  return decode_box<true>(frame, scratch, box, pixels);
}
#endif
__attribute__((noinline)) inline bool decode_box_plain(Frame &frame, BaselineScratch &scratch, const Box &box,
                                                       Pixels &pixels) {
  return decode_box<false>(frame, scratch, box, pixels);
}

// The pixels of a task's box, which stay in `scratch` until its next use. False where libjpeg has to look.
inline bool decode_baseline(const Task &task, BaselineScratch &scratch, Pixels &pixels) {
  Frame frame;
  if (!read_header(task.data, task.size, frame, scratch)) return false;
  if (frame.height != task.image_height || frame.width != task.image_width) return false;
  const Box box{task.top, task.left, task.height, task.width};
#if defined(__x86_64__)
  if (scratch.avx2) return decode_box_avx2(frame, scratch, box, pixels);
#endif
  return decode_box_plain(frame, scratch, box, pixels);
}

}  // namespace crop
