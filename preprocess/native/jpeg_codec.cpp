// Re-encodes JPEGs, encodes pixels as JPEGs, and rewrites JPEGs losslessly, over libjpeg-turbo's classic interface.
//
//   codec_reencode   decode -> RGB -> area averaging -> compress, row by row: no whole frame is ever in memory
//   codec_encode             RGB -> area averaging -> compress
//   codec_keep       coefficients -> the same coefficients with restart markers and without metadata
//
// Every function may be called from any thread, returns a Status, and never prints. CodecResult.data belongs to the
// calling thread and holds until its next call.

#include <climits>
#include <cmath>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>  // jpeglib.h needs FILE
#include <cstdlib>
#include <cstring>

#include <jpeglib.h>

#include <jerror.h>

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
  Buffer output, rows, sums, averaged, row_taps, column_taps;
};
thread_local Scratch scratch;

// ---- libjpeg's errors

struct Errors {
  jpeg_error_mgr base;
  std::jmp_buf jump;
  CodecResult *result;
  int status;
  bool writing;
};

int status_of(int code, bool writing) {
  switch (code) {
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
      return writing ? UNSUPPORTED : DAMAGED;
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
  fail(errors, status_of(errors->base.msg_code, errors->writing));
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
  Buffer &buffer = scratch.output;
  if (!buffer.grow(1 << 18)) out_of_memory(reinterpret_cast<j_common_ptr>(out));
  out->dest->next_output_byte = buffer.data;
  out->dest->free_in_buffer = buffer.capacity;
}

boolean grow_output(j_compress_ptr out) {  // called when the whole buffer is full, whatever next_output_byte says
  Buffer &buffer = scratch.output;
  const size_t used = buffer.capacity;
  if (!buffer.grow(2 * used)) out_of_memory(reinterpret_cast<j_common_ptr>(out));
  out->dest->next_output_byte = buffer.data + used;
  out->dest->free_in_buffer = buffer.capacity - used;
  return TRUE;
}

void end_output(j_compress_ptr out) {
  reinterpret_cast<Destination *>(out->dest)->size = scratch.output.capacity - out->dest->free_in_buffer;
}

// ---- both halves of libjpeg with one way out

struct Codec {
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

// ---- area averaging: preprocess/area.py to the bit

struct Tap {  // output i is the sum of `count` inputs from `first` on, each times its weight
  uint32_t first, count, weights;
};

struct Taps {
  const Tap *taps = nullptr;
  const float *weights = nullptr;
};

Taps area_taps(Codec &codec, Buffer &buffer, uint32_t length, uint32_t size) {
  const size_t num_weights = static_cast<size_t>(length) + 2 * static_cast<size_t>(size);
  uint8_t *memory = codec.memory(buffer, size * sizeof(Tap) + num_weights * sizeof(float));
  Tap *taps = reinterpret_cast<Tap *>(memory);
  float *weights = reinterpret_cast<float *>(memory + size * sizeof(Tap));
  uint32_t used = 0;
  for (uint32_t i = 0; i < size; ++i) {
    const double start = static_cast<double>(static_cast<uint64_t>(i) * length) / size;
    const double end = static_cast<double>((static_cast<uint64_t>(i) + 1) * length) / size;
    const uint32_t first = static_cast<uint32_t>(start), last = static_cast<uint32_t>(std::ceil(end));
    taps[i] = Tap{first, last - first, used};
    for (uint32_t tap = first; tap < last; ++tap) {
      const double covered = std::fmin(end, tap + 1.0) - std::fmax(start, tap);
      weights[used++] = static_cast<float>(covered * size / length);
    }
  }
  return Taps{taps, weights};
}

typedef float Four __attribute__((vector_size(16)));

// sums (n) = or += row (n) * weight
inline __attribute__((always_inline)) void weigh_row(float *sums, const uint8_t *row, size_t n, float weight,
                                                     bool first) {
  if (first) {
    for (size_t i = 0; i < n; ++i) sums[i] = row[i] * weight;
  } else {
    for (size_t i = 0; i < n; ++i) sums[i] += row[i] * weight;
  }
}

// sums: RGB floats, with one more float behind them; output: width RGB bytes
inline __attribute__((always_inline)) void average_columns(uint8_t *output, const float *sums, Taps columns,
                                                           uint32_t width) {
  for (uint32_t x = 0; x < width; ++x) {
    const Tap tap = columns.taps[x];
    const float *weights = columns.weights + tap.weights;
    Four total{};
    for (uint32_t k = 0; k < tap.count; ++k) {
      Four pixel;
      std::memcpy(&pixel, sums + 3 * (static_cast<size_t>(tap.first) + k), sizeof pixel);
      total += pixel * weights[k];
    }
    for (int channel = 0; channel < 3; ++channel)
      output[3 * static_cast<size_t>(x) + channel] = static_cast<uint8_t>(total[channel] + 0.5f);
  }
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) void weigh_row_avx2(float *sums, const uint8_t *row, size_t n, float weight,
                                                    bool first) {
  weigh_row(sums, row, n, weight, first);
}
__attribute__((target("avx2"))) void average_columns_avx2(uint8_t *output, const float *sums, Taps columns,
                                                          uint32_t width) {
  average_columns(output, sums, columns, width);
}
#endif
void weigh_row_any(float *sums, const uint8_t *row, size_t n, float weight, bool first) {
  weigh_row(sums, row, n, weight, first);
}
void average_columns_any(uint8_t *output, const float *sums, Taps columns, uint32_t width) {
  average_columns(output, sums, columns, width);
}

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2");
#else
  return false;
#endif
}

#if defined(__x86_64__)
const auto weigh = has_avx2() ? weigh_row_avx2 : weigh_row_any;
const auto average = has_avx2() ? average_columns_avx2 : average_columns_any;
#else
const auto weigh = weigh_row_any;
const auto average = average_columns_any;
#endif

uint32_t fit(uint32_t side, uint32_t longest, uint32_t max_side) {
  const uint64_t fitted = (static_cast<uint64_t>(side) * max_side + longest / 2) / longest;
  return fitted == 0 ? 1 : static_cast<uint32_t>(fitted);
}

// ---- writing

struct Options {
  int max_side, quality, h_samp, v_samp, restart_rows;
};

// Takes rows of RGB from top to bottom, reduces them and compresses them.
struct Sink {
  Codec &codec;
  uint32_t in_width, width, height;
  bool reduces;
  Taps rows, columns;
  float *sums = nullptr;
  uint8_t *averaged = nullptr;
  uint32_t in_row = 0, row = 0;

  void start(uint32_t in_height, const Options &options) {
    const uint32_t longest = in_height > in_width ? in_height : in_width;
    const uint32_t max_side = static_cast<uint32_t>(options.max_side);
    reduces = max_side != 0 && longest > max_side;
    width = reduces ? fit(in_width, longest, max_side) : in_width;
    height = reduces ? fit(in_height, longest, max_side) : in_height;
    if (reduces) {
      rows = area_taps(codec, scratch.row_taps, in_height, height);
      columns = area_taps(codec, scratch.column_taps, in_width, width);
      const size_t num_sums = 3 * static_cast<size_t>(in_width) + 1;
      sums = reinterpret_cast<float *>(codec.memory(scratch.sums, num_sums * sizeof(float)));
      sums[num_sums - 1] = 0;
      averaged = codec.memory(scratch.averaged, 3 * static_cast<size_t>(width));
    }
    codec.errors.writing = true;
    jpeg_compress_struct &out = codec.out;
    jpeg_create_compress(&out);
    out.dest = &codec.destination.base;
    out.image_width = width;
    out.image_height = height;
    out.input_components = 3;
    out.in_color_space = JCS_RGB;
    jpeg_set_defaults(&out);
    jpeg_set_quality(&out, options.quality, TRUE);
    out.comp_info[0].h_samp_factor = options.h_samp;
    out.comp_info[0].v_samp_factor = options.v_samp;
    out.restart_in_rows = options.restart_rows;
    jpeg_start_compress(&out, TRUE);
    codec.errors.writing = false;
  }

  void write(uint8_t **rows_of_pixels, uint32_t count) {
    if (!reduces) {
      jpeg_write_scanlines(&codec.out, rows_of_pixels, count);
      return;
    }
    for (uint32_t i = 0; i < count; ++i, ++in_row) reduce(rows_of_pixels[i]);
  }

  void reduce(const uint8_t *pixels) {
    for (; row < height; ++row) {
      const Tap tap = rows.taps[row];
      if (in_row < tap.first) return;
      const float weight = rows.weights[tap.weights + in_row - tap.first];
      weigh(sums, pixels, 3 * static_cast<size_t>(in_width), weight, in_row == tap.first);
      if (in_row + 1 < tap.first + tap.count) return;
      average(averaged, sums, columns, width);
      jpeg_write_scanlines(&codec.out, &averaged, 1);
    }
  }

  void finish() {
    jpeg_finish_compress(&codec.out);
    codec.result().height = height;
    codec.result().width = width;
  }
};

constexpr uint32_t ROWS_AT_A_TIME = 16;

// Which samplings TurboJPEG's interface knows, FFCV's decoder: 4:4:4, 4:2:2, 4:2:0, 4:4:0 and 4:1:1.
bool sampling_is_common(const jpeg_decompress_struct &in) {
  if (in.num_components == 1) return true;
  for (int i = 1; i < 3; ++i)
    if (in.comp_info[i].h_samp_factor != 1 || in.comp_info[i].v_samp_factor != 1) return false;
  const int h = in.comp_info[0].h_samp_factor, v = in.comp_info[0].v_samp_factor;
  return (h <= 2 && v <= 2) || (h == 4 && v == 1);
}

}  // namespace

