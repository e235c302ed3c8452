// Decodes a region of any JPEG that libjpeg-turbo can read.
//
// Without a reduction, the pixels are those of the whole frame decoded by libjpeg-turbo with its accurate integer DCT
// and fancy upsampling. In a sequential file, data after the region is not read, so damage there is not noticed.

#pragma once

#include <cstdint>
#include <cstdio>  // jpeglib.h needs FILE

#include <jpeglib.h>

#include "libjpeg_errors.h"
#include "memory.h"
#include "task.h"

namespace crop {

struct LibjpegScratch {  // one for each thread
  Memory rows;
};

// Returns 1, 2, 4 or 8: the image is decoded at this fraction of its size (DCT scaling). It is chosen such that the
// reduced box is still at least twice as large as the output. If it is two to three times as large, the output differs
// from that of the unreduced box by 0.5 (1/2), 0.7 (1/4) and 0.9 (1/8) of 255 levels on average (500 ImageNet images);
// at 1.5 to 2 times by 1.0, and at 1 to 1.25 times by 1.8.
inline uint32_t reduction_of(const Task &task, uint32_t out_height, uint32_t out_width) {
  uint32_t reduction = DCTSIZE;
  while (reduction > 1 && (task.height / (2 * reduction) < out_height || task.width / (2 * reduction) < out_width))
    reduction /= 2;
  return reduction;
}

// Whether libjpeg will smooth the block borders, as it does for a progressive image whose last scans are missing. Then
// the pixels of a block depend on its neighbours.
inline bool is_smoothed(const jpeg_decompress_struct &in) {
  if (!in.progressive_mode) return false;
  for (int i = 0; i < in.num_components; ++i)
    for (int k = 0; k < DCTSIZE2; ++k)
      if (in.coef_bits[i][k] != 0) return true;
  return false;
}

// Before libjpeg-turbo 3.0, jpeg_crop_scanline computes a wrong width for a component that the inverse DCT reduces less
// than the others if its size still differs from theirs afterwards, which happens with sampling factors like 4x2.
inline bool columns_can_be_cropped(const jpeg_decompress_struct &in, uint32_t reduction) {
  if (reduction == 1) return true;
  for (int i = 0; i < in.num_components; ++i) {
    const jpeg_component_info &component = in.comp_info[i];
    if (in.max_h_samp_factor > 2 * component.h_samp_factor) return false;
    if (in.max_v_samp_factor > 2 * component.v_samp_factor) return false;
  }
  return true;
}

inline uint32_t divided_up(uint32_t value, uint32_t divisor) { return value / divisor + (value % divisor != 0); }

// Decodes the box of a task at 1/reduction of its size; `reduction` is 1, 2, 4 or 8. `pixels` points into `scratch` and
// is valid until the next use of `scratch`.
inline Status decode_region(const Task &task, uint32_t reduction, LibjpegScratch &scratch, Pixels &pixels,
                            Message &message) {
  static_assert(sizeof message.text >= JMSG_LENGTH_MAX);
  libjpeg::Errors errors;
  // A new decompressor is made for each image, which takes 0.3 us. One that was used before would apply its tables to a
  // file that has none.
  jpeg_decompress_struct in{};
  in.err = libjpeg::prepare(errors, message.text);
  const Status status = libjpeg::run(errors, [&] {
    libjpeg::read_header(in, errors, task.data, task.size);
    if (in.image_height != task.image_height || in.image_width != task.image_width) {
      std::snprintf(message.text, sizeof message.text, "%u x %u pixels, but the shard says %u x %u", in.image_height,
                    in.image_width, task.image_height, task.image_width);
      libjpeg::fail(errors, DAMAGED);
    }
    in.out_color_space = JCS_RGB;
    in.scale_num = 1;
    in.scale_denom = reduction;
    jpeg_start_decompress(&in);
    libjpeg::check_scans(in, errors);

    const uint32_t top = task.top / reduction, bottom = divided_up(task.top + task.height, reduction);
    const uint32_t left = task.left / reduction, right = divided_up(task.left + task.width, reduction);
    JDIMENSION first_row = 0, first_column = 0;
    if (!is_smoothed(in)) {
      const uint32_t block = DCTSIZE / reduction;
      const uint32_t mcu_height = block * static_cast<uint32_t>(in.max_v_samp_factor);
      const uint32_t mcu_width = block * static_cast<uint32_t>(in.max_h_samp_factor);
      if (columns_can_be_cropped(in, reduction)) {
        // Fancy upsampling has no neighbour at the first and the last decoded column, so their pixels differ from those
        // of the whole frame. At least one column more is decoded on each side.
        const uint32_t context = left > 0;
        const uint64_t end = (static_cast<uint64_t>(right) / mcu_width + 1) * mcu_width;
        first_column = (left - context) / mcu_width * mcu_width;
        const auto last = static_cast<JDIMENSION>(end < in.output_width ? end : in.output_width);
        // jpeg_crop_scanline switches to plain upsampling if only one column of a component is left. Then the crop
        // begins one MCU earlier.
        if (first_column > 0 && last - first_column < 2 * static_cast<uint32_t>(in.max_h_samp_factor))
          first_column -= mcu_width;
        JDIMENSION width = last - first_column;
        jpeg_crop_scanline(&in, &first_column, &width);
      }
      // Before libjpeg-turbo 3.1, skipping to a row that is not the first of an MCU row gives wrong pixels.
      first_row = top / mcu_height * mcu_height;
      jpeg_skip_scanlines(&in, first_row);
    }
    const size_t stride = size_t{3} * in.output_width;
    if (!scratch.rows.reserve(stride * (bottom - first_row))) libjpeg::fail_with(errors, NO_MEMORY, "out of memory");
    while (in.output_scanline < bottom) {
      uint8_t *rows[8];
      uint32_t count = 0;
      for (uint32_t row = in.output_scanline; row < bottom && count < 8; ++row, ++count)
        rows[count] = scratch.rows.data + stride * (row - first_row);
      jpeg_read_scanlines(&in, rows, count);
    }
    pixels.rgb = scratch.rows.data + (top - first_row) * stride + 3 * size_t{left - first_column};
    pixels.stride = stride;
    pixels.height = bottom - top;
    pixels.width = right - left;
    pixels.top = static_cast<double>(task.top) / reduction - top;
    pixels.left = static_cast<double>(task.left) / reduction - left;
    pixels.box_height = static_cast<double>(task.height) / reduction;
    pixels.box_width = static_cast<double>(task.width) / reduction;
  });
  jpeg_destroy_decompress(&in);
  return status;
}

}  // namespace crop
