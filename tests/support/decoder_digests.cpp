// Decodes images with the plain code and with the vector code of this processor, and prints digests of the pixels:
//
//   ./decoder_digests <requests    (see decoder_digests.h)
//
// A line for each image: three times (plain code, AVX2 or NEON, AVX-512; or what there is below it) the digest of the
// box's pixels and that of the resized box, or `-` twice where our decoder leaves the file to libjpeg, or raw pixels are
// not as many as they should be. If the program is compiled with -DWITH_LIBJPEG, what decode_crop says follows three
// times, and, if the box is the whole image, the status and the digest of what the JPEG codec makes of the file in four
// ways, or of raw pixels in two.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#ifdef WITH_LIBJPEG
#include "../../pipelines/native/decode_crop.h"
#include "../../preprocess/native/jpeg_codec.cpp"
#else
#include "../../pipelines/native/baseline.h"
#include "../../pipelines/native/resize.h"
#endif
#include "decoder_digests.h"

namespace digests {

struct Digest {  // FNV-1a
  uint64_t value = 0xCBF29CE484222325;

  void add(const void *data, size_t size) {
    const uint8_t *bytes = static_cast<const uint8_t *>(data);
    for (size_t i = 0; i < size; ++i) value = (value ^ bytes[i]) * 0x100000001B3;
  }
  unsigned long long printed() const { return value; }
};

constexpr size_t MARGIN = 64;

// An output, and bytes around it that must stay as they are.
struct Output {
  std::vector<uint8_t> bytes;

  explicit Output(size_t size) : bytes(size + 2 * MARGIN, 0xA5) {}
  uint8_t *data() { return bytes.data() + MARGIN; }
  Digest digest() {
    for (size_t i = 0; i < MARGIN; ++i)
      if (bytes[i] != 0xA5 || bytes[bytes.size() - 1 - i] != 0xA5) {
        std::fprintf(stderr, "wrote outside\n");
        std::abort();
      }
    Digest digest;
    digest.add(data(), bytes.size() - 2 * MARGIN);
    return digest;
  }
};

constexpr simd::Level LEVELS[] = {simd::Level::PLAIN, simd::Level::VECTORS, simd::Level::WIDE};

// The level, or the highest one that there is.
simd::Level possible(simd::Level level) { return level < simd::level() ? level : simd::level(); }

void parts(const crop::Task &task, const Header &header, simd::Level level) {
  static crop::BaselineScratch scratches[3];
  static crop::ResizeScratch resizes[3];
  crop::BaselineScratch &scratch = scratches[static_cast<int>(level)];
  crop::ResizeScratch &resize = resizes[static_cast<int>(level)];
  scratch.level = resize.level = possible(level);
  const size_t stride = size_t{3} * task.image_width;
  crop::Pixels pixels{task.data + task.top * stride + size_t{3} * task.left, stride, task.height, task.width, 0, 0,
                      static_cast<double>(task.height), static_cast<double>(task.width)};
  if (task.raw ? task.size != stride * task.image_height : !crop::decode_baseline(task, scratch, pixels)) {
    std::printf("- - ");
    return;
  }
  Digest box;
  for (uint32_t y = 0; y < pixels.height; ++y) box.add(pixels.rgb + y * pixels.stride, size_t{3} * pixels.width);
  Output output(size_t{3} * header.out_height * header.out_width);
  crop::resize(pixels, output.data(), header.out_height, header.out_width, task.flip, resize);
  std::printf("%016llx %016llx ", box.printed(), output.digest().printed());
}

#ifdef WITH_LIBJPEG
void whole(const crop::Task &task, const Header &header, simd::Level level) {
  static crop::Workspace workspaces[3];
  crop::Workspace &workspace = workspaces[static_cast<int>(level)];
  workspace.baseline.level = workspace.resize.level = possible(level);
  Output output(size_t{3} * header.out_height * header.out_width);
  crop::Message message;
  const int status =
      crop::decode_crop(workspace, task, output.data(), header.out_height, header.out_width, message);
  Digest digest = output.digest();
  digest.add(message.text, std::strlen(message.text));
  std::printf("%d:%016llx ", status, digest.printed());
}

void codec(const crop::Task &task) {
  CodecResult result{};
  const auto print = [&](int status) {
    Digest digest;
    if (status == 0) digest.add(result.data, result.size);
    std::printf("%d:%016llx ", status, digest.printed());
  };
  if (task.raw) {
    for (const int max_side : {0, 100})
      print(codec_encode(task.data, task.image_height, task.image_width, max_side, 90, 2, 2, 1, &result));
    return;
  }
  print(codec_keep(task.data, task.size, 0, 1, &result));
  print(codec_reencode(task.data, task.size, 0, 90, 2, 2, 1, &result));
  print(codec_reencode(task.data, task.size, 200, 90, 2, 2, 1, &result));
  print(codec_reencode(task.data, task.size, 100, 85, 1, 1, 0, &result));
}
#endif

bool run() {
  Header header;
  if (std::fread(&header, sizeof header, 1, stdin) != 1) return false;
  std::vector<uint8_t> file(header.size);
  if (std::fread(file.data(), 1, file.size(), stdin) != file.size()) std::abort();
  const crop::Task task{file.data(), file.size(), header.image_height, header.image_width, header.top, header.left,
                        header.height, header.width, header.raw != 0, header.flip != 0};
  for (const simd::Level level : LEVELS) parts(task, header, level);
#ifdef WITH_LIBJPEG
  for (const simd::Level level : LEVELS) whole(task, header, level);
  const bool is_whole = task.height == task.image_height && task.width == task.image_width;
  const bool has_pixels = !task.raw || task.size == size_t{3} * task.image_height * task.image_width;
  if (is_whole && has_pixels) codec(task);
#endif
  std::printf("\n");
  return true;
}

}  // namespace digests

int main() {
  std::printf("%d\n", static_cast<int>(simd::level()));
  while (digests::run()) {
  }
}
