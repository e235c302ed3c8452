// Antialiased bilinear resize of a box, as Pillow and torchvision do it.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "task.h"

namespace crop {

struct ResizeScratch {};

// output: uint8 (height, width, 3). False when memory is short.
inline bool resize(const Pixels &source, uint8_t *output, uint32_t height, uint32_t width, bool flip, ResizeScratch &) {
  const double scale_y = source.box_height / height, scale_x = source.box_width / width;
  const double reach_y = scale_y > 1 ? scale_y : 1, reach_x = scale_x > 1 ? scale_x : 1;
  for (uint32_t y = 0; y < height; ++y)
    for (uint32_t x = 0; x < width; ++x) {
      const double centre_y = source.top + (y + 0.5) * scale_y, centre_x = source.left + (x + 0.5) * scale_x;
      double sums[3] = {}, total = 0;
      for (uint32_t v = 0; v < source.height; ++v) {
        const double weight_y = 1 - std::fabs(v + 0.5 - centre_y) / reach_y;
        if (weight_y <= 0) continue;
        for (uint32_t u = 0; u < source.width; ++u) {
          const double weight = weight_y * (1 - std::fabs(u + 0.5 - centre_x) / reach_x);
          if (weight <= 0) continue;
          total += weight;
          for (int c = 0; c < 3; ++c) sums[c] += weight * source.rgb[v * source.stride + 3 * u + c];
        }
      }
      uint8_t *pixel = output + 3 * (static_cast<size_t>(y) * width + (flip ? width - 1 - x : x));
      for (int c = 0; c < 3; ++c) pixel[c] = static_cast<uint8_t>(sums[c] / total + 0.5);
    }
  return true;
}

}  // namespace crop
