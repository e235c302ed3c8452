// Decodes one stored image to its resized crop: the work of one thread for one sample.

#pragma once

#include <cstdint>
#include <cstdio>

#include "baseline.h"
#include "libjpeg_region.h"
#include "resize.h"
#include "task.h"

namespace crop {

struct Workspace {  // one for each thread, reused for every image
  BaselineScratch baseline;
  LibjpegScratch libjpeg;
  ResizeScratch resize;
};

// From this reduction on, libjpeg-turbo decodes the box, because it can decode at a fraction of the size and our
// decoder cannot. A crop of 224 pixels from 3,000 takes 15 % less time with libjpeg-turbo, one from 1,500 takes 22 %
// more.
constexpr uint32_t MIN_REDUCTION = 4;

// Decodes and resizes the box of a task. output: uint8 (out_height, out_width, 3), written only if the status is OK.
inline Status decode_crop(Workspace &workspace, const Task &task, uint8_t *output, uint32_t out_height,
                          uint32_t out_width, Message &message) {
  message.text[0] = 0;
  Pixels pixels;
  if (task.raw) {
    const size_t stride = size_t{3} * task.image_width;
    if (task.size != stride * task.image_height) {
      std::snprintf(message.text, sizeof message.text, "%zu bytes of raw pixels, but the shard says %u x %u", task.size,
                    task.image_height, task.image_width);
      return DAMAGED;
    }
    pixels = Pixels{task.data + task.top * stride + 3 * size_t{task.left}, stride, task.height, task.width, 0, 0,
                    static_cast<double>(task.height), static_cast<double>(task.width)};
  } else if (reduction_of(task, out_height, out_width) >= MIN_REDUCTION ||
             !decode_baseline(task, workspace.baseline, pixels)) {
    const Status status = decode_region(task, out_height, out_width, workspace.libjpeg, pixels, message);
    if (status != OK) return status;
  }
  if (resize(pixels, output, out_height, out_width, task.flip, workspace.resize)) return OK;
  std::snprintf(message.text, sizeof message.text, "out of memory");
  return NO_MEMORY;
}

}  // namespace crop
