// <metal_type_traits> and <metal_limits>.
#pragma once

namespace metal {

template <class T, T v>
struct integral_constant {
  static constexpr T value = v;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const { return v; }
  constexpr T operator()() const { return v; }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  using type = T;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;

template <bool B, class T, class F>
struct conditional {
  using type = T;
};
template <class T, class F>
struct conditional<false, T, F> {
  using type = F;
};
template <bool B, class T, class F>
using conditional_t = typename conditional<B, T, F>::type;

#define EMU_TRANSFORM(name, builtin) \
  template <class T>                 \
  struct name {                      \
    using type = builtin(T);         \
  };                                 \
  template <class T>                 \
  using name##_t = builtin(T);
EMU_TRANSFORM(remove_cv, __remove_cv)
EMU_TRANSFORM(remove_const, __remove_const)
EMU_TRANSFORM(remove_reference, __remove_reference_t)

template <class A, class B>
static constexpr bool is_same_v = __is_same(A, B);
template <class A, class B>
struct is_same : bool_constant<__is_same(A, B)> {};
template <class A, class B>
static constexpr bool is_convertible_v = __is_convertible_to(A, B);
template <class A, class B>
struct is_convertible : bool_constant<__is_convertible_to(A, B)> {};

#define EMU_PREDICATE(name, ...)                \
  template <class T>                            \
  static constexpr bool name##_v = __VA_ARGS__; \
  template <class T>                            \
  struct name : bool_constant<name##_v<T>> {};
EMU_PREDICATE(is_integral, __is_integral(T))
EMU_PREDICATE(is_floating_point, __is_same(T, float) || __is_same(T, half) || __is_same(T, bfloat))
EMU_PREDICATE(is_arithmetic, is_integral_v<T> || is_floating_point_v<T>)
EMU_PREDICATE(is_signed, is_floating_point_v<T> || __is_signed(T))
EMU_PREDICATE(is_unsigned, __is_unsigned(T))

// MLX's headers name these two as Metal's library does, underscore included.
template <class...>
struct _disjunction : false_type {};
template <class A>
struct _disjunction<A> : A {};
template <class A, class... R>
struct _disjunction<A, R...> : conditional_t<bool(A::value), A, _disjunction<R...>> {};
template <class...>
struct _conjunction : true_type {};
template <class A>
struct _conjunction<A> : A {};
template <class A, class... R>
struct _conjunction<A, R...> : conditional_t<bool(A::value), _conjunction<R...>, A> {};

template <class T>
T declval();

template <class T>
struct remove_addrspace {
  using type = T;
};
template <class T>
struct remove_addrspace<device T> {
  using type = T;
};
template <class T>
struct remove_addrspace<threadgroup T> {
  using type = T;
};
template <class T>
struct remove_addrspace<constant T> {
  using type = const T;
};
template <class T>
using remove_addrspace_t = typename remove_addrspace<T>::type;

template <class T>
struct numeric_limits;
#define EMU_INTEGER_LIMITS(T, MIN, MAX)                                  \
  template <>                                                            \
  struct numeric_limits<T> {                                             \
    static constexpr bool is_signed = __is_signed(T), is_integer = true; \
    static constexpr int digits = sizeof(T) * CHAR_BIT - __is_signed(T); \
    static constexpr T max() { return MAX; }                             \
    static constexpr T min() { return MIN; }                             \
    static constexpr T lowest() { return MIN; }                          \
  };
EMU_INTEGER_LIMITS(bool, false, true)
EMU_INTEGER_LIMITS(char, -128, 127)
EMU_INTEGER_LIMITS(signed char, -128, 127)
EMU_INTEGER_LIMITS(uchar, 0, 255)
EMU_INTEGER_LIMITS(short, -32768, 32767)
EMU_INTEGER_LIMITS(ushort, 0, 65535)
EMU_INTEGER_LIMITS(int, INT_MIN, INT_MAX)
EMU_INTEGER_LIMITS(uint, 0, UINT_MAX)
EMU_INTEGER_LIMITS(long, -9223372036854775807l - 1, 9223372036854775807l)
EMU_INTEGER_LIMITS(ulong, 0, 18446744073709551615ul)

#define EMU_FLOAT_LIMITS(T, MIN, MAX, EPSILON, DIGITS)          \
  template <>                                                   \
  struct numeric_limits<T> {                                    \
    static constexpr bool is_signed = true, is_integer = false; \
    static constexpr int digits = DIGITS;                       \
    static constexpr T max() { return T(MAX); }                 \
    static constexpr T min() { return T(MIN); }                 \
    static constexpr T lowest() { return T(-(MAX)); }           \
    static constexpr T epsilon() { return T(EPSILON); }         \
    static constexpr T infinity() { return T(INFINITY); }       \
    static constexpr T quiet_NaN() { return T(NAN); }           \
  };
EMU_FLOAT_LIMITS(float, FLT_MIN, FLT_MAX, FLT_EPSILON, 24)
EMU_FLOAT_LIMITS(half, 6.103515625e-05f, 65504.0f, 9.765625e-04f, 11)
EMU_FLOAT_LIMITS(bfloat, 1.17549435e-38f, 3.38953139e38f, 7.8125e-03f, 8)

}  // namespace metal
