// The input and output types of the crop decoder.

#pragma once

#include <cstddef>
#include <cstdint>

namespace crop {

// 5 is a status of the JPEG codec alone. NO_FILE: the image's file is missing, was changed or cannot be read.
enum Status : int { OK = 0, DAMAGED = 1, UNSUPPORTED = 2, TOO_LARGE = 3, NO_MEMORY = 4, NO_FILE = 6 };

struct Message {  // empty, or part of a sentence
  char text[200];
};

// One stored image and the requested box of it. The caller must make sure that the box is inside the image and not
// empty.
struct Task {
  const uint8_t *data;
  size_t size;
  uint32_t image_height, image_width;  // from the shard's index; a JPEG of another size is damaged
  uint32_t top, left, height, width;
  bool raw;   // `data` is RGB, uint8 (image_height, image_width, 3), not a JPEG file
  bool flip;  // mirror left-right after the resize
};

// Decoded pixels, and the box inside them that is resized. The box may have fractional coordinates after DCT scaling.
struct Pixels {
  const uint8_t *rgb;  // uint8 (height, width, 3), rows `stride` bytes apart
  size_t stride;
  uint32_t height, width;
  double top, left, box_height, box_width;
};

}  // namespace crop
