// The state of one call of the codec: libjpeg's decompressor and compressor with a common error handler, and the memory
// of the thread.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>  // jpeglib.h needs FILE
#include <cstdlib>

#include <jpeglib.h>

#include "../../pipelines/native/libjpeg_errors.h"
#include "requantize.h"
#include "rewrite_baseline.h"

extern "C" {
struct CodecResult {
  const uint8_t *data;
  size_t size;
  uint32_t height, width;
  char message[JMSG_LENGTH_MAX];
};
}

namespace {

using crop::DAMAGED, crop::NO_MEMORY, crop::OK, crop::UNSUPPORTED;
constexpr int TOO_LONG = 5;

struct Buffer {
  uint8_t *data = nullptr;
  size_t capacity = 0;

  Buffer() = default;
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;
  ~Buffer() { std::free(data); }

  // Grows the buffer and keeps its contents. It throws no exception, because longjmp may leave the callers.
  bool grow(size_t wanted) {
    if (wanted <= capacity) return true;
    void *grown = std::realloc(data, wanted);
    if (grown == nullptr) return false;
    data = static_cast<uint8_t *>(grown);
    capacity = wanted;
    return true;
  }
};

// Kept by each thread, because fresh memory for every image costs page faults.
struct Scratch {
  Buffer output, rows, sums, averaged, row_taps, column_taps, unstuffed, planes, block_starts;
  rewrite::State rewrite;
  requantize::State requantize;
  baseline::NotStuffed not_stuffed;
};
// Never inlined: otherwise inner loops look up the thread's memory again and again, which takes 5 % of codec_keep's
// time.
__attribute__((noinline)) Scratch &scratch_of_thread() {
  thread_local Scratch scratch;
  return scratch;
}

// ---- the compressed output

struct Destination {
  jpeg_destination_mgr base;
  size_t size;
};

[[noreturn]] void out_of_memory(j_common_ptr info) {
  info->err->msg_code = JERR_OUT_OF_MEMORY;
  info->err->msg_parm.i[0] = 0;
  libjpeg::on_error(info);
}

void start_output(j_compress_ptr out) {
  Buffer &buffer = scratch_of_thread().output;
  if (!buffer.grow(1 << 18)) out_of_memory(reinterpret_cast<j_common_ptr>(out));
  out->dest->next_output_byte = buffer.data;
  out->dest->free_in_buffer = buffer.capacity;
}

// libjpeg calls this when the whole buffer is full, even if next_output_byte does not point to its end.
boolean grow_output(j_compress_ptr out) {
  Buffer &buffer = scratch_of_thread().output;
  const size_t used = buffer.capacity;
  if (!buffer.grow(2 * used)) out_of_memory(reinterpret_cast<j_common_ptr>(out));
  out->dest->next_output_byte = buffer.data + used;
  out->dest->free_in_buffer = buffer.capacity - used;
  return TRUE;
}

void end_output(j_compress_ptr out) {
  reinterpret_cast<Destination *>(out->dest)->size = scratch_of_thread().output.capacity - out->dest->free_in_buffer;
}

// ---- libjpeg's decompressor and compressor

struct Codec {
  Scratch &scratch = scratch_of_thread();
  CodecResult &result;
  libjpeg::Errors errors{};
  Destination destination{};
  jpeg_decompress_struct in{};
  jpeg_compress_struct out{};

  explicit Codec(CodecResult *output) : result(*output) {
    result = CodecResult{};
    in.err = out.err = libjpeg::prepare(errors, result.message);
    destination.base.init_destination = start_output;
    destination.base.empty_output_buffer = grow_output;
    destination.base.term_destination = end_output;
  }
  ~Codec() {
    jpeg_destroy_compress(&out);  // both calls do nothing for an object that was never created
    jpeg_destroy_decompress(&in);
  }
  Codec(const Codec &) = delete;
  Codec &operator=(const Codec &) = delete;

  template <typename Work>
  int run(Work work) {
    const int status = libjpeg::run(errors, work);
    if (status == OK) {
      result.data = scratch.output.data;
      result.size = destination.size;
    }
    return status;
  }

  [[noreturn]] void refuse(int status, const char *message) {
    libjpeg::fail_with(errors, static_cast<libjpeg::Status>(status), message);
  }

  void read_header(const uint8_t *data, size_t size) {
    libjpeg::read_header(in, errors, data, size);
    result.height = in.image_height;
    result.width = in.image_width;
    if (in.jpeg_color_space == JCS_RGB) refuse(UNSUPPORTED, "stored as RGB");
  }

  void start_writing() {
    jpeg_create_compress(&out);
    out.dest = &destination.base;
  }

  uint8_t *memory(Buffer &buffer, size_t size) {
    if (!buffer.grow(size)) refuse(NO_MEMORY, "Insufficient memory");
    return buffer.data;
  }
};

}  // namespace
