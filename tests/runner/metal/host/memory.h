// Memory between guard pages: whoever leaves it, however little, faults.
#pragma once

#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <string>
#include <vector>

namespace emulated {

enum class Placement { at_end, at_start };  // where in its pages memory lies: against the guard after or before it

inline size_t page_size() {
  static const size_t size = size_t(sysconf(_SC_PAGESIZE));
  return size;
}

// Reach of the guard on either side: a stray index rarely jumps further, into another buffer.
constexpr size_t wide_guard = size_t(16) << 20;

class Guarded {
  char* map_ = nullptr;
  size_t guard_ = 0, inner_ = 0, size_ = 0, offset_ = 0;
  unsigned char filler_ = 0;
  std::string name_;

 public:
  // Full of zeros.
  Guarded(std::string name, size_t size, size_t guard, Placement placement)
      : guard_(guard), size_(size), name_(std::move(name)) {
    inner_ = (size + page_size() - 1) / page_size() * page_size();
    if (!inner_) inner_ = page_size();
    void* map = mmap(nullptr, total(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED || mprotect(static_cast<char*>(map) + guard_, inner_, PROT_READ | PROT_WRITE)) {
      perror("mmap");
      _exit(3);
    }
    map_ = static_cast<char*>(map);
    // any size ends exactly at the guard; what is a multiple of 16 bytes is aligned to 16 too
    offset_ = guard_ + (placement == Placement::at_end ? inner_ - size : 0);
  }
  // `filler` everywhere, also in what is not used of the pages.
  Guarded(std::string name, size_t size, Placement placement, unsigned char filler)
      : Guarded(std::move(name), size, wide_guard, placement) {
    filler_ = filler;
    memset(map_ + guard_, filler, inner_);
  }
  Guarded(Guarded&& other) noexcept
      : map_(other.map_), guard_(other.guard_), inner_(other.inner_), size_(other.size_), offset_(other.offset_),
        filler_(other.filler_), name_(std::move(other.name_)) {
    other.map_ = nullptr;
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() {
    if (map_) munmap(map_, total());
  }

  size_t total() const { return inner_ + 2 * guard_; }
  char* data() const { return map_ + offset_; }
  size_t size() const { return size_; }
  const std::string& name() const { return name_; }
  void fill() const { memset(data(), filler_, size_); }
  void make_read_only() const { mprotect(map_ + guard_, inner_, PROT_READ); }
  bool owns(const void* address) const {
    const char* at = static_cast<const char*>(address);
    return map_ && at >= map_ && at < map_ + total();
  }
  // Signed distance in bytes of an address from the start.
  long offset_of(const void* address) const { return long(static_cast<const char*>(address) - data()); }
  // Whether something was written beside the memory, in its own pages.
  bool is_frayed() const {
    const char *begin = map_ + guard_, *end = begin + inner_;
    for (const char* at = begin; at < end; ++at) {
      const bool is_own = at >= data() && at < data() + size_;
      if (!is_own && static_cast<unsigned char>(*at) != filler_) return true;
    }
    return false;
  }
};

}  // namespace emulated
