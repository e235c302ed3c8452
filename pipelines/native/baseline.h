// Decodes a box of a baseline JPEG. Only the MCU rows and columns that the box touches are decoded; the pixels are
// those of libjpeg-turbo.
//
// The decoder handles the JPEGs that preprocess/ writes, and most others: 8 bits, one interleaved scan, grey or YCbCr
// with chroma at full or half size in either direction. If the file has restart markers, decoding starts at the last
// marker before the box. `decode_baseline` returns false for all other files, and for files with an irregularity in the
// part that is read; libjpeg-turbo then decodes the file or reports what is wrong with it.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "baseline_frame.h"
#include "baseline_scan.h"
#include "colour.h"
#include "memory.h"
#include "simd.h"
#include "task.h"

namespace crop {

struct BaselineScratch {  // one for each thread
  simd::Level level = simd::level();
  Tables tables;
  Memory unstuffed, coefficients, flags, planes, upsampled, pixels;
};

// ---- samples to pixels

struct Box {
  uint32_t top, left, height, width;
};

// Returns a pointer to the sample at row `y` (clamped to the image) and column `x`. If the row touches a side of the
// image, its outermost sample is repeated one place beyond that side, because upsampling reads one neighbour.
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

// Upsamples `n` samples of a chroma row, from column `x` on, to the resolution of luma. If chroma is halved
// horizontally, each sample becomes two.
ALWAYS_INLINE void upsample(const Component &chroma, bool halved_x, bool halved_y, uint32_t y, uint32_t x, size_t n,
                            uint16_t *sums, uint8_t *output) {
  const bool upper = y % 2 == 0;
  const int64_t near = halved_y ? y / 2 : y, far = upper ? near - 1 : near + 1;
  const uint8_t *row = row_at(chroma, near, x) - 1;
  // libjpeg does not interpolate rows of one or two chroma samples; it repeats the samples.
  const bool fancy = chroma.width > 2;
  if (halved_x && halved_y) {
    if (!fancy) return colour::repeat_samples(row, output, n);
    colour::mix_rows(row, row_at(chroma, far, x) - 1, sums, n);
    return colour::widen_sums(sums, output, n);
  }
  if (halved_x) return fancy ? colour::widen_samples(row, output, n) : colour::repeat_samples(row, output, n);
  colour::mix_samples(row, row_at(chroma, far, x) - 1, upper, output, n);
}

template <simd::Level LEVEL>
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
    if (LEVEL != simd::Level::PLAIN) {
      colour::to_rgb_vectors<LEVEL>(row, cb + skipped, cr + skipped, rgb, box.width);
    } else {
      colour::to_rgb(row, cb + skipped, cr + skipped, rgb, box.width);
    }
  }
}

// ---- the box

constexpr size_t MARGIN = 64;  // number of bytes that may be read or written beside a row

// Sets the range of blocks that the box needs. Interpolation of halved chroma needs one more sample on each side.
inline void choose_blocks(const Frame &frame, const Box &box, Component &component, bool is_chroma) {
  const Component &luma = frame.components[0];
  const auto choose = [&](uint32_t start, uint32_t length, bool halved, uint32_t size, uint32_t &first,
                          uint32_t &end_block) {
    uint32_t low = start, high = start + length - 1;  // the first and the last sample
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

template <simd::Level LEVEL>
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
    scratch.tables.ac[component.ac].build_steps();
  }
  if (!decode_blocks<LEVEL>(frame, scratch.tables, scratch.unstuffed, first_mcu, end_mcu, first_row, end_row))
    return false;
  uint8_t *rows = scratch.upsampled.data;
  convert<LEVEL>(frame, box, reinterpret_cast<uint16_t *>(rows), rows + 2 * row_bytes, rows + 3 * row_bytes,
                 scratch.pixels.data, stride);
  pixels = Pixels{scratch.pixels.data, stride, box.height, box.width, 0, 0, static_cast<double>(box.height),
                  static_cast<double>(box.width)};
  return true;
}

#if SIMD_X86
__attribute__((AVX512_TARGET, noinline)) inline bool decode_box_wide(Frame &frame, BaselineScratch &scratch,
                                                                    const Box &box, Pixels &pixels) {
  return decode_box<simd::Level::WIDE>(frame, scratch, box, pixels);
}
#endif
__attribute__((VECTOR_TARGET)) inline bool decode_box_vectors(Frame &frame, BaselineScratch &scratch, const Box &box,
                                                              Pixels &pixels) {
  return decode_box<simd::Level::VECTORS>(frame, scratch, box, pixels);
}
__attribute__((noinline)) inline bool decode_box_plain(Frame &frame, BaselineScratch &scratch, const Box &box,
                                                       Pixels &pixels) {
  return decode_box<simd::Level::PLAIN>(frame, scratch, box, pixels);
}

// Decodes the box of a task. `pixels` points into `scratch` and is valid until the next use of `scratch`. Returns false
// if the file must be decoded by libjpeg-turbo.
inline bool decode_baseline(const Task &task, BaselineScratch &scratch, Pixels &pixels) {
  Frame frame;
  if (!read_header(task.data, task.size, frame, scratch.tables)) return false;
  if (frame.height != task.image_height || frame.width != task.image_width) return false;
  const Box box{task.top, task.left, task.height, task.width};
#if SIMD_X86
  if (scratch.level == simd::Level::WIDE) return decode_box_wide(frame, scratch, box, pixels);
#endif
  return scratch.level == simd::Level::PLAIN ? decode_box_plain(frame, scratch, box, pixels)
                                             : decode_box_vectors(frame, scratch, box, pixels);
}

}  // namespace crop
