// Runs decoder_fuzz.cpp's check on files changed at random, without libFuzzer:
//
//   g++ -std=c++17 -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all tests/support/decoder_sanitizers.cpp -ljpeg
//       -o decoder_sanitizers
//   ./decoder_sanitizers COUNT SEED FILE...
//
// COUNT changed files are made from the FILEs, always the same ones. With 0 the FILEs themselves are run, each of which
// ends in a request. Prints how often each status came.

#include "decoder_fuzz.cpp"

#include "changed_files.h"

int main(int argc, char **argv) {
  size_t skipped = 0, statuses[crop::NO_FILE + 1] = {};
  fuzz::for_each_file(argc, argv, [&](const fuzz::Bytes &file) {
    const int status = fuzz::run(file.data(), file.size());
    ++(status < 0 ? skipped : statuses[status]);
  });
  std::printf("{\"ok\": %zu, \"damaged\": %zu, \"unsupported\": %zu, ", statuses[0], statuses[1], statuses[2]);
  std::printf("\"too_large\": %zu, \"no_memory\": %zu, \"skipped\": %zu}\n", statuses[3], statuses[4], skipped);
}
