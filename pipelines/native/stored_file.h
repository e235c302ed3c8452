// Reads images that lie in files of their own, as they were indexed.
//
// A file must still be the one of the index: a regular file of the same size and modification time. It is checked
// before the file is opened, after that, and once more after the last byte was read, so that a file that somebody writes
// meanwhile is found too. The bytes are copied into memory of the thread. Mapping each file would not copy them, but
// every unmapping interrupts all other threads of the process, which costs more than the copy of one image.

#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <system_error>

#include "memory.h"
#include "task.h"

namespace crop {

struct StoredFile {  // a file with an image, as the index knows it
  const char *folder, *name;  // its path is FOLDER/NAME; null for an image that is in memory
  uint64_t offset;            // of the image's first byte
  int64_t size, mtime_ns;     // of the whole file; ANY_TIME is not compared
};

constexpr int64_t ANY_TIME = std::numeric_limits<int64_t>::min();
constexpr size_t LONGEST_PATH = 8192;

inline bool path_of(const StoredFile &file, char (&path)[LONGEST_PATH]) {
  const int length = std::snprintf(path, sizeof path, "%s/%s", file.folder, file.name);
  return length > 0 && static_cast<size_t>(length) < sizeof path;
}

// Writes why the system refuses, as part of a sentence.
inline Status fail_with_error(Message &message, int error) {
  if (error == ENOENT || error == ENOTDIR) {
    std::snprintf(message.text, sizeof message.text, "is not there any more");
  } else {
    std::snprintf(message.text, sizeof message.text, "cannot be read (%s)",
                  std::generic_category().message(error).c_str());
  }
  return NO_FILE;
}

// Returns false, and writes how, if the file is not the one of the index.
inline bool is_unchanged(const struct stat &now, const StoredFile &file, Message &message) {
  if (!S_ISREG(now.st_mode)) {
    std::snprintf(message.text, sizeof message.text, "is not a file of data any more");
  } else if (now.st_size != file.size) {
    std::snprintf(message.text, sizeof message.text, "has changed: %lld bytes instead of %lld",
                  static_cast<long long>(now.st_size), static_cast<long long>(file.size));
  } else if (file.mtime_ns != ANY_TIME &&
             int64_t{now.st_mtim.tv_sec} * 1'000'000'000 + now.st_mtim.tv_nsec != file.mtime_ns) {
    std::snprintf(message.text, sizeof message.text, "has changed: it was written after it was indexed");
  } else {
    return true;
  }
  return false;
}

struct Descriptor {
  const int number;

  explicit Descriptor(int opened) : number(opened) {}
  Descriptor(const Descriptor &) = delete;
  Descriptor &operator=(const Descriptor &) = delete;
  ~Descriptor() {
    if (number >= 0) close(number);
  }
};

// Does not wait for a pipe's writer. The caller has looked at the path before, because opening a device can have
// effects.
inline int open_file(const char *path) { return open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY); }

// Reads the image of `size` bytes into `buffer`. May throw std::bad_alloc. The message is written if the status is not
// OK: the predicate of a sentence about the file, or empty if there is no memory.
inline Status read_stored(const StoredFile &file, size_t size, Memory &buffer, Message &message) {
  char path[LONGEST_PATH];
  if (!path_of(file, path)) return fail_with_error(message, ENAMETOOLONG);
  struct stat now {};
  if (stat(path, &now) != 0) return fail_with_error(message, errno);
  if (!is_unchanged(now, file, message)) return NO_FILE;
  const Descriptor opened(open_file(path));
  if (opened.number < 0 || fstat(opened.number, &now) != 0) return fail_with_error(message, errno);
  if (!is_unchanged(now, file, message)) return NO_FILE;
  if (!buffer.reserve(size)) return NO_MEMORY;
  for (size_t done = 0; done < size;) {
    const ssize_t count =
        pread(opened.number, buffer.data + done, size - done, static_cast<off_t>(file.offset + done));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return fail_with_error(message, errno);
    if (count == 0) break;  // the file has become shorter, which is found below
    done += static_cast<size_t>(count);
  }
  if (fstat(opened.number, &now) != 0) return fail_with_error(message, errno);
  return is_unchanged(now, file, message) ? OK : NO_FILE;
}

// Asks the system to read an image into memory. It is only a hint, so that nothing is reported.
inline void advise_stored(const StoredFile &file, size_t size) {
  char path[LONGEST_PATH];
  struct stat now {};
  Message unused;
  if (!path_of(file, path) || stat(path, &now) != 0 || !is_unchanged(now, file, unused)) return;
  const Descriptor opened(open_file(path));
  if (opened.number >= 0)
    posix_fadvise(opened.number, static_cast<off_t>(file.offset), static_cast<off_t>(size), POSIX_FADV_WILLNEED);
}

}  // namespace crop
