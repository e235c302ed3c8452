// JPEG files that are changed at random, for the tests of the decoder.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "fuzz_request.h"

namespace fuzz {

using Bytes = std::vector<uint8_t>;

struct Random {  // SplitMix64
  uint64_t state;

  uint64_t next() {
    uint64_t z = state += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
  }
  size_t below(size_t end) { return end == 0 ? 0 : next() % end; }
  uint8_t byte() {
    constexpr uint8_t TELLING[] = {0x00, 0x01, 0x0F, 0x10, 0x11, 0x7F, 0x80, 0xFE, 0xFF, 0xC4, 0xD0, 0xD9, 0xDA};
    return static_cast<uint8_t>(below(2) ? next() : TELLING[below(sizeof TELLING)]);
  }
};

struct Span {
  size_t first, last;
};

// The marker segments before the first scan's data, and its restart markers.
inline std::vector<Span> spans_of(const Bytes &file, bool restarts) {
  std::vector<Span> segments, markers;
  size_t i = 2;
  while (i + 4 <= file.size() && file[i] == 0xFF) {
    const size_t end = i + 2 + static_cast<size_t>(file[i + 2] << 8 | file[i + 3]);
    const bool is_scan = file[i + 1] == 0xDA;
    if (end < i + 4 || end > file.size()) break;
    segments.push_back({i, end});
    i = end;
    if (is_scan) break;
  }
  for (; i + 2 <= file.size(); ++i)
    if (file[i] == 0xFF && file[i + 1] >= 0xD0 && file[i + 1] <= 0xD7) markers.push_back({i, i + 2});
  return restarts ? markers : segments;
}

inline void insert(Bytes &file, size_t place, const Bytes &what) {
  file.insert(file.begin() + static_cast<std::ptrdiff_t>(place), what.begin(), what.end());
}

inline void remove(Bytes &file, Span span) {
  file.erase(file.begin() + static_cast<std::ptrdiff_t>(span.first),
             file.begin() + static_cast<std::ptrdiff_t>(span.last));
}

inline Bytes copy(const Bytes &file, Span span) {
  return Bytes(file.begin() + static_cast<std::ptrdiff_t>(span.first),
               file.begin() + static_cast<std::ptrdiff_t>(span.last));
}

inline void change_segment(Bytes &file, Random &random, const std::vector<Span> &segments) {
  const Span segment = segments[random.below(segments.size())];
  const size_t body = segment.last - segment.first - 4;
  switch (random.below(7)) {
    case 0:
      return remove(file, segment);
    case 1:
      return insert(file, segments[random.below(segments.size())].first, copy(file, segment));
    case 2: {  // to another place
      const Bytes moved = copy(file, segment);
      remove(file, segment);
      return insert(file, 2 + random.below(file.size() - 2), moved);
    }
    case 3:
      file[segment.first + 1] = static_cast<uint8_t>(0xC0 + random.below(64));
      return;
    case 4:
      file[segment.first + 2 + random.below(2)] = random.byte();
      return;
    default:
      for (size_t left = 1 + random.below(3); left > 0 && body > 0; --left)
        file[segment.first + 4 + random.below(body)] = random.byte();
  }
}

inline void change_restarts(Bytes &file, Random &random, const std::vector<Span> &restarts) {
  const Span restart = restarts[random.below(restarts.size())];
  switch (random.below(5)) {
    case 0:
      return remove(file, restart);
    case 1:
      return insert(file, restart.first, copy(file, restart));
    case 2:
      file[restart.first + 1] = static_cast<uint8_t>(0xD0 + random.below(8));
      return;
    case 3: {
      const Bytes moved = copy(file, restart);
      remove(file, restart);
      return insert(file, restart.first - random.below(std::min<size_t>(restart.first + 1, 40)), moved);
    }
    default:  // and what follows, up to another one
      const Span other = restarts[random.below(restarts.size())];
      if (other.first > restart.first) remove(file, {restart.first, other.first});
  }
}

inline void change(Bytes &file, Random &random, const std::vector<Bytes> &files) {
  if (file.size() < 64) return;
  const std::vector<Span> segments = spans_of(file, false), restarts = spans_of(file, true);
  const size_t place = random.below(file.size());
  switch (random.below(12)) {
    case 0:
      return file.resize(place);
    case 1:
      for (size_t left = 1 + random.below(8); left > 0; --left)
        file[random.below(file.size())] ^= static_cast<uint8_t>(1 << random.below(8));
      return;
    case 2:
      file[place] = random.byte();
      return;
    case 3:
      return insert(file, place, Bytes(1 + random.below(8), random.byte()));
    case 4:
      return remove(file, {place, place + random.below(file.size() - place) % 64});
    case 5: {  // the rest of another file
      const Bytes &other = files[random.below(files.size())];
      const size_t start = random.below(other.size());
      file.resize(place);
      return insert(file, place, copy(other, {start, other.size()}));
    }
    case 6:
    case 7:
    case 8:
      if (!restarts.empty()) return change_restarts(file, random, restarts);
      [[fallthrough]];
    default:
      if (!segments.empty()) change_segment(file, random, segments);
  }
}

inline Bytes read(const char *path) {
  std::FILE *file = std::fopen(path, "rb");
  check(file != nullptr, path);
  Bytes bytes;
  for (int byte = std::fgetc(file); byte != EOF; byte = std::fgetc(file)) bytes.push_back(static_cast<uint8_t>(byte));
  std::fclose(file);
  return bytes;
}

// Makes COUNT changed files from the FILEs of `argv`, always the same ones, and calls work(file) for each. With 0 the
// FILEs themselves. Each file ends in a Request.
template <typename Work>
void for_each_file(int argc, char **argv, Work work) {
  check(argc > 3, "arguments: COUNT SEED FILE...");
  const size_t count = std::strtoull(argv[1], nullptr, 10);
  Random random{std::strtoull(argv[2], nullptr, 10)};
  std::vector<Bytes> files;
  for (int i = 3; i < argc; ++i) files.push_back(read(argv[i]));
  for (size_t i = 0; i < (count == 0 ? files.size() : count); ++i) {
    Bytes file = files[i % files.size()];
    if (count != 0) {
      for (size_t left = 1 + random.below(3); left > 0; --left) change(file, random, files);
      for (size_t left = sizeof(Request); left > 0; --left) file.push_back(static_cast<uint8_t>(random.next()));
    }
    work(file);
  }
}

}  // namespace fuzz