extern "C" {

int codec_interface() { return 1; }

const char *codec_turbo_version() { return TEXT(LIBJPEG_TURBO_VERSION); }

int codec_reencode(const uint8_t *data, size_t size, int max_side, int quality, int h_samp, int v_samp,
                   int restart_rows, CodecResult *result) {
  Codec codec(result);
  return codec.run([&] {
    jpeg_decompress_struct &in = codec.in;
    read_header(codec, data, size);
    in.out_color_space = JCS_RGB;
    jpeg_start_decompress(&in);
    Sink sink{codec, in.image_width, 0, 0, false, {}, {}};
    sink.start(in.image_height, Options{max_side, quality, h_samp, v_samp, restart_rows});
    const size_t stride = 3 * static_cast<size_t>(in.output_width);
    uint8_t *pixels = codec.memory(scratch.rows, ROWS_AT_A_TIME * stride);
    uint8_t *rows[ROWS_AT_A_TIME];
    for (uint32_t i = 0; i < ROWS_AT_A_TIME; ++i) rows[i] = pixels + i * stride;
    while (in.output_scanline < in.output_height) {
      uint32_t count = 0;
      while (count < ROWS_AT_A_TIME && in.output_scanline < in.output_height)
        count += jpeg_read_scanlines(&in, rows + count, ROWS_AT_A_TIME - count);
      sink.write(rows, count);
    }
    jpeg_finish_decompress(&in);
    sink.finish();
  });
}

int codec_encode(const uint8_t *pixels, uint32_t height, uint32_t width, int max_side, int quality, int h_samp,
                 int v_samp, int restart_rows, CodecResult *result) {
  Codec codec(result);
  return codec.run([&] {
    Sink sink{codec, width, 0, 0, false, {}, {}};
    sink.start(height, Options{max_side, quality, h_samp, v_samp, restart_rows});
    for (uint32_t y = 0; y < height; ++y) {
      uint8_t *row = const_cast<uint8_t *>(pixels) + 3 * static_cast<size_t>(width) * y;
      sink.write(&row, 1);
    }
    sink.finish();
  });
}

int codec_keep(const uint8_t *data, size_t size, int max_side, int restart_rows, CodecResult *result) {
  Codec codec(result);
  return codec.run([&] {
    jpeg_decompress_struct &in = codec.in;
    jpeg_compress_struct &out = codec.out;
    read_header(codec, data, size);
    const uint32_t longest = in.image_height > in.image_width ? in.image_height : in.image_width;
    if (max_side != 0 && longest > static_cast<uint32_t>(max_side)) codec.refuse(TOO_LONG, "too long");
    if (!sampling_is_common(in)) codec.refuse(UNSUPPORTED, "unusual chroma sampling");
    jvirt_barray_ptr *coefficients = jpeg_read_coefficients(&in);
    for (int i = 0; i < in.num_components; ++i) {
      const JQUANT_TBL *table = in.comp_info[i].quant_table;
      for (int k = 0; table != nullptr && k < DCTSIZE2; ++k)
        if (table->quantval[k] > 255) codec.refuse(UNSUPPORTED, "16-bit quantization table");
    }
    codec.errors.writing = true;
    jpeg_create_compress(&out);
    out.dest = &codec.destination.base;
    jpeg_copy_critical_parameters(&in, &out);
    out.write_JFIF_header = TRUE;
    out.density_unit = 0;
    out.X_density = out.Y_density = 1;
    for (int i = 0; i < out.num_components; ++i) out.comp_info[i].component_id = i + 1;
    if (out.num_components == 1) out.comp_info[0].h_samp_factor = out.comp_info[0].v_samp_factor = 1;
    out.optimize_coding = getenv("OPT") ? TRUE : FALSE;
    out.restart_in_rows = restart_rows;
    jpeg_write_coefficients(&out, coefficients);
    jpeg_finish_compress(&out);
    codec.errors.writing = false;
    jpeg_finish_decompress(&in);
  });
}

}  // extern "C"
