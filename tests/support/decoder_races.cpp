// Decodes batches of images from memory and from files, in several threads, under the thread sanitizer:
//
//   g++ -std=c++17 -g -O1 -fsanitize=thread tests/support/decoder_races.cpp -ljpeg -lpthread -o decoder_races
//   ./decoder_races FOLDER HEIGHT WIDTH
//
// FOLDER has JPEGs of one size. Some jobs are waited for, some are released at once, and some are left to the end of the
// decoder. Prints how many images were decoded, and how many should have been.

#include "../../pipelines/native/crop_decoder.cpp"

#include <dirent.h>

#include <cstdlib>
#include <string>

namespace {

constexpr uint32_t SIDE = 32, THREADS = 4, JOBS = 12, WAITED_FOR = 6;

struct Images {
  std::vector<std::string> names, contents;
  std::vector<crop::StoredFile> files;
  std::vector<uint64_t> addresses;
  std::vector<int64_t> sizes;
  std::vector<int32_t> image_sizes, boxes;
  std::vector<uint8_t> no;

  Images(const char *folder, int32_t height, int32_t width) {
    DIR *directory = opendir(folder);
    while (const dirent *entry = directory == nullptr ? nullptr : readdir(directory))
      if (entry->d_name[0] != '.') names.push_back(entry->d_name);
    if (directory != nullptr) closedir(directory);
    for (const std::string &name : names) {
      struct stat now {};
      stat((std::string(folder) + "/" + name).c_str(), &now);
      const crop::StoredFile file{folder, name.c_str(), 0, now.st_size,
                                  int64_t{now.st_mtim.tv_sec} * 1'000'000'000 + now.st_mtim.tv_nsec};
      crop::Memory buffer;
      crop::Message message;
      if (crop::read_stored(file, static_cast<size_t>(now.st_size), buffer, message) != crop::OK) std::abort();
      contents.emplace_back(reinterpret_cast<const char *>(buffer.data), static_cast<size_t>(now.st_size));
      files.push_back(file);
      sizes.push_back(now.st_size);
      image_sizes.insert(image_sizes.end(), {height, width});
      boxes.insert(boxes.end(), {0, 0, height, width});
      no.push_back(0);
    }
    for (size_t i = 0; i < names.size(); ++i) {  // every other one is in memory
      addresses.push_back(i % 2 ? 0 : reinterpret_cast<uintptr_t>(contents[i].data()));
      if (i % 2 == 0) files[i].folder = nullptr;
    }
  }
};

struct Output {
  std::vector<uint8_t> pixels;
  std::vector<int32_t> statuses;
  std::vector<crop::Message> messages;
};

}  // namespace

int main(int argc, char **argv) {
  if (argc != 4) return 2;
  const Images images(argv[1], std::atoi(argv[2]), std::atoi(argv[3]));
  const uint64_t count = images.names.size();
  std::vector<Output> outputs(JOBS);
  std::vector<void *> jobs(JOBS);
  void *decoder = decoder_create(THREADS);
  for (uint32_t k = 0; k < JOBS; ++k) {
    decoder_read_ahead(decoder, count, images.addresses.data(), images.sizes.data(), images.files.data());
    Output &output = outputs[k];
    output.pixels.resize(count * 3 * SIDE * SIDE);
    output.statuses.resize(count);
    output.messages.resize(count);
    const Batch batch{count,
                      images.addresses.data(),
                      images.files.data(),
                      images.sizes.data(),
                      images.image_sizes.data(),
                      images.boxes.data(),
                      images.no.data(),
                      images.no.data(),
                      SIDE,
                      SIDE,
                      output.pixels.data(),
                      output.statuses.data(),
                      output.messages.data()};
    uint64_t bad = 0;
    if (decoder_submit(decoder, &batch, &jobs[k], &bad) != DONE) return 3;
  }
  uint64_t decoded = 0;
  for (uint32_t k = 0; k < WAITED_FOR; ++k) {
    while (decoder_wait(decoder, jobs[k], 50) != DONE) {
    }
    for (const int32_t status : outputs[k].statuses) decoded += status == crop::OK;
    decoder_release(decoder, &jobs[k]);
  }
  decoder_release(decoder, &jobs[WAITED_FOR + 1]);
  decoder_destroy(decoder);
  std::printf("%llu of %llu\n", static_cast<unsigned long long>(decoded),
              static_cast<unsigned long long>(WAITED_FOR * count));
}
