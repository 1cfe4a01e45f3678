// Metal's functions of numbers. All are as exact as the C library: the fast variants' rounding is not imitated.
// Every function has one overload per type, as in Metal: max(int, uint) is ambiguous. Those of bfloat are MLX's: computed
// in float and rounded.
#pragma once

#include "vectors.h"

namespace metal {

#define EMULATED_UNARY_OF(T, name, function)        \
  inline T name(T x) { return T(function(float(x))); }
#define EMULATED_UNARY(name, function)    \
  EMULATED_UNARY_OF(float, name, function) \
  EMULATED_UNARY_OF(half, name, function) \
  EMULATED_UNARY_OF(bfloat, name, function)
#define EMULATED_FLOAT_FUNCTIONS            \
  EMULATED_UNARY(exp, __builtin_expf)       \
  EMULATED_UNARY(exp2, __builtin_exp2f)     \
  EMULATED_UNARY(log, __builtin_logf)       \
  EMULATED_UNARY(log2, __builtin_log2f)     \
  EMULATED_UNARY(tanh, __builtin_tanhf)     \
  EMULATED_UNARY(sin, __builtin_sinf)       \
  EMULATED_UNARY(cos, __builtin_cosf)       \
  EMULATED_UNARY(sqrt, __builtin_sqrtf)     \
  EMULATED_UNARY(rsqrt, 1.0f / __builtin_sqrtf)
EMULATED_FLOAT_FUNCTIONS
EMULATED_UNARY(fabs, __builtin_fabsf)
EMULATED_UNARY(floor, __builtin_floorf)
EMULATED_UNARY(ceil, __builtin_ceilf)
EMULATED_UNARY(rint, __builtin_rintf)
EMULATED_UNARY(round, __builtin_roundf)
EMULATED_UNARY(trunc, __builtin_truncf)

namespace fast {
EMULATED_FLOAT_FUNCTIONS
}
namespace precise {
EMULATED_FLOAT_FUNCTIONS
}
#undef EMULATED_FLOAT_FUNCTIONS
#undef EMULATED_UNARY
#undef EMULATED_UNARY_OF

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline half fma(half a, half b, half c) { return half(__builtin_fma(double(float(a)), double(float(b)), double(float(c)))); }
inline float pow(float a, float b) { return __builtin_powf(a, b); }
inline float copysign(float a, float b) { return __builtin_copysignf(a, b); }
inline bool isnan(float x) { return x != x; }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return !isnan(x) && !isinf(x); }

// The number if the other is NaN.
#define EMULATED_FLOAT_EXTREMES(T)                                            \
  inline T fmax(T a, T b) { return isnan(a) || a < b ? b : a; }               \
  inline T fmin(T a, T b) { return isnan(a) || b < a ? b : a; }               \
  inline T max(T a, T b) { return fmax(a, b); }                               \
  inline T min(T a, T b) { return fmin(a, b); }                               \
  inline T abs(T x) { return fabs(x); }
EMULATED_FLOAT_EXTREMES(float)
EMULATED_FLOAT_EXTREMES(half)
EMULATED_FLOAT_EXTREMES(bfloat)
#undef EMULATED_FLOAT_EXTREMES

#define EMULATED_INTEGER_EXTREMES(T)                        \
  inline constexpr T max(T a, T b) { return a < b ? b : a; } \
  inline constexpr T min(T a, T b) { return b < a ? b : a; }
EMULATED_INTEGER_EXTREMES(char)
EMULATED_INTEGER_EXTREMES(uchar)
EMULATED_INTEGER_EXTREMES(short)
EMULATED_INTEGER_EXTREMES(ushort)
EMULATED_INTEGER_EXTREMES(int)
EMULATED_INTEGER_EXTREMES(uint)
EMULATED_INTEGER_EXTREMES(long)
EMULATED_INTEGER_EXTREMES(ulong)
EMULATED_INTEGER_EXTREMES(long long)
EMULATED_INTEGER_EXTREMES(unsigned long long)
#undef EMULATED_INTEGER_EXTREMES
inline int abs(int x) { return x < 0 ? -x : x; }
inline uint popcount(uint x) { return uint(__builtin_popcount(x)); }
inline uint clz(uint x) { return x ? uint(__builtin_clz(x)) : 32u; }
inline uint ctz(uint x) { return x ? uint(__builtin_ctz(x)) : 32u; }

// `low` > `high` is undefined in Metal.
template <class T>
T clamp(T x, T low, T high) {
  if (low > high) ::emulated::fail("clamp: the lower bound is above the upper");
  return min(max(x, low), high);
}
// b where the condition holds
template <class T>
constexpr T select(T a, T b, bool condition) {
  return condition ? b : a;
}

#define EMULATED_VECTOR_UNARY(name)                    \
  template <class T, int N>                            \
  vec<T, N> name(vec<T, N> v) {                        \
    for (int i = 0; i < N; ++i) v[i] = name(v[i]);     \
    return v;                                          \
  }
#define EMULATED_VECTOR_BINARY(name)                              \
  template <class T, int N>                                       \
  vec<T, N> name(vec<T, N> a, const vec<T, N>& b) {               \
    for (int i = 0; i < N; ++i) a[i] = name(a[i], b[i]);          \
    return a;                                                     \
  }
EMULATED_VECTOR_UNARY(exp)
EMULATED_VECTOR_UNARY(exp2)
EMULATED_VECTOR_UNARY(log)
EMULATED_VECTOR_UNARY(tanh)
EMULATED_VECTOR_UNARY(fabs)
EMULATED_VECTOR_BINARY(max)
EMULATED_VECTOR_BINARY(min)
EMULATED_VECTOR_BINARY(fmax)
EMULATED_VECTOR_BINARY(fmin)
#undef EMULATED_VECTOR_UNARY
#undef EMULATED_VECTOR_BINARY
template <class T, int N>
vec<T, N> fma(vec<T, N> a, const vec<T, N>& b, const vec<T, N>& c) {
  for (int i = 0; i < N; ++i) a[i] = fma(a[i], b[i], c[i]);
  return a;
}

}  // namespace metal
