// Guards mapped files against SIGBUS.
//
// Reading a page of a mapped file raises SIGBUS if the file was truncated after it was mapped, or if its disk has
// failed. The default action would end the whole training for one bad file, and decoder threads read the mappings
// directly, so no return value can report the error. The handler maps zeros over the unreadable part, marks the mapping
// as damaged and returns; the read is then repeated and succeeds. Python asks `mapping_is_damaged` and reports the
// file.

#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>

namespace crop {

// The state that the handler reads. It has a fixed size and no locks, because a signal may interrupt any code, also
// code that holds a lock or is inside malloc.
struct MappedFiles {
  static constexpr int LIMIT = 4096;
  static constexpr uintptr_t FREE = 0, TAKEN = 1;  // values of `begin`; no mapping begins at these addresses

  std::atomic<uintptr_t> begin[LIMIT];
  std::atomic<uintptr_t> end[LIMIT];
  std::atomic<bool> damaged[LIMIT];
  std::atomic<bool> passed_on;
  struct sigaction previous;
  uintptr_t page;
};

inline MappedFiles mapped_files;

// Maps zeros from the page of this address to the end of the mapping. Returns false if no guarded file is mapped there.
inline bool put_zeros(uintptr_t address) {
  for (int number = 0; number < MappedFiles::LIMIT; ++number) {
    const uintptr_t begin = mapped_files.begin[number].load(std::memory_order_acquire);
    const uintptr_t end = mapped_files.end[number].load(std::memory_order_relaxed);
    if (begin <= MappedFiles::TAKEN || address < begin || address >= end) continue;
    const uintptr_t first = address / mapped_files.page * mapped_files.page;
    mapped_files.damaged[number].store(true);
    return mmap(reinterpret_cast<void *>(first), end - first, PROT_READ,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) != MAP_FAILED;
  }
  return false;
}

inline void on_bus_error(int number, siginfo_t *info, void *) {
  const int error = errno;
  if (info->si_code > 0 && put_zeros(reinterpret_cast<uintptr_t>(info->si_addr))) {
    errno = error;
    return;  // the processor repeats the read
  }
  // The address is not ours. The previous handler gets the signal when it is raised again. This happens at most once,
  // because two handlers that restore each other would pass the signal back and forth without end.
  if (mapped_files.passed_on.exchange(true)) {
    signal(number, SIG_DFL);
  } else {
    sigaction(number, &mapped_files.previous, nullptr);
  }
  if (info->si_code <= 0) raise(number);  // sent by a process, so it is not raised again by itself
  errno = error;
}

// Installs the handler above, unless it is installed. Returns false if the system refuses.
inline bool handle_bus_errors() {
  struct sigaction now;
  if (sigaction(SIGBUS, nullptr, &now) != 0) return false;
  if ((now.sa_flags & SA_SIGINFO) != 0 && now.sa_sigaction == on_bus_error) return true;
  mapped_files.page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  mapped_files.previous = now;
  struct sigaction ours {};
  ours.sa_sigaction = on_bus_error;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  return sigaction(SIGBUS, &ours, nullptr) == 0;
}

// Guards a mapping and returns its number, or -1 if there are too many or the system refuses. `begin` is stored last,
// with release order: the handler ignores an entry until its other fields are set.
inline int guard_mapping(uintptr_t address, size_t size) {
  if (!handle_bus_errors()) return -1;
  const uintptr_t page = mapped_files.page, end = (address + size + page - 1) / page * page;
  for (int number = 0; number < MappedFiles::LIMIT; ++number) {
    uintptr_t free = MappedFiles::FREE;
    if (!mapped_files.begin[number].compare_exchange_strong(free, MappedFiles::TAKEN)) continue;
    mapped_files.damaged[number].store(false);
    mapped_files.end[number].store(end, std::memory_order_relaxed);
    mapped_files.begin[number].store(address, std::memory_order_release);
    return number;
  }
  return -1;
}

inline bool mapping_is_damaged(int number) { return mapped_files.damaged[number].load(); }

inline void release_mapping(int number) { mapped_files.begin[number].store(MappedFiles::FREE); }

}  // namespace crop
