// Collective operations. Where Metal says "undefined", the run ends with a message.
#pragma once

#include "maths.h"

namespace emulated {

template <class T>
struct is_simd_type {
  static const bool value = sizeof(T) <= 4;
};
template <>
struct is_simd_type<bool> {
  static const bool value = false;
};
template <class T, int N>
struct is_simd_type<::metal::vec<T, N>> {
  static const bool value = is_simd_type<T>::value;
};

template <class T>
T value_of(const Exchange& exchange, unsigned lane) {
  T value;
  __builtin_memcpy(&value, exchange.values[lane], sizeof(T));
  return value;
}

template <class T>
T shuffled(const char* name, int line, long argument, T value, unsigned from) {
  static_assert(is_simd_type<T>::value, "a SIMD function takes numbers of up to 32 bits and vectors of them");
  const Exchange& exchange = meet(name, line, argument, &value, sizeof(T));
  if (from >= lane_count()) fail("%s (line %d) reads lane %u of a SIMD group of %u", name, line, from, lane_count());
  return value_of<T>(exchange, from);
}

// The same value in every lane, joined in the order of a butterfly.
template <class T, class Join>
T reduced(const char* name, int line, T value, Join join) {
  static_assert(is_simd_type<T>::value, "a SIMD function takes numbers of up to 32 bits and vectors of them");
  Exchange& exchange = meet(name, line, 0, &value, sizeof(T));
  if (!exchange.has_result) {
    const unsigned count = lane_count();
    T values[lanes_per_simdgroup];
    for (unsigned i = 0; i < count; ++i) values[i] = value_of<T>(exchange, i);
    for (unsigned step = 1; step < count; step *= 2) {
      for (unsigned i = 0; i + step < count; i += 2 * step) values[i] = join(values[i], values[i + step]);
    }
    __builtin_memcpy(exchange.result, &values[0], sizeof(T));
    exchange.has_result = true;
  }
  __builtin_memcpy(&value, exchange.result, sizeof(T));
  return value;
}

}  // namespace emulated

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
inline constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }

inline void threadgroup_barrier(mem_flags, int line = __builtin_LINE()) {
  ::emulated::meet_all("threadgroup_barrier", line);
}
inline void simdgroup_barrier(mem_flags, int line = __builtin_LINE()) {
  ::emulated::meet("simdgroup_barrier", line, 0, nullptr, 0);
}

template <class T>
T simd_shuffle(T value, ushort lane, int line = __builtin_LINE()) {
  return ::emulated::shuffled("simd_shuffle", line, 0, value, lane);
}
template <class T>
T simd_shuffle_xor(T value, ushort mask, int line = __builtin_LINE()) {
  return ::emulated::shuffled("simd_shuffle_xor", line, mask, value, ::emulated::lane_index() ^ mask);
}
template <class T>
T simd_broadcast(T value, ushort lane, int line = __builtin_LINE()) {
  return ::emulated::shuffled("simd_broadcast", line, lane, value, lane);
}
template <class T>
T simd_broadcast_first(T value, int line = __builtin_LINE()) {
  return ::emulated::shuffled("simd_broadcast_first", line, 0, value, 0);
}
// Does not wrap: the upper (lower) lanes keep their own value.
template <class T>
T simd_shuffle_down(T value, ushort delta, int line = __builtin_LINE()) {
  const unsigned lane = ::emulated::lane_index(), from = lane + delta;
  return ::emulated::shuffled("simd_shuffle_down", line, delta, value, from < ::emulated::lane_count() ? from : lane);
}
template <class T>
T simd_shuffle_up(T value, ushort delta, int line = __builtin_LINE()) {
  const unsigned lane = ::emulated::lane_index();
  return ::emulated::shuffled("simd_shuffle_up", line, delta, value, lane >= delta ? lane - delta : lane);
}

template <class T>
T simd_sum(T value, int line = __builtin_LINE()) {
  return ::emulated::reduced("simd_sum", line, value, [](T a, T b) { return T(a + b); });
}
template <class T>
T simd_max(T value, int line = __builtin_LINE()) {
  return ::emulated::reduced("simd_max", line, value, [](T a, T b) { return T(max(a, b)); });
}
template <class T>
T simd_min(T value, int line = __builtin_LINE()) {
  return ::emulated::reduced("simd_min", line, value, [](T a, T b) { return T(min(a, b)); });
}
inline bool simd_any(bool value, int line = __builtin_LINE()) {
  return ::emulated::reduced("simd_any", line, uint(value), [](uint a, uint b) { return a | b; });
}
inline bool simd_all(bool value, int line = __builtin_LINE()) {
  return ::emulated::reduced("simd_all", line, uint(value), [](uint a, uint b) { return a & b; });
}

}  // namespace metal
