// The C interface of the crop decoder. It decodes batches of stored images to resized crops, in threads that it owns.
//
//   decoder_create -> decoder_submit -> decoder_wait ... -> decoder_release -> decoder_destroy
//
// Every function may be called from any thread and never prints. After fork() a child must not use its parent's
// decoder, because the decoder's threads do not exist in the child. In the child, decoder_destroy and decoder_release
// do nothing, and the other functions return OTHER_PROCESS.

#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <utility>
#include <vector>

#include "decode_crop.h"
#include "mapped_files.h"
#include "read_ahead.h"
#include "thread_pool.h"

namespace {

constexpr size_t OPENING_THREADS = 4, MAX_OPENING_JOBS = 16;

enum Answer : int { DONE = 0, NOT_YET = 1, BAD_SAMPLE = 2, SHORT_OF_MEMORY = 3, OTHER_PROCESS = 4 };

// One batch of samples. decoder_submit copies the inputs, except for the stored images themselves. The images and the
// three outputs must stay valid until the job is released.
struct Batch {
  uint64_t count;
  const uint64_t *addresses;   // (count,): the address of each stored image; not used for those in `files`
  const crop::StoredFile *files;  // (count,), or null: the images that are read from files. Their names must stay valid
  const int64_t *sizes;        // (count,): its size in bytes
  const int32_t *image_sizes;  // (count, 2): height, width in pixels
  const int32_t *boxes;        // (count, 4): top, left, height, width in source pixels
  const uint8_t *raw;          // (count,): 1 for pixels, 0 for a JPEG file
  const uint8_t *flips;        // (count,): 1 to mirror the crop left-right
  uint32_t out_height, out_width;
  uint8_t *output;          // (count, out_height, out_width, 3): zero if the status is not OK
  int32_t *statuses;        // (count,): crop::Status
  crop::Message *messages;  // (count,): written if the status is not OK
};

struct Decoder {
  explicit Decoder(uint32_t threads)
      : owner(getpid()), workspaces(new crop::Workspace[threads]), decoding(threads, "crop-decoder") {}

  const pid_t owner;
  const std::unique_ptr<crop::Workspace[]> workspaces;  // one for each thread
  crop::ThreadPool decoding;
  // Each is started by the first decoder_read_ahead that needs it.
  std::unique_ptr<crop::ThreadPool> reading;   // one thread, for mapped files
  std::unique_ptr<crop::ThreadPool> openings;  // several, because opening a file on a network waits for an answer
};

class DecodeJob : public crop::ThreadPool::Job {
 public:
  DecodeJob(Decoder &decoder, const Batch &batch, std::vector<crop::Task> tasks, std::vector<crop::StoredFile> files)
      : Job(tasks.size()), decoder_(decoder), batch_(batch), tasks_(std::move(tasks)), files_(std::move(files)) {}

  void run(size_t item, size_t thread) noexcept override {
    const size_t bytes = size_t{3} * batch_.out_height * batch_.out_width;
    uint8_t *output = batch_.output + item * bytes;
    crop::Message message{};
    crop::Status status = crop::NO_MEMORY;
    try {
      crop::Workspace &workspace = decoder_.workspaces[thread];
      const uint32_t height = batch_.out_height, width = batch_.out_width;
      if (files_.empty() || files_[item].folder == nullptr) {
        status = crop::decode_crop(workspace, tasks_[item], output, height, width, message);
      } else {
        status = crop::decode_stored(workspace, tasks_[item], files_[item], output, height, width, message);
      }
    } catch (const std::bad_alloc &) {
    }
    batch_.statuses[item] = status;
    if (status == crop::OK) return;
    std::memset(output, 0, bytes);
    batch_.messages[item] = message;
  }

 private:
  Decoder &decoder_;
  const Batch batch_;
  const std::vector<crop::Task> tasks_;
  const std::vector<crop::StoredFile> files_;  // empty if no image is read from a file
};

// Returns false if the sample's box is not inside its image.
bool make_task(const Batch &batch, size_t item, crop::Task &task) {
  const int32_t *size = batch.image_sizes + 2 * item, *box = batch.boxes + 4 * item;
  for (int side = 0; side < 2; ++side) {
    const int32_t start = box[side], length = box[2 + side];
    if (start < 0 || length < 1 || start > size[side] - length) return false;  // no operand is negative: no overflow
  }
  if (batch.sizes[item] < 1) return false;
  const auto number = [](int32_t value) { return static_cast<uint32_t>(value); };
  task = crop::Task{reinterpret_cast<const uint8_t *>(static_cast<uintptr_t>(batch.addresses[item])),
                    static_cast<size_t>(batch.sizes[item]),
                    number(size[0]),
                    number(size[1]),
                    number(box[0]),
                    number(box[1]),
                    number(box[2]),
                    number(box[3]),
                    batch.raw[item] != 0,
                    batch.flips[item] != 0};
  return true;
}

std::vector<crop::StoredFile> stored_files(const crop::StoredFile *files, uint64_t count) {
  return files == nullptr ? std::vector<crop::StoredFile>() : std::vector<crop::StoredFile>(files, files + count);
}

}  // namespace

