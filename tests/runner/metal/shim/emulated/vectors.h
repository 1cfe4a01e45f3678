// metal::vec<T, N> and its names. Vectors convert to each other by constructors only, scalars to vectors by themselves.
#pragma once

#include "numbers.h"

namespace metal {

template <class T, int N>
struct vec;

}  // namespace metal

namespace emulated {

template <class T, int N>
struct vector_alignment {
  static const size_t value = sizeof(T) * (N == 3 ? 4 : N);
};

}  // namespace emulated

namespace metal {

#define EMULATED_VECTOR_MEMBERS(N)                                              \
  vec() = default;                                                              \
  template <class I>                                                            \
  T& operator[](I index) {                                                      \
    if (size_t(index) >= N) ::emulated::fail("component %ld of a vector of %d", long(index), N); \
    return (&x)[index];                                                         \
  }                                                                             \
  template <class I>                                                            \
  const T& operator[](I index) const {                                          \
    return const_cast<vec&>(*this)[index];                                      \
  }

template <class T>
struct alignas(::emulated::vector_alignment<T, 2>::value) vec<T, 2> {
  T x, y;
  EMULATED_VECTOR_MEMBERS(2)
  constexpr vec(T all) : x(all), y(all) {}
  constexpr vec(T a, T b) : x(a), y(b) {}
  template <class U>
  constexpr explicit vec(const vec<U, 2>& v) : x(T(v.x)), y(T(v.y)) {}
};

template <class T>
struct alignas(::emulated::vector_alignment<T, 3>::value) vec<T, 3> {
  T x, y, z;
  EMULATED_VECTOR_MEMBERS(3)
  constexpr vec(T all) : x(all), y(all), z(all) {}
  constexpr vec(T a, T b, T c) : x(a), y(b), z(c) {}
  constexpr vec(const vec<T, 2>& a, T b) : x(a.x), y(a.y), z(b) {}
  template <class U>
  constexpr explicit vec(const vec<U, 3>& v) : x(T(v.x)), y(T(v.y)), z(T(v.z)) {}
};

template <class T>
struct alignas(::emulated::vector_alignment<T, 4>::value) vec<T, 4> {
  T x, y, z, w;
  EMULATED_VECTOR_MEMBERS(4)
  constexpr vec(T all) : x(all), y(all), z(all), w(all) {}
  constexpr vec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
  constexpr vec(const vec<T, 3>& a, T b) : x(a.x), y(a.y), z(a.z), w(b) {}
  constexpr vec(const vec<T, 2>& a, T b, T c) : x(a.x), y(a.y), z(b), w(c) {}
  constexpr vec(const vec<T, 2>& a, const vec<T, 2>& b) : x(a.x), y(a.y), z(b.x), w(b.y) {}
  template <class U>
  constexpr explicit vec(const vec<U, 4>& v) : x(T(v.x)), y(T(v.y)), z(T(v.z)), w(T(v.w)) {}
};
#undef EMULATED_VECTOR_MEMBERS

#define EMULATED_VECTOR_OPERATOR(op)                                                              \
  template <class T, int N>                                                                       \
  vec<T, N> operator op(vec<T, N> a, const vec<T, N>& b) {                                        \
    for (int i = 0; i < N; ++i) a[i] = T(a[i] op b[i]);                                           \
    return a;                                                                                     \
  }                                                                                               \
  template <class T, int N, class S, class = ::emulated::enable_if_t<::emulated::is_convertible<S, T>::value>> \
  vec<T, N> operator op(vec<T, N> a, S b) {                                                       \
    return a op vec<T, N>(T(b));                                                                  \
  }                                                                                               \
  template <class T, int N, class S, class = ::emulated::enable_if_t<::emulated::is_convertible<S, T>::value>> \
  vec<T, N> operator op(S a, vec<T, N> b) {                                                       \
    return vec<T, N>(T(a)) op b;                                                                  \
  }                                                                                               \
  template <class T, int N, class S>                                                              \
  vec<T, N>& operator op##=(vec<T, N>& a, const S& b) {                                           \
    return a = a op b;                                                                            \
  }
EMULATED_VECTOR_OPERATOR(+)
EMULATED_VECTOR_OPERATOR(-)
EMULATED_VECTOR_OPERATOR(*)
EMULATED_VECTOR_OPERATOR(/)
EMULATED_VECTOR_OPERATOR(&)
EMULATED_VECTOR_OPERATOR(|)
EMULATED_VECTOR_OPERATOR(^)
EMULATED_VECTOR_OPERATOR(<<)
EMULATED_VECTOR_OPERATOR(>>)
#undef EMULATED_VECTOR_OPERATOR

template <class T, int N>
vec<T, N> operator-(vec<T, N> a) {
  for (int i = 0; i < N; ++i) a[i] = -a[i];
  return a;
}

#define EMULATED_VECTOR_COMPARISON(op)                              \
  template <class T, int N>                                         \
  vec<bool, N> operator op(const vec<T, N>& a, const vec<T, N>& b) { \
    vec<bool, N> result;                                            \
    for (int i = 0; i < N; ++i) result[i] = a[i] op b[i];           \
    return result;                                                  \
  }
EMULATED_VECTOR_COMPARISON(==)
EMULATED_VECTOR_COMPARISON(!=)
EMULATED_VECTOR_COMPARISON(<)
EMULATED_VECTOR_COMPARISON(>)
EMULATED_VECTOR_COMPARISON(<=)
EMULATED_VECTOR_COMPARISON(>=)
#undef EMULATED_VECTOR_COMPARISON

template <int N>
bool all(const vec<bool, N>& v) {
  bool result = true;
  for (int i = 0; i < N; ++i) result = result && v[i];
  return result;
}
template <int N>
bool any(const vec<bool, N>& v) {
  bool result = false;
  for (int i = 0; i < N; ++i) result = result || v[i];
  return result;
}
template <class T, int N>
T dot(const vec<T, N>& a, const vec<T, N>& b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; ++i) sum += a[i] * b[i];
  return sum;
}

}  // namespace metal

#define EMULATED_VECTOR_NAMES(T)      \
  using T##2 = ::metal::vec<T, 2>;    \
  using T##3 = ::metal::vec<T, 3>;    \
  using T##4 = ::metal::vec<T, 4>;
EMULATED_VECTOR_NAMES(bool)
EMULATED_VECTOR_NAMES(char)
EMULATED_VECTOR_NAMES(uchar)
EMULATED_VECTOR_NAMES(short)
EMULATED_VECTOR_NAMES(ushort)
EMULATED_VECTOR_NAMES(int)
EMULATED_VECTOR_NAMES(uint)
EMULATED_VECTOR_NAMES(long)
EMULATED_VECTOR_NAMES(ulong)
EMULATED_VECTOR_NAMES(half)
EMULATED_VECTOR_NAMES(float)
EMULATED_VECTOR_NAMES(bfloat)
#undef EMULATED_VECTOR_NAMES
