// Memory that a thread keeps from call to call: fresh memory would cost a fault a page.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>

constexpr size_t LARGE_PAGE = 1 << 21;

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() { free(data); }

  // At least `bytes`, on a boundary of 64, until the next call; what is in it is left over from the last.
  // In large pages where the system has them: rows that lie far apart would need a translation each.
  void* of(size_t bytes) {
    if (bytes > size) {
      free(data);
      size = (bytes + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
      data = aligned_alloc(LARGE_PAGE, size);
      madvise(data, size, MADV_HUGEPAGE);
    }
    return data;
  }

 private:
  void* data = nullptr;
  size_t size = 0;
};