extern "C" {

// The number must change with every change of a function or struct below. Python refuses a library with another number.
int decoder_interface(void) { return 3; }

// Returns null if the system has no memory or no threads left.
void *decoder_create(uint32_t threads) {
  try {
    return new Decoder(threads);
  } catch (const std::bad_alloc &) {
  } catch (const std::system_error &) {
  }
  return nullptr;
}

// Cancels all jobs, waits for the samples that are being decoded, ends the threads, and deletes the jobs and the
// decoder.
void decoder_destroy(void *handle) {
  Decoder *decoder = static_cast<Decoder *>(handle);
  if (decoder->owner == getpid()) delete decoder;
}

// Queues a batch. With DONE, *job is the handle for decoder_wait and decoder_release. With BAD_SAMPLE, *bad is the
// index of the first sample whose box is not inside its image.
int decoder_submit(void *handle, const Batch *batch, void **job, uint64_t *bad) {
  Decoder &decoder = *static_cast<Decoder *>(handle);
  if (decoder.owner != getpid()) return OTHER_PROCESS;
  try {
    std::vector<crop::Task> tasks(batch->count);
    for (size_t item = 0; item < tasks.size(); ++item) {
      if (make_task(*batch, item, tasks[item])) continue;
      *bad = item;
      return BAD_SAMPLE;
    }
    auto files = stored_files(batch->files, batch->count);
    auto made = std::make_unique<DecodeJob>(decoder, *batch, std::move(tasks), std::move(files));
    void *submitted = made.get();
    decoder.decoding.submit(std::move(made));
    *job = submitted;
    return DONE;
  } catch (const std::bad_alloc &) {
    return SHORT_OF_MEMORY;
  }
}

// Waits until the job is done, for at most timeout_ms. Returns DONE or NOT_YET.
int decoder_wait(void *handle, void *job, uint32_t timeout_ms) {
  Decoder &decoder = *static_cast<Decoder *>(handle);
  if (decoder.owner != getpid()) return OTHER_PROCESS;
  return decoder.decoding.wait(static_cast<DecodeJob *>(job), std::chrono::milliseconds(timeout_ms)) ? DONE : NOT_YET;
}

// Cancels the samples that have not begun, waits for those that are being decoded, deletes the job and sets *job to
// null.
void decoder_release(void *handle, void **job) {
  Decoder &decoder = *static_cast<Decoder *>(handle);
  if (decoder.owner == getpid()) decoder.decoding.release(static_cast<DecodeJob *>(*job));
  *job = nullptr;
}

// Asks the system to read these parts of mapped files, and the images in `files` (null for none) instead of the parts
// with their numbers. Separate threads make the system calls.
int decoder_read_ahead(void *handle, uint64_t count, const uint64_t *addresses, const int64_t *sizes,
                       const crop::StoredFile *files) {
  Decoder &decoder = *static_cast<Decoder *>(handle);
  if (decoder.owner != getpid()) return OTHER_PROCESS;
  try {
    std::vector<crop::Range> ranges;
    std::vector<crop::StoredImage> images;
    for (uint64_t item = 0; item < count; ++item) {
      const uintptr_t begin = static_cast<uintptr_t>(addresses[item]);
      if (files != nullptr && files[item].folder != nullptr) {
        images.emplace_back(files[item], static_cast<size_t>(sizes[item]));
      } else {
        ranges.push_back(crop::Range{begin, begin + static_cast<uintptr_t>(sizes[item])});
      }
    }
    if (!ranges.empty()) {
      if (!decoder.reading) decoder.reading = std::make_unique<crop::ThreadPool>(1, "read-ahead");
      decoder.reading->run(std::make_unique<crop::ReadAheadJob>(crop::ReadAheadJob::pieces(std::move(ranges))));
    }
    if (!images.empty()) {
      if (!decoder.openings) decoder.openings = std::make_unique<crop::ThreadPool>(OPENING_THREADS, "read-ahead");
      // Where the threads lag behind the decoder, which opens the files itself, more hints do not help.
      if (decoder.openings->num_jobs() < MAX_OPENING_JOBS)
        decoder.openings->run(std::make_unique<crop::OpenAheadJob>(std::move(images)));
    }
    return DONE;
  } catch (const std::bad_alloc &) {
  } catch (const std::system_error &) {
  }
  return SHORT_OF_MEMORY;
}

// Decodes a whole JPEG file in the calling thread. Returns a crop::Status. output: uint8 (height, width, 3), written
// only if the status is OK.
int decoder_decode(const uint8_t *data, uint64_t size, uint32_t height, uint32_t width, uint8_t *output,
                   crop::Message *message) {
  try {
    const auto workspace = std::make_unique<crop::Workspace>();
    const crop::Task task{data, static_cast<size_t>(size), height, width, 0, 0, height, width, false, false};
    return crop::decode_crop(*workspace, task, output, height, width, *message);
  } catch (const std::bad_alloc &) {
    std::snprintf(message->text, sizeof message->text, "out of memory");
    return crop::NO_MEMORY;
  }
}

// Guards a mapped file: if the system cannot read a page, because the file was truncated or its disk has failed, the
// page reads as zeros and the process does not end with SIGBUS. Returns a number for the functions below, or -1 if too
// many mappings are guarded.
int mapping_guard(uint64_t address, uint64_t size) {
  return crop::guard_mapping(static_cast<uintptr_t>(address), static_cast<size_t>(size));
}

// Installs the handler of SIGBUS again, if another handler has replaced it.
void mapping_guard_again(void) { crop::handle_bus_errors(); }

// Returns 1 if a page of this mapping could not be read, 0 otherwise.
int mapping_is_damaged(int number) { return crop::mapping_is_damaged(number); }

void mapping_release(int number) { crop::release_mapping(number); }

}  // extern "C"
