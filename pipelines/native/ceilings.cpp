// The C interface of ceilings.h, loaded by pipelines/benchmarks/ceilings.py.

#include "ceilings.h"

#ifndef LIBJPEG_TURBO_VERSION
#error "needs libjpeg-turbo"
#endif

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

extern "C" {

int ceilings_interface() { return 1; }

const char *ceilings_turbo_version() { return TEXT(LIBJPEG_TURBO_VERSION); }

size_t ceilings_decode(const uint64_t *addresses, const uint64_t *sizes, size_t count) {
  return ceilings::decode({addresses, sizes, count});
}

size_t ceilings_huffman(const uint64_t *addresses, const uint64_t *sizes, size_t count) {
  return ceilings::huffman({addresses, sizes, count});
}

size_t ceilings_resize(const uint64_t *pixels, const uint32_t *sizes, const uint32_t *boxes, size_t count,
                       uint32_t side) {
  return ceilings::resize(pixels, sizes, boxes, count, side);
}
}
