// <metal_math>: float and half, scalars and vectors. bfloat comes from MLX's own bf16_math.h.
#pragma once

#define EMU_PI 3.14159265358979323846L  // long double: plain literals are single precision here

inline float emu_median(float a, float b, float c) {
  return __builtin_fmaxf(__builtin_fminf(a, b), __builtin_fminf(__builtin_fmaxf(a, b), c));
}
inline float emu_smoothstep(float lo, float hi, float x) {
  float t = __builtin_fminf(__builtin_fmaxf((x - lo) / (hi - lo), 0.0f), 1.0f);
  return t * t * (3.0f - 2.0f * t);
}

#define EMU_EACH(T, N, expression)                 \
  {                                                \
    T##N r;                                        \
    for (int i = 0; i < N; i++) r[i] = expression; \
    return r;                                      \
  }
#define EMU_MATH1_VECTOR(T, N, name) inline T##N name(T##N x) EMU_EACH(T, N, name(x[i]))
#define EMU_MATH2_VECTOR(T, N, name) inline T##N name(T##N x, T##N y) EMU_EACH(T, N, name(x[i], y[i]))
#define EMU_MATH3_VECTOR(T, N, name) inline T##N name(T##N x, T##N y, T##N z) EMU_EACH(T, N, name(x[i], y[i], z[i]))
#define EMU_MATH_VECTORS(VECTOR, name) \
  VECTOR(float, 2, name)               \
  VECTOR(float, 3, name) VECTOR(float, 4, name) VECTOR(half, 2, name) VECTOR(half, 3, name) VECTOR(half, 4, name)

// A half function computes in float and rounds once.
#define EMU_MATH1(name, expression)                 \
  inline float name(float x) { return expression; } \
  inline half name(half a) {                        \
    float x = float(a);                             \
    return half(expression);                        \
  }                                                 \
  EMU_MATH_VECTORS(EMU_MATH1_VECTOR, name)
#define EMU_MATH2(name, expression)                          \
  inline float name(float x, float y) { return expression; } \
  inline half name(half a, half b) {                         \
    float x = float(a), y = float(b);                        \
    return half(expression);                                 \
  }                                                          \
  EMU_MATH_VECTORS(EMU_MATH2_VECTOR, name)
#define EMU_MATH3(name, expression)                                   \
  inline float name(float x, float y, float z) { return expression; } \
  inline half name(half a, half b, half c) {                          \
    float x = float(a), y = float(b), z = float(c);                   \
    return half(expression);                                          \
  }                                                                   \
  EMU_MATH_VECTORS(EMU_MATH3_VECTOR, name)

namespace metal {
#include "math_functions.h"
namespace fast {
#include "math_functions.h"
}
namespace precise {
#include "math_functions.h"
}

inline float ldexp(float x, int k) { return __builtin_ldexpf(x, k); }
inline float frexp(float x, thread int& exponent) { return __builtin_frexpf(x, &exponent); }
inline int ilogb(float x) { return __builtin_ilogbf(x); }
inline float sincos(float x, thread float& c) {
  c = __builtin_cosf(x);
  return __builtin_sinf(x);
}

#define EMU_CLASSIFY(T)                                              \
  inline bool isnan(T x) { return x != x; }                          \
  inline bool isinf(T x) { return __builtin_isinf(float(x)); }       \
  inline bool isfinite(T x) { return __builtin_isfinite(float(x)); } \
  inline bool signbit(T x) { return __builtin_signbit(float(x)); }
EMU_CLASSIFY(float)
EMU_CLASSIFY(half)

}  // namespace metal
