// Runs the steps of decoding a crop separately, each on many images. Their speeds are upper bounds for a decoder that
// consists of these steps.

#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>  // jpeglib.h needs FILE
#include <vector>

#include <jpeglib.h>

#include "resize.h"
#include "task.h"

namespace ceilings {

struct Encoded {  // JPEG files
  const uint64_t *addresses, *sizes;
  size_t count;
};

struct Errors {
  jpeg_error_mgr base;
  std::jmp_buf jump;
};

// Reads the header of each image, runs `work(decompressor)` on it, and returns the number of images without an error.
template <typename Work>
size_t for_each(const Encoded &images, Work work) {
  Errors errors{};
  jpeg_decompress_struct in{};
  in.err = jpeg_std_error(&errors.base);
  errors.base.error_exit = [](j_common_ptr info) { std::longjmp(reinterpret_cast<Errors *>(info->err)->jump, 1); };
  errors.base.output_message = [](j_common_ptr) {};
  volatile size_t index = 0, done = 0;
  if (setjmp(errors.jump)) {  // jpeg_create_decompress or the decoding of one image failed
    if (in.mem == nullptr) return 0;
    jpeg_abort_decompress(&in);
    index = index + 1;
  } else {
    jpeg_create_decompress(&in);
  }
  for (; index < images.count; index = index + 1) {
    jpeg_mem_src(&in, reinterpret_cast<const unsigned char *>(images.addresses[index]),
                 static_cast<unsigned long>(images.sizes[index]));
    jpeg_read_header(&in, TRUE);
    work(in);
    jpeg_abort_decompress(&in);
    done = done + 1;
  }
  jpeg_destroy_decompress(&in);
  return done;
}

// Decodes whole frames to RGB, with libjpeg-turbo's default (accurate) IDCT and upsampling.
inline size_t decode(const Encoded &images) {
  std::vector<uint8_t> pixels;
  return for_each(images, [&pixels](jpeg_decompress_struct &in) {
    in.out_color_space = JCS_RGB;
    jpeg_start_decompress(&in);
    const size_t stride = size_t{3} * in.output_width;
    if (pixels.size() < stride * in.output_height) pixels.resize(stride * in.output_height);
    while (in.output_scanline < in.output_height) {
      uint8_t *row = pixels.data() + stride * in.output_scanline;
      jpeg_read_scanlines(&in, &row, 1);
    }
  });
}

// Decodes whole frames to coefficients: libjpeg-turbo's Huffman decoder alone.
inline size_t huffman(const Encoded &images) {
  return for_each(images, [](jpeg_decompress_struct &in) { jpeg_read_coefficients(&in); });
}

// Resizes boxes of decoded images to squares. sizes: (count, 2): height, width. boxes: (count, 4): top, left, height,
// width.
inline size_t resize(const uint64_t *pixels, const uint32_t *sizes, const uint32_t *boxes, size_t count,
                     uint32_t side) {
  std::vector<uint8_t> output(size_t{3} * side * side);
  crop::ResizeScratch scratch;
  size_t done = 0;
  for (size_t i = 0; i < count; ++i) {
    const uint32_t *box = boxes + 4 * i;
    const size_t stride = size_t{3} * sizes[2 * i + 1];
    const uint8_t *first = reinterpret_cast<const uint8_t *>(pixels[i]) + box[0] * stride + size_t{3} * box[1];
    const crop::Pixels source{first, stride, box[2], box[3], 0, 0, static_cast<double>(box[2]),
                              static_cast<double>(box[3])};
    done += crop::resize(source, output.data(), side, side, false, scratch);
  }
  return done;
}

}  // namespace ceilings
