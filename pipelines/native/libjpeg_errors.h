// Error handling for libjpeg-turbo, which by default prints messages and ends the process. Here every error becomes a
// status and a message, nothing is printed, and JPEGs that are not suitable for training are refused.

#pragma once

#include <csetjmp>
#include <cstdint>
#include <cstdio>  // jpeglib.h needs FILE
#include <type_traits>

#include <jpeglib.h>

#include <jerror.h>

#include "task.h"

#if BITS_IN_JSAMPLE != 8
#error "needs libjpeg's interface for 8 bits a sample"
#endif
#ifndef LIBJPEG_TURBO_VERSION
#error "needs libjpeg-turbo"
#endif

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

namespace libjpeg {

using crop::Status;

constexpr uint64_t MAX_PIXELS = 178'956'970;  // Pillow's limit for decompression bombs
#define MAX_SCANS 500

struct Errors {
  jpeg_error_mgr base;
  jpeg_progress_mgr progress;
  std::jmp_buf jump;
  char *message;  // JMSG_LENGTH_MAX bytes
  Status status;
};

inline Status status_of(j_common_ptr info) {
  switch (info->err->msg_code) {
    case JERR_OUT_OF_MEMORY:
      return crop::NO_MEMORY;
    case JERR_ARITH_NOTIMPL:
    case JERR_BAD_PRECISION:
    case JERR_CONVERSION_NOTIMPL:
    case JERR_FRACT_SAMPLE_NOTIMPL:
    case JERR_NOTIMPL:
    case JERR_NOT_COMPILED:
    case JERR_SOF_UNSUPPORTED:
      return crop::UNSUPPORTED;
    default:
      return info->is_decompressor ? crop::DAMAGED : crop::UNSUPPORTED;
  }
}

[[noreturn]] inline void fail(Errors &errors, Status status) {
  errors.status = status;
  std::longjmp(errors.jump, 1);
}

[[noreturn]] inline void fail_with(Errors &errors, Status status, const char *message) {
  std::snprintf(errors.message, JMSG_LENGTH_MAX, "%s", message);
  fail(errors, status);
}

[[noreturn]] inline void on_error(j_common_ptr info) {
  Errors &errors = *reinterpret_cast<Errors *>(info->err);
  errors.base.format_message(info, errors.message);
  fail(errors, status_of(info));
}

// libjpeg reports most damage as a warning and fills in the lost data. Warnings are therefore errors here, except for
// those that do not concern image data.
inline void on_message(j_common_ptr info, int level) {
  if (level >= 0) return;
  switch (info->err->msg_code) {
    case JWRN_ADOBE_XFORM:
    case JWRN_EXTRANEOUS_DATA:
    case JWRN_JFIF_MAJOR:
    case JWRN_NOT_SEQUENTIAL:
      return;
    case JWRN_JPEG_EOF:
      fail_with(*reinterpret_cast<Errors *>(info->err), crop::DAMAGED, "truncated: Premature end of JPEG file");
    default:
      on_error(info);
  }
}

inline void count_scans(j_common_ptr info) {
  if (reinterpret_cast<j_decompress_ptr>(info)->input_scan_number <= MAX_SCANS) return;
  fail_with(*reinterpret_cast<Errors *>(info->err), crop::TOO_LARGE, "more than " TEXT(MAX_SCANS) " scans");
}

// Initialises `errors`. The result is the value for `err` of libjpeg's objects. `message` must have JMSG_LENGTH_MAX
// bytes.
inline jpeg_error_mgr *prepare(Errors &errors, char *message) {
  jpeg_std_error(&errors.base);
  errors.base.error_exit = on_error;
  errors.base.emit_message = on_message;
  errors.base.output_message = [](j_common_ptr) {};
  errors.progress.progress_monitor = count_scans;
  errors.message = message;
  return &errors.base;
}

// Runs `work`, which may call libjpeg. An error leaves `work` by longjmp, which skips destructors: neither `work` nor
// the functions that it calls may own an object with a destructor.
template <typename Work>
Status run(Errors &errors, Work work) {
  static_assert(std::is_trivially_destructible_v<Work>);
  if (setjmp(errors.jump)) return errors.status;
  work();
  return crop::OK;
}

// To be called between jpeg_read_header and jpeg_calc_output_dimensions.
inline const char *colours_not_handled(const jpeg_decompress_struct &in) {
  if (in.arith_code) return "arithmetic coding";
  // libjpeg-turbo decodes lossless JPEGs from version 3 on, whose data units are single samples. They are refused with
  // every version, so that a conversion does not depend on the library.
#if JPEG_LIB_VERSION >= 70
  if (in.min_DCT_h_scaled_size == 1) return "lossless coding";
#else
  if (in.min_DCT_scaled_size == 1) return "lossless coding";
#endif
  if (in.data_precision != 8) return "not 8 bits a sample";
  switch (in.jpeg_color_space) {
    case JCS_GRAYSCALE:
      return in.num_components == 1 ? nullptr : "odd components";
    case JCS_YCbCr:
    case JCS_RGB:
      return in.num_components == 3 ? nullptr : "odd components";
    case JCS_CMYK:
    case JCS_YCCK:
      return "CMYK";
    default:
      return "unknown colours";
  }
}

// Reads the file up to its first scan, and checks the size and the colours.
inline void read_header(jpeg_decompress_struct &in, Errors &errors, const uint8_t *data, size_t size) {
  jpeg_create_decompress(&in);
  in.progress = &errors.progress;
  jpeg_mem_src(&in, data, static_cast<unsigned long>(size));
  jpeg_read_header(&in, TRUE);
  const uint64_t pixels = static_cast<uint64_t>(in.image_height) * in.image_width;
  if (pixels > MAX_PIXELS) {
    std::snprintf(errors.message, JMSG_LENGTH_MAX, "%llu pixels, the limit is %llu",
                  static_cast<unsigned long long>(pixels), static_cast<unsigned long long>(MAX_PIXELS));
    fail(errors, crop::TOO_LARGE);
  }
  if (const char *reason = colours_not_handled(in)) fail_with(errors, crop::UNSUPPORTED, reason);
}

// Must be called after all scans have been read. If the scan of a component is missing, libjpeg makes the component
// grey without a warning.
inline void check_scans(const jpeg_decompress_struct &in, Errors &errors) {
  for (int i = 0; i < in.num_components; ++i)
    if (in.comp_info[i].quant_table == nullptr) fail_with(errors, crop::DAMAGED, "a scan is missing");
}

}  // namespace libjpeg
