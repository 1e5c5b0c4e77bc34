// <metal_geometric> and <metal_relational>.
#pragma once

namespace metal {

template <class T, int N>
inline T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; i++) sum += a[i] * b[i];
  return sum;
}
template <class T, int N>
inline T length_squared(vec<T, N> a) {
  return dot(a, a);
}
template <class T, int N>
inline T length(vec<T, N> a) {
  return sqrt(dot(a, a));
}
inline float3 cross(float3 a, float3 b) { return a.yzx * b.zxy - a.zxy * b.yzx; }

template <class T>
inline T select(T a, T b, bool c) {
  return c ? b : a;
}
template <class T, class M, int N>
inline vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<M, N> c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = c[i] ? b[i] : a[i];
  return r;
}
template <class T, int N>
inline bool any(vec<T, N> a) {
  bool r = false;
  for (int i = 0; i < N; i++) r |= bool(a[i]);
  return r;
}
template <class T, int N>
inline bool all(vec<T, N> a) {
  bool r = true;
  for (int i = 0; i < N; i++) r &= bool(a[i]);
  return r;
}

}  // namespace metal
