// Memory that a thread reuses from call to call: fresh memory would cost a page fault for each page.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <new>

constexpr size_t LARGE_PAGE = 1 << 21;

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() { free(data); }

  // At least `bytes`, aligned to 64, valid until the next call, with leftover content. Throws std::bad_alloc, so call it
  // outside of parallel regions. In large pages where the system has them: rows that are far apart would need one
  // address translation each.
  char* of(size_t bytes) {
    if (bytes > size) {
      free(data);
      size = 0;
      const size_t rounded = (bytes + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
      data = aligned_alloc(LARGE_PAGE, rounded);
      if (!data) throw std::bad_alloc();
      size = rounded;
      madvise(data, size, MADV_HUGEPAGE);
    }
    return (char*)data;
  }

 private:
  void* data = nullptr;
  size_t size = 0;
};

inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Runs `body`; returns 0, or 1 if there is not enough memory: an exception must not leave an exported function.
template <typename Body>
int32_t guarded(const Body& body) {
  try {
    body();
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
