// Metal's scalar types. `half` is the compiler's own where there is one. `bfloat` converts to float by itself and from
// float only where the text says so (Metal Shading Language 3.1, "Scalar Data Types").
#pragma once

#include "spaces.h"

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;

namespace emulated {

template <class To, class From>
inline constexpr To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  return __builtin_bit_cast(To, from);
}

template <class T>
struct is_integer {
  static const bool value = false;
};
#define EMULATED_INTEGER(T) \
  template <>               \
  struct is_integer<T> {    \
    static const bool value = true; \
  };
EMULATED_INTEGER(bool)
EMULATED_INTEGER(char)
EMULATED_INTEGER(signed char)
EMULATED_INTEGER(uchar)
EMULATED_INTEGER(short)
EMULATED_INTEGER(ushort)
EMULATED_INTEGER(int)
EMULATED_INTEGER(uint)
EMULATED_INTEGER(long)
EMULATED_INTEGER(ulong)
EMULATED_INTEGER(long long)
EMULATED_INTEGER(unsigned long long)
#undef EMULATED_INTEGER

// The upper half of a float, rounded to nearest, ties to even.
struct bfloat_format {
  static constexpr uint16_t pack(float value) {
    const uint32_t bits = bits_as<uint32_t>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
  }
  static constexpr float unpack(uint16_t bits) { return bits_as<float>(uint32_t(bits) << 16); }
};

