// Address spaces as types: a pointer to `device` memory does not convert to one to `threadgroup` memory. A pointer to
// `thread` memory is a plain C++ pointer.
#pragma once

#include "runtime.h"

namespace emulated {

struct device;
struct constant;
struct threadgroup;

template <bool C, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  using type = T;
};
template <bool C, class T = void>
using enable_if_t = typename enable_if<C, T>::type;

template <class From, class To>
struct is_convertible {
  static char test(To);
  static long test(...);
  static const bool value = sizeof(test(From())) == sizeof(char);
};

template <class Space, class T>
class pointer {
  T* at_;

 public:
  pointer() = default;
  constexpr pointer(decltype(nullptr)) : at_(nullptr) {}
  static constexpr pointer to(T* raw) { return pointer(raw, 0); }
  template <class U, class = enable_if_t<is_convertible<U*, T*>::value>>
  constexpr pointer(pointer<Space, U> other) : at_(other.raw()) {}
  // a cast in the kernel's text
  template <class U, class = enable_if_t<!is_convertible<U*, T*>::value>, class = void>
  explicit pointer(pointer<Space, U> other) : at_((T*)other.raw()) {}

  constexpr T* raw() const { return at_; }
  T& operator*() const { return *at_; }
  T* operator->() const { return at_; }
  template <class I>
  T& operator[](I index) const {
    return at_[index];
  }
  explicit operator bool() const { return at_ != nullptr; }

  template <class I>
  pointer operator+(I count) const {
    return to(at_ + count);
  }
  template <class I>
  friend pointer operator+(I count, pointer p) {
    return to(p.at_ + count);
  }
  template <class I, class = enable_if_t<is_convertible<I, long>::value>>
  pointer operator-(I count) const {
    return to(at_ - count);
  }
  long operator-(pointer other) const { return at_ - other.at_; }
  template <class I>
  pointer& operator+=(I count) {
    at_ += count;
    return *this;
  }
  template <class I>
  pointer& operator-=(I count) {
    at_ -= count;
    return *this;
  }
  pointer& operator++() { return *this += 1; }
  pointer& operator--() { return *this -= 1; }
  pointer operator++(int) {
    pointer old = *this;
    ++at_;
    return old;
  }
  pointer operator--(int) {
    pointer old = *this;
    --at_;
    return old;
  }
  friend bool operator==(pointer a, pointer b) { return a.at_ == b.at_; }
  friend bool operator!=(pointer a, pointer b) { return a.at_ != b.at_; }
  friend bool operator<(pointer a, pointer b) { return a.at_ < b.at_; }
  friend bool operator>(pointer a, pointer b) { return a.at_ > b.at_; }
  friend bool operator<=(pointer a, pointer b) { return a.at_ <= b.at_; }
  friend bool operator>=(pointer a, pointer b) { return a.at_ >= b.at_; }

 private:
  constexpr pointer(T* raw, int) : at_(raw) {}
};

// An array in threadgroup memory. Every index is checked, of every dimension.
template <class T>
class shared_array;
template <class T, size_t N>
class shared_array<T[N]> {
  T (*at_)[N];
  const char* name_;

 public:
  shared_array(T (*at)[N], const char* name) : at_(at), name_(name) {}
  template <class I>
  T& operator[](I index) const {
    if (size_t(index) >= N) fail("index %ld of threadgroup array '%s' of %zu", long(index), name_, N);
    return (*at_)[index];
  }
  operator pointer<threadgroup, T>() const { return pointer<threadgroup, T>::to(*at_); }
  operator pointer<threadgroup, const T>() const { return pointer<threadgroup, const T>::to(*at_); }
  template <class U>
  explicit operator pointer<threadgroup, U>() const {
    return pointer<threadgroup, U>::to((U*)*at_);
  }
  template <class I>
  pointer<threadgroup, T> operator+(I count) const {
    return pointer<threadgroup, T>::to(*at_ + count);
  }
  T& operator*() const { return **at_; }
};
template <class T, size_t M, size_t N>
class shared_array<T[N][M]> {
  T (*at_)[N][M];
  const char* name_;

 public:
  shared_array(T (*at)[N][M], const char* name) : at_(at), name_(name) {}
  template <class I>
  shared_array<T[M]> operator[](I index) const {
    if (size_t(index) >= N) fail("index %ld of threadgroup array '%s' of %zu", long(index), name_, N);
    return shared_array<T[M]>(&(*at_)[index], name_);
  }
};

template <class T>
struct shared_variable {
  using type = T&;
  static type make(void* at, const char*) { return *(T*)at; }
};
template <class T, size_t N>
struct shared_variable<T[N]> {
  using type = shared_array<T[N]>;
  static type make(void* at, const char* name) { return type((T(*)[N])at, name); }
};

template <class T>
typename shared_variable<T>::type shared(int variable, const char* name) {
  return shared_variable<T>::make(shared_memory(variable, name, sizeof(T), alignof(T)), name);
}

// `&array[index]` keeps its address space.
template <class T, class I>
T* address(T* array, I index) {
  return array + index;
}
template <class S, class T, class I>
pointer<S, T> address(pointer<S, T> array, I index) {
  return array + index;
}
template <class T, class I>
pointer<threadgroup, T> address(shared_array<T> array, I index) = delete;
template <class T, size_t N, class I>
pointer<threadgroup, T> address(shared_array<T[N]> array, I index) {
  return array + index;
}

// reinterpret_cast, which C++ refuses to classes
template <class To>
struct recast_to;
template <class S, class T>
struct recast_to<pointer<S, T>> {
  template <class U>
  static pointer<S, T> from(pointer<S, U> p) {
    return pointer<S, T>(p);
  }
  template <class U, size_t N>
  static pointer<S, T> from(shared_array<U[N]> p) {
    return pointer<S, T>(p);
  }
};
template <class T>
struct recast_to<T*> {
  template <class U>
  static T* from(U* p) {
    return reinterpret_cast<T*>(p);
  }
};
template <class T>
struct recast_to<T&> {
  template <class U>
  static T& from(U& value) {
    return reinterpret_cast<T&>(value);
  }
};
template <class To, class From>
To recast(From&& from) {
  return recast_to<To>::from(from);
}

// An argument of the kernel: becomes whatever pointer or reference the parameter is.
class buffer {
  void* at_;

 public:
  explicit buffer(void* at) : at_(at) {}
  template <class S, class T>
  operator pointer<S, T>() const {
    return pointer<S, T>::to((T*)at_);
  }
  template <class T>
  operator T&() const {
    return *(T*)at_;
  }
};

}  // namespace emulated
