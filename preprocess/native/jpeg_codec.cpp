// Re-encodes JPEGs, encodes pixels as JPEGs, and rewrites JPEGs losslessly, with libjpeg-turbo.
//
//   codec_reencode   a regular baseline JPEG that keeps its size: coefficients -> coefficients of the new quantizers;
//                    any other JPEG: decode -> RGB -> area averaging -> compress, row by row, never with a whole frame
//                    in memory
//   codec_encode     RGB -> area averaging -> compress
//   codec_keep       coefficients -> the same coefficients, with restart markers and without metadata
//
// Every function may be called from any thread, returns a Status, and never prints. CodecResult.data belongs to the
// calling thread and is valid until its next call.

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "area_average.h"
#include "libjpeg_session.h"
#include "requantize.h"
#include "rewrite_baseline.h"

namespace {

uint32_t fit(uint32_t side, uint32_t longest, uint32_t max_side) {
  const uint64_t fitted = (static_cast<uint64_t>(side) * max_side + longest / 2) / longest;
  return fitted == 0 ? 1 : static_cast<uint32_t>(fitted);
}

struct Options {
  int max_side, quality, h_samp, v_samp, restart_rows;
};

bool is_reduced(uint32_t height, uint32_t width, int max_side) {
  return max_side != 0 && (height > width ? height : width) > static_cast<uint32_t>(max_side);
}

void set_parameters(jpeg_compress_struct &out, uint32_t height, uint32_t width, const Options &options) {
  out.image_width = width;
  out.image_height = height;
  out.input_components = 3;
  out.in_color_space = JCS_RGB;
  jpeg_set_defaults(&out);
  jpeg_set_quality(&out, options.quality, TRUE);
  out.comp_info[0].h_samp_factor = options.h_samp;
  out.comp_info[0].v_samp_factor = options.v_samp;
  out.restart_in_rows = options.restart_rows;
}

// Takes rows of RGB from top to bottom, reduces them if necessary and compresses them.
struct Sink {
  Codec &codec;
  uint32_t in_width, width, height;
  bool reduces;
  area::Taps rows, columns;
  float *sums = nullptr;
  uint8_t *averaged = nullptr;
  uint32_t in_row = 0, row = 0;

  void start(uint32_t in_height, const Options &options) {
    const uint32_t longest = in_height > in_width ? in_height : in_width;
    const uint32_t max_side = static_cast<uint32_t>(options.max_side);
    reduces = is_reduced(in_height, in_width, options.max_side);
    width = reduces ? fit(in_width, longest, max_side) : in_width;
    height = reduces ? fit(in_height, longest, max_side) : in_height;
    if (reduces) {
      uint8_t *memory = codec.memory(codec.scratch.row_taps, area::taps_bytes(in_height, height));
      rows = area::make_taps(memory, in_height, height);
      memory = codec.memory(codec.scratch.column_taps, area::taps_bytes(in_width, width));
      columns = area::make_taps(memory, in_width, width);
      const size_t num_sums = 3 * static_cast<size_t>(in_width) + 1;
      sums = reinterpret_cast<float *>(codec.memory(codec.scratch.sums, num_sums * sizeof(float)));
      sums[num_sums - 1] = 0;
      averaged = codec.memory(codec.scratch.averaged, 3 * static_cast<size_t>(width));
    }
    set_parameters(codec.out, height, width, options);
    jpeg_start_compress(&codec.out, TRUE);
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
      const area::Tap tap = rows.taps[row];
      if (in_row < tap.first) return;
      const float weight = rows.weights[tap.weights + in_row - tap.first];
      area::weigh(sums, pixels, 3 * static_cast<size_t>(in_width), weight, in_row == tap.first);
      if (in_row + 1 < tap.first + tap.count) return;
      area::average(averaged, sums, columns, width);
      jpeg_write_scanlines(&codec.out, &averaged, 1);
    }
  }

  void finish() {
    jpeg_finish_compress(&codec.out);
    codec.result.height = height;
    codec.result.width = width;
  }
};

constexpr uint32_t ROWS_AT_A_TIME = 16;

// Whether the sampling is 4:4:4, 4:2:2, 4:2:0, 4:4:0 or 4:1:1: FFCV's decoder, TurboJPEG's interface, has no other.
bool sampling_is_common(const jpeg_decompress_struct &in) {
  if (in.num_components == 1) return true;
  for (int i = 1; i < 3; ++i)
    if (in.comp_info[i].h_samp_factor != 1 || in.comp_info[i].v_samp_factor != 1) return false;
  const int h = in.comp_info[0].h_samp_factor, v = in.comp_info[0].v_samp_factor;
  return (h <= 2 && v <= 2) || (h == 4 && v == 1);
}