// IEEE binary16, rounded to nearest, ties to even.
struct half_format {
  static constexpr uint16_t pack(float value) {
    const uint32_t bits = bits_as<uint32_t>(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return uint16_t(sign | 0x7e00u | (bits >> 13 & 0x1ffu));
    if (size >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
    if (size < 0x33000000u) return uint16_t(sign);
    const int exponent = int(size >> 23) - 127;
    const int drop = exponent < -14 ? 13 + (-14 - exponent) : 13;  // low bits that do not fit
    const uint32_t mantissa = (size & 0x7fffffu) | 0x800000u;
    const uint32_t odd = mantissa >> drop & 1;
    const uint32_t rounded = (mantissa + (1u << (drop - 1)) - 1 + odd) >> drop;
    const uint32_t base = exponent < -14 ? 0 : uint32_t(exponent + 14) << 10;
    return uint16_t(sign | (base + rounded));
  }
  static constexpr float unpack(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000u) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3ffu;
    if (exponent == 31) return bits_as<float>(sign | 0x7f800000u | mantissa << 13);
    if (exponent) return bits_as<float>(sign | (exponent + 112) << 23 | mantissa << 13);
    const float size = float(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -size : size;
  }
};

template <class T>
struct is_number : is_integer<T> {};
template <>
struct is_number<float> {
  static const bool value = true;
};

// Integers and floats become a half without a cast; nothing becomes a bfloat without one.
template <class Format, bool ImplicitFromNumbers>
class small_float {
  uint16_t bits_;

 public:
  small_float() = default;
  template <class N, bool I = ImplicitFromNumbers, class = enable_if_t<I && is_number<N>::value>>
  constexpr small_float(N value) : bits_(Format::pack(float(value))) {}
  template <class N, bool I = ImplicitFromNumbers, class = enable_if_t<!(I && is_number<N>::value)>, class = void>
  constexpr explicit small_float(N value) : bits_(Format::pack(float(value))) {}
  constexpr operator float() const { return Format::unpack(bits_); }

  friend constexpr small_float operator+(small_float a, small_float b) { return small_float(float(a) + float(b)); }
  friend constexpr small_float operator-(small_float a, small_float b) { return small_float(float(a) - float(b)); }
  friend constexpr small_float operator*(small_float a, small_float b) { return small_float(float(a) * float(b)); }
  friend constexpr small_float operator/(small_float a, small_float b) { return small_float(float(a) / float(b)); }
  constexpr small_float operator-() const { return small_float(-float(*this)); }
  small_float& operator+=(small_float b) { return *this = *this + b; }
  small_float& operator-=(small_float b) { return *this = *this - b; }
  small_float& operator*=(small_float b) { return *this = *this * b; }
  small_float& operator/=(small_float b) { return *this = *this / b; }
};

// With an integer the result is of the small type, with a float it is a float.
#define EMULATED_OPERATOR(op)                                                                                     \
  template <class F, bool I, class N, class = enable_if_t<is_integer<N>::value>>                                  \
  constexpr small_float<F, I> operator op(small_float<F, I> a, N b) {                                             \
    return a op small_float<F, I>(float(b));                                                                      \
  }                                                                                                               \
  template <class F, bool I, class N, class = enable_if_t<is_integer<N>::value>>                                  \
  constexpr small_float<F, I> operator op(N a, small_float<F, I> b) {                                             \
    return small_float<F, I>(float(a)) op b;                                                                      \
  }                                                                                                               \
  template <class F, bool I>                                                                                      \
  constexpr float operator op(small_float<F, I> a, float b) {                                                     \
    return float(a) op b;                                                                                         \
  }                                                                                                               \
  template <class F, bool I>                                                                                      \
  constexpr float operator op(float a, small_float<F, I> b) {                                                     \
    return a op float(b);                                                                                         \
  }
EMULATED_OPERATOR(+)
EMULATED_OPERATOR(-)
EMULATED_OPERATOR(*)
EMULATED_OPERATOR(/)
#undef EMULATED_OPERATOR

#define EMULATED_COMPARISON(op)                                                                                   \
  template <class F, bool I, class N>                                                                             \
  constexpr bool operator op(small_float<F, I> a, N b) {                                                          \
    return float(a) op float(b);                                                                                  \
  }                                                                                                               \
  template <class F, bool I, class N, class = enable_if_t<is_integer<N>::value>>                                  \
  constexpr bool operator op(N a, small_float<F, I> b) {                                                          \
    return float(a) op float(b);                                                                                  \
  }                                                                                                               \
  template <class F, bool I>                                                                                      \
  constexpr bool operator op(float a, small_float<F, I> b) {                                                      \
    return a op float(b);                                                                                         \
  }
EMULATED_COMPARISON(==)
EMULATED_COMPARISON(!=)
EMULATED_COMPARISON(<)
EMULATED_COMPARISON(>)
EMULATED_COMPARISON(<=)
EMULATED_COMPARISON(>=)
#undef EMULATED_COMPARISON

}  // namespace emulated

using bfloat = emulated::small_float<emulated::bfloat_format, false>;
#if defined(__FLT16_MAX__) && (defined(__clang__) || defined(__x86_64__) || __GNUC__ >= 13)
using half = _Float16;
#else
using half = emulated::small_float<emulated::half_format, true>;
#endif
static_assert(sizeof(half) == 2 && sizeof(bfloat) == 2, "16-bit types");

// What MLX's own prelude adds in front of every kernel.
using bfloat16_t = bfloat;
using float16_t = half;

template <class To, class From>
constexpr To as_type(const From& from) {
  return emulated::bits_as<To>(from);
}

namespace metal {

using ::as_type;

template <class T>
struct numeric_limits;

#define EMULATED_INTEGER_LIMITS(T, lowest_value, highest_value)     \
  template <>                                                       \
  struct numeric_limits<T> {                                        \
    static constexpr T min() { return lowest_value; }               \
    static constexpr T lowest() { return lowest_value; }            \
    static constexpr T max() { return highest_value; }              \
  };
EMULATED_INTEGER_LIMITS(int8_t, -128, 127)
EMULATED_INTEGER_LIMITS(uint8_t, 0, 255)
EMULATED_INTEGER_LIMITS(int16_t, -32768, 32767)
EMULATED_INTEGER_LIMITS(uint16_t, 0, 65535)
EMULATED_INTEGER_LIMITS(int32_t, -2147483647 - 1, 2147483647)
EMULATED_INTEGER_LIMITS(uint32_t, 0, 4294967295u)
EMULATED_INTEGER_LIMITS(int64_t, -9223372036854775807 - 1, 9223372036854775807)
EMULATED_INTEGER_LIMITS(uint64_t, 0, 18446744073709551615u)
#undef EMULATED_INTEGER_LIMITS

#define EMULATED_FLOAT_LIMITS(T, B, min_bits, max_bits, infinity_bits, nan_bits, epsilon_bits)       \
  template <>                                                                                         \
  struct numeric_limits<T> {                                                                          \
    static constexpr T min() { return ::emulated::bits_as<T>(B(min_bits)); }                          \
    static constexpr T max() { return ::emulated::bits_as<T>(B(max_bits)); }                          \
    static constexpr T lowest() { return -max(); }                                                    \
    static constexpr T infinity() { return ::emulated::bits_as<T>(B(infinity_bits)); }                \
    static constexpr T quiet_NaN() { return ::emulated::bits_as<T>(B(nan_bits)); }                    \
    static constexpr T epsilon() { return ::emulated::bits_as<T>(B(epsilon_bits)); }                  \
  };
EMULATED_FLOAT_LIMITS(float, uint32_t, 0x00800000, 0x7f7fffff, 0x7f800000, 0x7fc00000, 0x34000000)
EMULATED_FLOAT_LIMITS(half, uint16_t, 0x0400, 0x7bff, 0x7c00, 0x7e00, 0x1400)
EMULATED_FLOAT_LIMITS(bfloat, uint16_t, 0x0080, 0x7f7f, 0x7f80, 0x7fc0, 0x3c00)
#undef EMULATED_FLOAT_LIMITS

}  // namespace metal
