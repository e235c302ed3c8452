// Mapped files that are cut while they are read: zeros in place of what is gone, and a mark, instead of SIGBUS.

#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>

namespace crop {

// What the handler reads: fixed and without locks, because a signal may come anywhere.
struct MappedFiles {
  static constexpr int LIMIT = 4096;
  static constexpr uintptr_t FREE = 0, TAKEN = 1;  // of `begin`: no mapping begins at these addresses

  std::atomic<uintptr_t> begin[LIMIT];
  std::atomic<uintptr_t> end[LIMIT];
  std::atomic<bool> damaged[LIMIT];
  std::atomic<bool> passed_on;
  struct sigaction before;
  uintptr_t page;
};

inline MappedFiles mapped_files;

// From the page of this address to the end of the file that is mapped there: zeros. False where none is.
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
    return;  // the read is tried again
  }
  // Not ours: whoever was asked before gets it when it comes again, at most once, so that two cannot pass it to and fro.
  if (mapped_files.passed_on.exchange(true)) {
    signal(number, SIG_DFL);
  } else {
    sigaction(number, &mapped_files.before, nullptr);
  }
  if (info->si_code <= 0) raise(number);  // sent by a process: it does not come again by itself
  errno = error;
}

// Makes the handler above the process's, where another one has been put in its place since. False where the system refuses.
inline bool handle_bus_errors() {
  struct sigaction now;
  if (sigaction(SIGBUS, nullptr, &now) != 0) return false;
  if ((now.sa_flags & SA_SIGINFO) != 0 && now.sa_sigaction == on_bus_error) return true;
  mapped_files.page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  mapped_files.before = now;
  struct sigaction ours {};
  ours.sa_sigaction = on_bus_error;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  return sigaction(SIGBUS, &ours, nullptr) == 0;
}

// Returns the number of the mapping, or -1 where there are too many or the system refuses.
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