// Sets the parameters of codec_keep. The Huffman tables are the standard ones, except that rewrite_baseline keeps those
// of the original. Optimised tables would save 4.7 % of the bytes on 443 ImageNet originals, but they need two passes,
// which takes libjpeg 1.9 times as long.
void keep_parameters(Codec &codec, int restart_rows) {
  jpeg_compress_struct &out = codec.out;
  jpeg_copy_critical_parameters(&codec.in, &out);
  out.write_JFIF_header = TRUE;
  out.density_unit = 0;
  out.X_density = out.Y_density = 1;
  for (int i = 0; i < out.num_components; ++i) out.comp_info[i].component_id = i + 1;
  if (out.num_components == 1) out.comp_info[0].h_samp_factor = out.comp_info[0].v_samp_factor = 1;
  out.restart_in_rows = restart_rows;
}

// Refuses images that a baseline JPEG cannot hold. libjpeg-turbo's SIMD encoder does not check the coefficients and
// writes garbage for them without an error.
void check_coefficients(Codec &codec, jvirt_barray_ptr *coefficients) {
  jpeg_decompress_struct &in = codec.in;
  for (int i = 0; i < in.num_components; ++i) {
    const jpeg_component_info &component = in.comp_info[i];
    for (int k = 0; k < DCTSIZE2; ++k)
      // A decoder smooths the blocks of a progressive image with missing scans, but not those of a baseline image.
      if (in.progressive_mode && in.coef_bits[i][k] != 0)
        codec.refuse(UNSUPPORTED, "progressive with scans missing");
    for (int k = 0; k < DCTSIZE2; ++k)
      if (component.quant_table->quantval[k] > 255) codec.refuse(UNSUPPORTED, "16-bit quantization table");
    for (JDIMENSION row = 0; row < component.height_in_blocks; ++row) {
      const JBLOCKARRAY blocks =
          in.mem->access_virt_barray(reinterpret_cast<j_common_ptr>(&in), coefficients[i], row, 1, FALSE);
      for (JDIMENSION column = 0; column < component.width_in_blocks; ++column) {
        const JCOEF *block = blocks[0][column];
        bool fits = block[0] >= huffman::MIN_DC && block[0] <= huffman::MAX_DC;
        for (int k = 1; k < DCTSIZE2; ++k) fits &= std::abs(block[k]) <= huffman::MAX_AC;
        if (!fits) codec.refuse(UNSUPPORTED, "coefficients beyond 8 bits a sample");
      }
    }
  }
}

}  // namespace

extern "C" {

// The number must change with every change of a function or struct. Python refuses a library with another number.
int codec_interface() { return 4; }

const char *codec_turbo_version() { return TEXT(LIBJPEG_TURBO_VERSION); }

int codec_reencode(const uint8_t *data, size_t size, int max_side, int quality, int h_samp, int v_samp,
                   int restart_rows, CodecResult *result) {
  Codec codec(result);
  return codec.run([&] {
    jpeg_decompress_struct &in = codec.in;
    codec.read_header(data, size);
    const Options options{max_side, quality, h_samp, v_samp, restart_rows};
    codec.start_writing();
    if (!is_reduced(in.image_height, in.image_width, max_side)) {
      set_parameters(codec.out, in.image_height, in.image_width, options);
      Scratch &memory = codec.scratch;
      codec.destination.size = requantize::requantize(in, codec.out, memory.output, memory.unstuffed, memory.planes,
                                                      memory.requantize, memory.not_stuffed);
      if (codec.destination.size != 0) return;
    }
    in.out_color_space = JCS_RGB;
    jpeg_start_decompress(&in);
    libjpeg::check_scans(in, codec.errors);
    Sink sink{codec, in.image_width, 0, 0, false, {}, {}};
    sink.start(in.image_height, options);
    const size_t stride = 3 * static_cast<size_t>(in.output_width);
    uint8_t *pixels = codec.memory(codec.scratch.rows, ROWS_AT_A_TIME * stride);
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
    codec.start_writing();
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
    codec.read_header(data, size);
    if (is_reduced(in.image_height, in.image_width, max_side)) codec.refuse(TOO_LONG, "too long");
    if (!sampling_is_common(in)) codec.refuse(UNSUPPORTED, "unusual chroma sampling");
    codec.start_writing();
    if (!in.progressive_mode && in.comps_in_scan == in.num_components) {
      keep_parameters(codec, restart_rows);
      Scratch &memory = codec.scratch;
      codec.destination.size = rewrite::rewrite_baseline(in, out, memory.output, memory.unstuffed,
                                                          memory.block_starts, memory.rewrite, memory.not_stuffed);
      if (codec.destination.size != 0) return;
    }
    jvirt_barray_ptr *coefficients = jpeg_read_coefficients(&in);
    libjpeg::check_scans(in, codec.errors);
    check_coefficients(codec, coefficients);
    keep_parameters(codec, restart_rows);  // again, because later scans may have defined quantization tables
    jpeg_write_coefficients(&out, coefficients);
    jpeg_finish_compress(&out);
  });
}

}  // extern "C"
