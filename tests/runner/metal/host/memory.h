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

class Guarded {
  char* map_ = nullptr;
  size_t inner_ = 0, size_ = 0, offset_ = 0;
  unsigned char filler_ = 0;
  std::string name_;

 public:
  // Zeros.
  Guarded(std::string name, size_t size, Placement placement) : size_(size), name_(std::move(name)) {
    inner_ = (size + page_size() - 1) / page_size() * page_size();
    if (!inner_) inner_ = page_size();
    const size_t total = inner_ + 2 * page_size();
    void* map = mmap(nullptr, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED || mprotect(static_cast<char*>(map) + page_size(), inner_, PROT_READ | PROT_WRITE)) {
      perror("mmap");
      _exit(3);
    }
    map_ = static_cast<char*>(map);
    // any size ends exactly at the guard; what is a multiple of 16 bytes is aligned to 16 too
    offset_ = page_size() + (placement == Placement::at_end ? inner_ - size : 0);
  }
  // `filler` everywhere, also in what is not used of the pages.
  Guarded(std::string name, size_t size, Placement placement, unsigned char filler)
      : Guarded(std::move(name), size, placement) {
    filler_ = filler;
    memset(map_ + page_size(), filler, inner_);
  }
  Guarded(Guarded&& other) noexcept
      : map_(other.map_), inner_(other.inner_), size_(other.size_), offset_(other.offset_), filler_(other.filler_),
        name_(std::move(other.name_)) {
    other.map_ = nullptr;
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() {
    if (map_) munmap(map_, inner_ + 2 * page_size());
  }

  char* data() const { return map_ + offset_; }
  size_t size() const { return size_; }
  const std::string& name() const { return name_; }
  void fill() const { memset(data(), filler_, size_); }
  void make_read_only() const { mprotect(map_ + page_size(), inner_, PROT_READ); }
  bool owns(const void* address) const {
    const char* at = static_cast<const char*>(address);
    return map_ && at >= map_ && at < map_ + inner_ + 2 * page_size();
  }
  // Signed distance in bytes of an address from the start.
  long offset_of(const void* address) const { return long(static_cast<const char*>(address) - data()); }
  // Whether something was written beside the memory, in its own pages.
  bool is_frayed() const {
    for (char* at = map_ + page_size(); at < map_ + page_size() + inner_; ++at) {
      if (at == data()) at += size_;
      if (at >= map_ + page_size() + inner_) break;
      if (static_cast<unsigned char>(*at) != filler_) return true;
    }
    return false;
  }
};

}  // namespace emulated
