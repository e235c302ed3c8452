// Decodes a region of any JPEG that libjpeg-turbo reads.

#pragma once

#include <csetjmp>
#include <cstdio>  // jpeglib.h needs FILE
#include <cstdlib>

#include <jpeglib.h>

#include "task.h"

namespace crop {

struct LibjpegScratch {  // one per thread
  uint8_t *rows = nullptr;
  size_t capacity = 0;
  ~LibjpegScratch() { std::free(rows); }
};

// The pixels of a task's box, which stay in `scratch` until its next use.
inline Status decode_region(const Task &task, uint32_t, uint32_t, LibjpegScratch &scratch, Pixels &pixels,
                            Message &message) {
  struct Errors {
    jpeg_error_mgr base;
    std::jmp_buf jump;
    Message *message;
  } errors;
  jpeg_decompress_struct in;
  in.err = jpeg_std_error(&errors.base);
  errors.message = &message;
  errors.base.error_exit = [](j_common_ptr info) {
    Errors *errors = reinterpret_cast<Errors *>(info->err);
    char text[JMSG_LENGTH_MAX];
    errors->base.format_message(info, text);
    std::snprintf(errors->message->text, sizeof errors->message->text, "%s", text);
    std::longjmp(errors->jump, 1);
  };
  errors.base.emit_message = [](j_common_ptr info, int level) {
    if (level < 0) info->err->error_exit(info);
  };
  jpeg_create_decompress(&in);
  if (setjmp(errors.jump)) {
    jpeg_destroy_decompress(&in);
    return DAMAGED;
  }
  jpeg_mem_src(&in, task.data, static_cast<unsigned long>(task.size));
  jpeg_read_header(&in, TRUE);
  if (in.image_height != task.image_height || in.image_width != task.image_width) {
    std::snprintf(message.text, sizeof message.text, "%u x %u pixels, but the shard says %u x %u", in.image_height,
                  in.image_width, task.image_height, task.image_width);
    jpeg_destroy_decompress(&in);
    return DAMAGED;
  }
  in.out_color_space = JCS_RGB;
  jpeg_start_decompress(&in);
  const size_t stride = size_t{3} * in.output_width, wanted = stride * in.output_height;
  if (wanted > scratch.capacity) {
    std::free(scratch.rows);
    scratch.rows = static_cast<uint8_t *>(std::malloc(wanted));
    scratch.capacity = wanted;
  }
  while (in.output_scanline < in.output_height) {
    uint8_t *row = scratch.rows + stride * in.output_scanline;
    jpeg_read_scanlines(&in, &row, 1);
  }
  jpeg_finish_decompress(&in);
  jpeg_destroy_decompress(&in);
  pixels = Pixels{scratch.rows + task.top * stride + 3 * size_t{task.left}, stride, task.height, task.width, 0, 0,
                  static_cast<double>(task.height), static_cast<double>(task.width)};
  return OK;
}

}  // namespace crop
