// The border between a kernel and the emulator that runs it.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace emulated {

// What the thread attributes of a kernel's parameters are filled with.
struct Attributes {
  unsigned position_in_grid[3], position_in_threadgroup[3], threadgroup_position[3];
  unsigned threads_per_grid[3], threads_per_threadgroup[3], dispatch_threads_per_threadgroup[3], threadgroups_per_grid[3];
  unsigned index_in_threadgroup, index_in_simdgroup, simdgroup_index, simdgroups_per_threadgroup;
  unsigned dispatch_simdgroups_per_threadgroup;
};

constexpr unsigned lanes_per_simdgroup = 32;
constexpr size_t largest_value = 32;  // bytes that a lane may show to its SIMD group: a vector of four 64-bit numbers

// A collective operation under way: what every lane of the SIMD group brought to it.
struct Exchange {
  alignas(32) unsigned char values[lanes_per_simdgroup][largest_value];
  alignas(32) unsigned char result[largest_value];  // computed by the first lane that needs it
  bool has_result;
};

// Suspends the calling lane until every lane of its SIMD group has come to the same operation (same name, line and
// argument); anything else ends the run with a message.
Exchange& meet(const char* operation, int line, long argument, const void* value, size_t size);
// Suspends the calling thread until every thread of the threadgroup has come to the same barrier.
void meet_all(const char* operation, int line);

unsigned lane_index();
unsigned lane_count();  // of this SIMD group: fewer than 32 in the last one of an odd threadgroup

// The memory of a threadgroup variable, full of garbage when the threadgroup starts.
void* shared_memory(int variable, const char* name, size_t size, size_t alignment);

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Defined by the translated text: calls the kernel on the current thread.
extern const int num_arguments;
void call_kernel(void* const* buffers, const Attributes& attributes);

}  // namespace emulated
