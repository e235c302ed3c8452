// Working memory that a thread keeps from one image to the next.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace crop {

struct Memory {  // growing discards the contents
  uint8_t *data = nullptr;
  size_t capacity = 0;

  Memory() = default;
  Memory(const Memory &) = delete;
  Memory &operator=(const Memory &) = delete;
  ~Memory() { std::free(data); }

  bool reserve(size_t wanted) {
    if (wanted <= capacity) return true;
    std::free(data);
    capacity = 0;
    data = static_cast<uint8_t *>(std::aligned_alloc(64, (wanted + 63) / 64 * 64));
    if (data != nullptr) capacity = wanted;
    return data != nullptr;
  }
};

}  // namespace crop
