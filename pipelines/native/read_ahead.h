// Asks the system to read parts of mapped files, and images in files of their own, before they are needed.

#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "stored_file.h"
#include "thread_pool.h"

namespace crop {

struct Range {  // of addresses
  uintptr_t begin, end;
};

// Each item of the job asks for one piece. Ranges with a small gap between them are joined, because reading across the
// gap costs a slow disk no more than a seek over it.
class ReadAheadJob : public ThreadPool::Job {
 public:
  static constexpr uintptr_t LARGEST_GAP = 512 * 1024;
  static constexpr uintptr_t PIECE = 128 * 1024;  // one madvise reads no more than the disk's read_ahead_kb

  explicit ReadAheadJob(std::vector<Range> pieces) : Job(pieces.size()), pieces_(std::move(pieces)) {}

  void run(size_t item, size_t) noexcept override {
    const Range &piece = pieces_[item];
    madvise(reinterpret_cast<void *>(piece.begin), piece.end - piece.begin, MADV_WILLNEED);  // only a hint: may fail
  }

  // Returns the ranges in order of address, starting at whole pages, with near ones joined and long ones split.
  static std::vector<Range> pieces(std::vector<Range> ranges) {
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    std::sort(ranges.begin(), ranges.end(), [](const Range &a, const Range &b) { return a.begin < b.begin; });
    std::vector<Range> cut;
    for (size_t first = 0; first < ranges.size();) {
      Range joined = ranges[first];
      while (++first < ranges.size() && ranges[first].begin <= joined.end + LARGEST_GAP)
        joined.end = std::max(joined.end, ranges[first].end);
      for (uintptr_t begin = joined.begin / page * page; begin < joined.end; begin += PIECE)
        cut.push_back(Range{begin, std::min(begin + PIECE, joined.end)});
    }
    return cut;
  }

 private:
  const std::vector<Range> pieces_;
};

// An image in a file. The names are copies, because a hint may be followed after its reader is gone.
struct StoredImage {
  std::string folder, name;
  StoredFile file;  // without names
  size_t size;

  StoredImage(const StoredFile &stored, size_t bytes)
      : folder(stored.folder), name(stored.name), file(stored), size(bytes) {}
};

class OpenAheadJob : public ThreadPool::Job {
 public:
  explicit OpenAheadJob(std::vector<StoredImage> images) : Job(images.size()), images_(std::move(images)) {}

  void run(size_t item, size_t) noexcept override {
    const StoredImage &image = images_[item];
    StoredFile file = image.file;
    file.folder = image.folder.c_str();
    file.name = image.name.c_str();
    advise_stored(file, image.size);
  }

 private:
  const std::vector<StoredImage> images_;
};

}  // namespace crop
