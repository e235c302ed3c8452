// libjpeg-turbo without its exits: every error ends in a status and a message, and nothing is printed.

#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>  // jpeglib.h needs FILE
#include <cstdlib>

#include <jpeglib.h>

#include <jerror.h>

#include "requantize.h"
#include "rewrite_baseline.h"

#if BITS_IN_JSAMPLE != 8
#error "needs libjpeg's interface for 8 bits a sample"
#endif
#ifndef LIBJPEG_TURBO_VERSION
#error "needs libjpeg-turbo"
#endif

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

extern "C" {
struct CodecResult {
  const uint8_t *data;
  size_t size;
  uint32_t height, width;
  char message[JMSG_LENGTH_MAX];
};
}

namespace {

enum Status : int { OK = 0, DAMAGED = 1, UNSUPPORTED = 2, TOO_LARGE = 3, TOO_LONG = 4, NO_MEMORY = 5 };

constexpr uint64_t MAX_PIXELS = 178'956'970;  // Pillow's limit
#define MAX_SCANS 500

struct Buffer {
  uint8_t *data = nullptr;
  size_t capacity = 0;

  Buffer() = default;
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;
  ~Buffer() { std::free(data); }

  // Keeps what is in it. No exceptions: longjmp may pass through the caller.
  bool grow(size_t wanted) {
    if (wanted <= capacity) return true;
    void *grown = std::realloc(data, wanted);
    if (grown == nullptr) return false;
    data = static_cast<uint8_t *>(grown);
    capacity = wanted;
    return true;
  }
};

// Kept by each thread: fresh memory for every image costs page faults.
struct Scratch {
  Buffer output, rows, sums, averaged, row_taps, column_taps, unstuffed, planes;
  rewrite::State rewrite;
  requantize::State requantize;
  baseline::NotStuffed not_stuffed;
};
// Never inlined: inner loops would look the thread's memory up again and again, 5 % of codec_keep's time.
__attribute__((noinline)) Scratch &scratch_of_thread() {
  thread_local Scratch scratch;
  return scratch;
}

// ---- libjpeg's errors

struct Errors {
  jpeg_error_mgr base;
  std::jmp_buf jump;
  CodecResult *result;
  int status;
};

int status_of(j_common_ptr info) {
  switch (info->err->msg_code) {
    case JERR_OUT_OF_MEMORY:
      return NO_MEMORY;
    case JERR_ARITH_NOTIMPL:
    case JERR_BAD_PRECISION:
    case JERR_CONVERSION_NOTIMPL:
    case JERR_FRACT_SAMPLE_NOTIMPL:
    case JERR_NOTIMPL:
    case JERR_NOT_COMPILED:
    case JERR_SOF_UNSUPPORTED:
      return UNSUPPORTED;
    default:
      return info->is_decompressor ? DAMAGED : UNSUPPORTED;
  }
}

[[noreturn]] void fail(Errors *errors, int status) {
  errors->status = status;
  std::longjmp(errors->jump, 1);
}

[[noreturn]] void fail_with(Errors *errors, int status, const char *message) {
  std::snprintf(errors->result->message, JMSG_LENGTH_MAX, "%s", message);
  fail(errors, status);
}

[[noreturn]] void on_error(j_common_ptr info) {
  Errors *errors = reinterpret_cast<Errors *>(info->err);
  errors->base.format_message(info, errors->result->message);
  fail(errors, status_of(info));
}

// A warning means lost image data unless it is one of these.
void on_message(j_common_ptr info, int level) {
  if (level >= 0) return;
  switch (info->err->msg_code) {
    case JWRN_ADOBE_XFORM:
    case JWRN_EXTRANEOUS_DATA:
    case JWRN_JFIF_MAJOR:
    case JWRN_NOT_SEQUENTIAL:
      return;
    case JWRN_JPEG_EOF:
      fail_with(reinterpret_cast<Errors *>(info->err), DAMAGED, "truncated: Premature end of JPEG file");
    default:
      on_error(info);
  }
}

void print_nothing(j_common_ptr) {}

// ---- the compressed output

struct Destination {
  jpeg_destination_mgr base;
  size_t size;
};

[[noreturn]] void out_of_memory(j_common_ptr info) {
  info->err->msg_code = JERR_OUT_OF_MEMORY;
  info->err->msg_parm.i[0] = 0;
  on_error(info);
}

void start_output(j_compress_ptr out) {
  Buffer &buffer = scratch_of_thread().output;
  if (!buffer.grow(1 << 18)) out_of_memory(reinterpret_cast<j_common_ptr>(out));
  out->dest->next_output_byte = buffer.data;
  out->dest->free_in_buffer = buffer.capacity;
}

boolean grow_output(j_compress_ptr out) {  // called when the whole buffer is full, whatever next_output_byte says
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

// ---- both halves of libjpeg with one way out

struct Codec {
  Scratch &scratch = scratch_of_thread();
  Errors errors{};
  jpeg_progress_mgr progress{};
  Destination destination{};
  jpeg_decompress_struct in{};
  jpeg_compress_struct out{};

  explicit Codec(CodecResult *result) {
    *result = CodecResult{};
    in.err = out.err = jpeg_std_error(&errors.base);
    errors.base.error_exit = on_error;
    errors.base.emit_message = on_message;
    errors.base.output_message = print_nothing;
    errors.result = result;
    destination.base.init_destination = start_output;
    destination.base.empty_output_buffer = grow_output;
    destination.base.term_destination = end_output;
  }
  ~Codec() {
    jpeg_destroy_compress(&out);  // both do nothing for what was never created
    jpeg_destroy_decompress(&in);
  }
  Codec(const Codec &) = delete;
  Codec &operator=(const Codec &) = delete;

  CodecResult &result() { return *errors.result; }

  // `work` may be left by longjmp: it must hold nothing that has a destructor.
  template <typename Work>
  int run(Work work) {
    if (setjmp(errors.jump)) {
      result().data = nullptr;
      result().size = 0;
      return errors.status;
    }
    work();
    result().data = scratch.output.data;
    result().size = destination.size;
    return OK;
  }

  [[noreturn]] void refuse(int status, const char *message) { fail_with(&errors, status, message); }

  void start_writing() {
    jpeg_create_compress(&out);
    out.dest = &destination.base;
  }

  uint8_t *memory(Buffer &buffer, size_t size) {
    if (!buffer.grow(size)) refuse(NO_MEMORY, "Insufficient memory");
    return buffer.data;
  }
};

// ---- reading

void count_scans(j_common_ptr info) {
  const j_decompress_ptr in = reinterpret_cast<j_decompress_ptr>(info);
  if (in->input_scan_number <= MAX_SCANS) return;
  fail_with(reinterpret_cast<Errors *>(info->err), TOO_LARGE, "more than " TEXT(MAX_SCANS) " scans");
}

const char *colours_not_handled(const jpeg_decompress_struct &in) {
  if (in.arith_code) return "arithmetic coding";
  if (in.data_precision != 8) return "not 8 bits a sample";
  switch (in.jpeg_color_space) {
    case JCS_GRAYSCALE:
      return in.num_components == 1 ? nullptr : "odd components";
    case JCS_YCbCr:
      return in.num_components == 3 ? nullptr : "odd components";
    case JCS_RGB:
      return "stored as RGB";
    case JCS_CMYK:
    case JCS_YCCK:
      return "CMYK";
    default:
      return "unknown colours";
  }
}

void read_header(Codec &codec, const uint8_t *data, size_t size) {
  jpeg_decompress_struct &in = codec.in;
  jpeg_create_decompress(&in);
  codec.progress.progress_monitor = count_scans;
  in.progress = &codec.progress;
  jpeg_mem_src(&in, data, static_cast<unsigned long>(size));
  jpeg_read_header(&in, TRUE);
  codec.result().height = in.image_height;
  codec.result().width = in.image_width;
  const uint64_t pixels = static_cast<uint64_t>(in.image_height) * in.image_width;
  if (pixels > MAX_PIXELS) {
    std::snprintf(codec.result().message, JMSG_LENGTH_MAX, "%llu pixels, the limit is %llu",
                  static_cast<unsigned long long>(pixels), static_cast<unsigned long long>(MAX_PIXELS));
    fail(&codec.errors, TOO_LARGE);
  }
  if (const char *reason = colours_not_handled(in)) codec.refuse(UNSUPPORTED, reason);
}

// When all has been read. libjpeg leaves the component of a missing scan grey, without a warning.
void check_scans(Codec &codec) {
  for (int i = 0; i < codec.in.num_components; ++i)
    if (codec.in.comp_info[i].quant_table == nullptr) codec.refuse(DAMAGED, "a scan is missing");
}

}  // namespace
