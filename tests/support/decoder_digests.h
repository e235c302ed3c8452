// What a program reads that decodes images on another processor.

#pragma once

#include <cstdint>

namespace digests {

// Followed by `size` bytes of an image. tests/support/other_machines.py writes it, too.
struct Header {
  uint32_t image_height, image_width, top, left, height, width, out_height, out_width, raw, flip, size;
};

}  // namespace digests
