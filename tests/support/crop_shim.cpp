// Lets tests/pipelines/test_baseline.py and tests/pipelines/test_resize.py call the parts of the crop decoder.

#include "../../pipelines/native/decode_crop.h"

#include <cstring>

extern "C" {

// box: top, left, height, width. pixels: uint8 (box height, box width, 3). 0 where libjpeg has to look.
int crop_baseline(const uint8_t *data, size_t size, uint32_t image_height, uint32_t image_width, const uint32_t *box,
                  bool vectors, uint8_t *pixels) {
  static crop::BaselineScratch scratch;
  scratch.level = vectors ? simd::level() : simd::Level::PLAIN;
  const crop::Task task{data, size, image_height, image_width, box[0], box[1], box[2], box[3], false, false};
  crop::Pixels found{};
  if (!crop::decode_baseline(task, scratch, found)) return 0;
  for (uint32_t row = 0; row < box[2]; ++row)
    std::memcpy(pixels + size_t{3} * box[3] * row, found.rgb + found.stride * row, size_t{3} * box[3]);
  return 1;
}

// pixels: uint8 (height, width, 3); box: top, left, height, width. output: uint8 (out height, out width, 3)
void crop_resize(const uint8_t *pixels, uint32_t height, uint32_t width, const double *box, uint8_t *output,
                 uint32_t out_height, uint32_t out_width, bool flip, bool vectors) {
  static crop::ResizeScratch scratch;
  scratch.level = vectors ? simd::level() : simd::Level::PLAIN;
  const crop::Pixels source{pixels, size_t{3} * width, height, width, box[0], box[1], box[2], box[3]};
  crop::resize(source, output, out_height, out_width, flip, scratch);
}

}  // extern "C"
