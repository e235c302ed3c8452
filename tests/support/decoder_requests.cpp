// Writes what decoder_digests.cpp reads, of files that are changed at random:
//
//   ./decoder_requests COUNT SEED FILE... >requests    (see changed_files.h)

#include "changed_files.h"
#include "decoder_digests.h"

int main(int argc, char **argv) {
  fuzz::for_each_file(argc, argv, [](const fuzz::Bytes &file) {
    fuzz::Request request;
    fuzz::Wanted wanted;
    if (file.size() < sizeof request) return;
    const size_t size = file.size() - sizeof request;
    std::memcpy(&request, file.data() + size, sizeof request);
    if (!fuzz::read_request(file.data(), size, request, wanted)) return;
    const crop::Task &task = wanted.task;
    const digests::Header header{task.image_height, task.image_width, task.top, task.left, task.height, task.width,
                                 wanted.out_height, wanted.out_width, task.raw, task.flip, static_cast<uint32_t>(size)};
    std::fwrite(&header, sizeof header, 1, stdout);
    std::fwrite(file.data(), 1, size, stdout);
  });
}
