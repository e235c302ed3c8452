// An input of the decoder's tests: a file followed by the bytes of a Request, which says what to decode of it.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../../pipelines/native/task.h"

namespace fuzz {

struct Request {  // each number becomes a valid one
  uint16_t top, left, height, width;
  uint8_t out_height, out_width, flip, raw;
};

constexpr uint64_t MOST_PIXELS = 1 << 20;  // larger frames take long
constexpr uint32_t LONGEST_OUTPUT = 48;

inline void check(bool holds, const char *what) {
  if (holds) return;
  std::fprintf(stderr, "decode_crop: %s\n", what);
  std::abort();
}

// The size that the first frame header gives, so that the shard seems to say the same.
inline void find_size(const uint8_t *data, size_t size, uint32_t &height, uint32_t &width) {
  for (size_t i = 2; i + 9 <= size;) {
    const int marker = data[i + 1];
    if (data[i] != 0xFF || marker == 0 || marker == 0xFF || marker == 0x01 || (marker >= 0xD0 && marker <= 0xD8)) {
      ++i;
      continue;
    }
    if (marker == 0xD9 || marker == 0xDA) return;
    if (marker >= 0xC0 && marker <= 0xCF && marker != 0xC4 && marker != 0xC8 && marker != 0xCC) {
      height = static_cast<uint32_t>(data[i + 5] << 8 | data[i + 6]);
      width = static_cast<uint32_t>(data[i + 7] << 8 | data[i + 8]);
      return;
    }
    i += 2 + static_cast<size_t>(data[i + 2] << 8 | data[i + 3]);
  }
}

struct Wanted {
  crop::Task task;
  uint32_t out_height, out_width;
};

// Returns false if the frame is too large for a quick answer.
inline bool read_request(const uint8_t *data, size_t size, const Request &request, Wanted &wanted) {
  crop::Task &task = wanted.task;
  task = crop::Task{};
  task.data = data;
  task.size = size;
  task.raw = request.raw % 16 == 0;
  task.flip = request.flip & 1;
  task.image_height = task.image_width = 1;
  if (task.raw) {
    task.image_width = 1 + request.raw / 16;
    if (size >= 3 * task.image_width) task.image_height = static_cast<uint32_t>(size / (3 * task.image_width));
  } else {
    find_size(data, size, task.image_height, task.image_width);
    if (task.image_height == 0) task.image_height = 1;
    if (task.image_width == 0) task.image_width = 1;
  }
  if (static_cast<uint64_t>(task.image_height) * task.image_width > MOST_PIXELS) return false;
  task.top = request.top % task.image_height;
  task.left = request.left % task.image_width;
  task.height = 1 + request.height % (task.image_height - task.top);
  task.width = 1 + request.width % (task.image_width - task.left);
  wanted.out_height = 1 + request.out_height % LONGEST_OUTPUT;
  wanted.out_width = 1 + request.out_width % LONGEST_OUTPUT;
  return true;
}

}  // namespace fuzz
