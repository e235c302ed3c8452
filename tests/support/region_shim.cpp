// Lets tests/pipelines/test_libjpeg_region.py call decode_region, and write JPEGs of kinds that Pillow does not.

#include "../../pipelines/native/libjpeg_region.h"

#include <cstring>

struct Region {
  uint32_t height, width;
  double top, left, box_height, box_width;
  char message[sizeof(crop::Message::text)];
};

extern "C" {

// box: top, left, height, width. pixels: room for uint8 (box height, box width, 3), packed.
int region_decode(const uint8_t *data, size_t size, uint32_t image_height, uint32_t image_width, const uint32_t *box,
                  uint32_t out_height, uint32_t out_width, uint8_t *pixels, Region *region) {
  static crop::LibjpegScratch scratch;
  const crop::Task task{data, size, image_height, image_width, box[0], box[1], box[2], box[3], false, false};
  crop::Pixels found{};
  crop::Message message{};
  const crop::Status status = crop::decode_region(task, crop::reduction_of(task, out_height, out_width), scratch, found, message);
  std::memcpy(region->message, message.text, sizeof message.text);
  if (status != crop::OK) return status;
  region->height = found.height;
  region->width = found.width;
  region->top = found.top;
  region->left = found.left;
  region->box_height = found.box_height;
  region->box_width = found.box_width;
  for (uint32_t row = 0; row < found.height; ++row)
    std::memcpy(pixels + size_t{3} * found.width * row, found.rgb + found.stride * row, size_t{3} * found.width);
  return status;
}

// factors: horizontal and vertical, of each component. Returns the number of bytes, 0 if libjpeg refuses.
size_t region_write(const uint8_t *pixels, uint32_t height, uint32_t width, const int *factors, J_COLOR_SPACE colours,
                    bool progressive, uint32_t restart_interval, uint8_t *data, size_t capacity) {
  libjpeg::Errors errors;
  char message[JMSG_LENGTH_MAX];
  jpeg_compress_struct out{};
  out.err = libjpeg::prepare(errors, message);
  unsigned long size = capacity;
  const crop::Status status = libjpeg::run(errors, [&] {
    jpeg_create_compress(&out);
    jpeg_mem_dest(&out, &data, &size);
    out.image_height = height;
    out.image_width = width;
    out.input_components = 3;
    out.in_color_space = JCS_RGB;
    jpeg_set_defaults(&out);
    jpeg_set_colorspace(&out, colours);
    for (int i = 0; i < out.num_components; ++i) {
      out.comp_info[i].h_samp_factor = factors[2 * i];
      out.comp_info[i].v_samp_factor = factors[2 * i + 1];
    }
    if (progressive) jpeg_simple_progression(&out);
    out.restart_interval = restart_interval;
    jpeg_start_compress(&out, TRUE);
    while (out.next_scanline < height) {
      uint8_t *row = const_cast<uint8_t *>(pixels) + size_t{3} * width * out.next_scanline;
      jpeg_write_scanlines(&out, &row, 1);
    }
    jpeg_finish_compress(&out);
  });
  jpeg_destroy_compress(&out);
  return status == crop::OK ? size : 0;
}

}  // extern "C"
