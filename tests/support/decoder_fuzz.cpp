// Feeds hostile files to decode_crop, and aborts where it breaks its word. With libFuzzer (Debian: clang libjpeg-dev):
//
//   python tests/support/decoder_seeds.py corpus
//   clang++ -std=c++17 -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all tests/support/decoder_fuzz.cpp
//       -ljpeg -o decoder_fuzz
//   ./decoder_fuzz -runs=2000000 -max_len=16384 -rss_limit_mb=4096 corpus
//
// An input is a file followed by the bytes of Request (fuzz_request.h).

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../../pipelines/native/decode_crop.h"
#include "fuzz_request.h"

namespace fuzz {

// A block of exactly that size, so that the sanitizer sees what goes beyond it.
struct Block {
  uint8_t *data;
  size_t size;

  Block(size_t wanted, int fill) : data(static_cast<uint8_t *>(std::malloc(wanted))), size(wanted) {
    check(data != nullptr || wanted == 0, "the harness has no memory");
    if (wanted != 0) std::memset(data, fill, wanted);
  }
  Block(const Block &) = delete;
  Block &operator=(const Block &) = delete;
  ~Block() { std::free(data); }

  bool is_filled(int fill, size_t first, size_t last) const {
    for (size_t i = first; i < last; ++i)
      if (data[i] != fill) return false;
    return true;
  }
};

inline int memory_fill = 0;  // of what is allocated, so that two decodes find different bytes where they wrote none

constexpr size_t MARGIN = 64;

struct Outcome {
  crop::Status status;
  crop::Message message;
};

// output: as large as wanted, and MARGIN bytes on either side.
inline Outcome decode(crop::Workspace &workspace, const crop::Task &task, Block &output, int fill, uint32_t out_height,
                      uint32_t out_width) {
  memory_fill = fill;
  Outcome outcome;
  std::memset(&outcome, 'x', sizeof outcome);
  outcome.status = crop::decode_crop(workspace, task, output.data + MARGIN, out_height, out_width, outcome.message);
  const crop::Message &message = outcome.message;
  check(outcome.status >= crop::OK && outcome.status <= crop::NO_MEMORY, "no status");
  check(std::memchr(message.text, 0, sizeof message.text) != nullptr, "a message without an end");
  check((message.text[0] == 0) == (outcome.status == crop::OK), "a message, or none, but not where it should be");
  check(output.is_filled(fill, 0, MARGIN), "wrote before the output");
  check(output.is_filled(fill, output.size - MARGIN, output.size), "wrote behind the output");
  check(outcome.status == crop::OK || output.is_filled(fill, MARGIN, output.size - MARGIN), "failed, but wrote");
  return outcome;
}

// A file in memory with the image behind some other bytes, and its description, which is true or not.
struct InFile {
  crop::StoredFile stored;
  char name[16];
  bool is_true;

  InFile(const uint8_t *data, size_t size, const Request &request) {
    static const int file = memfd_create("image", 0);
    const size_t offset = request.raw % 8;
    const bool is_cut = (request.flip & 6) == 6 && size != 0;
    check(file >= 0 && ftruncate(file, 0) == 0, "the harness has no file");
    check(ftruncate(file, static_cast<off_t>(offset)) == 0, "the harness's file is full");
    const size_t written = size - is_cut;
    check(pwrite(file, data, written, static_cast<off_t>(offset)) == static_cast<ssize_t>(written), "it is full");
    struct stat now {};
    check(fstat(file, &now) == 0, "no status");
    std::snprintf(name, sizeof name, "%d", file);
    stored = crop::StoredFile{"/proc/self/fd", name, offset, now.st_size + is_cut,
                              int64_t{now.st_mtim.tv_sec} * 1'000'000'000 + now.st_mtim.tv_nsec};
    if ((request.flip & 6) == 2) ++stored.size;
    if ((request.flip & 6) == 4) ++stored.mtime_ns;
    is_true = (request.flip & 6) == 0 || ((request.flip & 6) == 6 && size == 0);
  }
};

// -1: not decoded, as the frame is too large for a quick answer.
inline int run(const uint8_t *bytes, size_t size) {
  Request request;
  if (size < sizeof request) return -1;
  size -= sizeof request;
  std::memcpy(&request, bytes + size, sizeof request);
  Block file(size, 0);
  if (size != 0) std::memcpy(file.data, bytes, size);

  Wanted wanted;
  if (!read_request(file.data, size, request, wanted)) return -1;
  const crop::Task &task = wanted.task;
  const uint32_t out_height = wanted.out_height, out_width = wanted.out_width;

  const size_t room = size_t{3} * out_height * out_width + 2 * MARGIN;
  static crop::Workspace used;  // holds what the inputs before have left in it
  crop::Workspace fresh;
  Block first(room, 0x00), second(room, 0xA5);
  const Outcome one = decode(used, task, first, 0x00, out_height, out_width);
  const Outcome two = decode(fresh, task, second, 0xA5, out_height, out_width);
  check(one.status == two.status, "another status with another past");
  check(std::strcmp(one.message.text, two.message.text) == 0, "another message with another past");
  const bool alike = std::memcmp(first.data + MARGIN, second.data + MARGIN, room - 2 * MARGIN) == 0;
  check(one.status != crop::OK || alike, "other pixels with another past");

  // The same from a file. Nothing is written if the file is not the described one.
  Block third(room, 0x5A);
  const InFile file_of_image(file.data, size, request);
  memory_fill = 0x5A;
  Outcome three;
  std::memset(&three, 'x', sizeof three);
  three.status = crop::decode_stored(used, task, file_of_image.stored, third.data + MARGIN, out_height, out_width,
                                     three.message);
  check(third.is_filled(0x5A, 0, MARGIN) && third.is_filled(0x5A, third.size - MARGIN, third.size), "wrote outside");
  if (file_of_image.is_true) {
    check(three.status == one.status, "another status from a file");
    check(std::strcmp(three.message.text, one.message.text) == 0, "another message from a file");
    const bool same = std::memcmp(first.data + MARGIN, third.data + MARGIN, room - 2 * MARGIN) == 0;
    check(one.status != crop::OK || same, "other pixels from a file");
  } else {
    check(three.status == crop::NO_FILE && three.message.text[0] != 0, "another file was taken");
    check(third.is_filled(0x5A, MARGIN, third.size - MARGIN), "another file was decoded");
  }
  return one.status;
}

}  // namespace fuzz

extern "C" {

// The sanitizers call this for every block, GCC's from version 15 on before they allow access to it: hence no memset and
// no checks here. Large blocks are left alone, because those of calloc are zeroed before this call, not after it.
__attribute__((no_sanitize("address"))) void __sanitizer_malloc_hook(const volatile void *block, size_t size) {
  if (size > 1 << 16) return;
  volatile uint8_t *bytes = static_cast<volatile uint8_t *>(const_cast<volatile void *>(block));
  for (size_t i = 0; i < size; ++i) bytes[i] = static_cast<uint8_t>(fuzz::memory_fill);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
  fuzz::run(bytes, size);
  return 0;
}

}  // extern "C"
