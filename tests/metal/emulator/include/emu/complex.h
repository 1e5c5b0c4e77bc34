// Stands in for MLX's complex.h, whose methods for every address space plain C++ does not have.
#pragma once

template <typename T>
struct complex_t {
  T real, imag;
  constexpr complex_t(T r, T i) : real(r), imag(i) {}
  constexpr complex_t() : real(0), imag(0) {}
  constexpr complex_t(T r) : real(r), imag(0) {}
};
typedef complex_t<float> complex64_t;

template <typename T>
static constexpr constant bool is_complex_v = false;
template <typename T>
static constexpr constant bool is_complex_v<complex_t<T>> = true;

#define EMU_COMPARE(op)                                        \
  template <typename T>                                        \
  constexpr bool operator op(complex_t<T> a, complex_t<T> b) { \
    return a.real op b.real;                                   \
  }
EMU_COMPARE(<)
EMU_COMPARE(>)
EMU_COMPARE(<=)
EMU_COMPARE(>=)
template <typename T>
constexpr bool operator==(complex_t<T> a, complex_t<T> b) {
  return a.real == b.real && a.imag == b.imag;
}
template <typename T>
constexpr complex_t<T> operator+(complex_t<T> a, complex_t<T> b) {
  return {a.real + b.real, a.imag + b.imag};
}
template <typename T>
constexpr complex_t<T> operator-(complex_t<T> a, complex_t<T> b) {
  return {a.real - b.real, a.imag - b.imag};
}
template <typename T>
constexpr complex_t<T> operator-(complex_t<T> a) {
  return {-a.real, -a.imag};
}
template <typename T>
constexpr complex_t<T> operator*(complex_t<T> a, complex_t<T> b) {
  return {a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real};
}
template <typename T>
constexpr complex_t<T> operator/(complex_t<T> a, complex_t<T> b) {
  T d = b.real * b.real + b.imag * b.imag;
  return {(a.real * b.real + a.imag * b.imag) / d, (a.imag * b.real - a.real * b.imag) / d};
}
template <typename T>
constexpr complex_t<T> operator%(complex_t<T> a, complex_t<T>) {
  return a;
}  // declared so that utils.h parses

namespace mlx {
struct os_log {
  constexpr os_log(constant char*, constant char*) {}
  template <typename... A>
  void log_debug(constant char*, A...) const {}
};
}  // namespace mlx
