// vec<T, N>, vector construction, as_type and array.
#pragma once

namespace metal {

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

// A scalar counts as a vector of one element.
template <class T>
struct emu_element {
  using type = T;
  static constexpr int count = 1;
};
template <class T>
struct emu_element<vec<T, 2>> {
  using type = T;
  static constexpr int count = 2;
};
template <class T>
struct emu_element<vec<T, 3>> {
  using type = T;
  static constexpr int count = 3;
};
template <class T>
struct emu_element<vec<T, 4>> {
  using type = T;
  static constexpr int count = 4;
};
template <class T>
using emu_element_t = typename emu_element<remove_cv_t<T>>::type;
template <class T>
struct make_scalar {
  using type = emu_element_t<T>;
};
template <class T>
using make_scalar_t = emu_element_t<T>;

template <class V, class A>
inline void emu_append(V& result, int& at, A value) {
  if constexpr (emu_element<A>::count == 1)
    result[at++] = emu_element_t<V>(value);
  else
    for (int k = 0; k < emu_element<A>::count; k++) result[at++] = emu_element_t<V>(value[k]);
}

// float4(a, b.xyz), vec<T, 4>(v), ...: the rewriter turns constructor calls into this.
// Elements are converted by value, where a C++ cast between vectors would reinterpret their bits.
template <class V, class... A>
inline V emu_make(A... values) {
  constexpr int count = emu_element<V>::count, given = (0 + ... + emu_element<A>::count);
  V result;
  if constexpr (count == 1) {
    static_assert(sizeof...(A) == 1, "a scalar is made from one value");
    result = (V(values), ...);
  } else if constexpr (sizeof...(A) == 0) {
    result = V(0);
  } else if constexpr (sizeof...(A) == 1 && given == 1) {
    for (int k = 0; k < count; k++) result[k] = (emu_element_t<V>(values), ...);
  } else {
    static_assert(given == count, "wrong number of components in a vector constructor");
    int at = 0;
    (emu_append(result, at, values), ...);
  }
  return result;
}

template <class T, class F>
inline constexpr T as_type(F value) {
  static_assert(sizeof(T) == sizeof(F), "as_type: the sizes differ");
  return __builtin_bit_cast(T, value);
}

template <class T, size_t N>
struct array {
  T v[N];
  constexpr T& operator[](size_t i) { return v[i]; }
  constexpr const T& operator[](size_t i) const { return v[i]; }
  static constexpr size_t size() { return N; }
};

template <class T>
using uniform = T;
template <class T>
inline T make_uniform(T x) {
  return x;
}

// A Metal attribute as the type that the kernel's parameter has: uint3, uint2 or a scalar.
template <class T>
inline T emu_attribute(unsigned value) {
  return T(value);
}
template <class T>
inline T emu_attribute(emu_uint3 value) {
  const unsigned xyz[3] = {value.x, value.y, value.z};
  T result;
  if constexpr (emu_element<T>::count == 1)
    result = T(value.x);
  else
    for (int k = 0; k < emu_element<T>::count; k++) result[k] = emu_element_t<T>(xyz[k]);
  return result;
}

}  // namespace metal
