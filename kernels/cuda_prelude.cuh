// What makes CUDA of the Metal that ops/cuda.py lets through. NVRTC compiles this behind MLX's own headers.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// The word `device` must not occur in what this stands for, since it is defined below.
#ifdef __CUDACC_RTC__  // where MLX makes every function one for the device
#define METAL_FUNC __forceinline__
#else
#undef __device__
#define METAL_FUNC __attribute__((__device__)) __forceinline__
#endif
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#ifndef NAN
#define NAN __int_as_float(0x7fffffff)
#endif

namespace flash_moe {

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;

// Metal's vectors: a vector of 3 takes the room of 4; aligned to their size, so that one is loaded at once.
template <typename T, int N>
struct vec;

#define FM_EACH_OPERATOR(V, T, OP, ...)                            \
  friend METAL_FUNC V operator OP(const V& a, const V& b) {        \
    V r;                                                           \
    for (int i = 0; i < V::size; i++) r[i] = T(a[i] OP b[i]);      \
    return r;                                                      \
  }                                                                \
  METAL_FUNC V& operator OP##=(const V& b) { return *this = *this OP b; }

#define FM_VECTOR(N, COUNT, MEMBERS)                                                     \
  template <typename T>                                                                  \
  struct alignas(sizeof(T) * COUNT) vec<T, N> {                                          \
    static constexpr int size = N;                                                       \
    T MEMBERS;                                                                           \
    vec() = default;                                                                     \
    METAL_FUNC vec(T all) {                                                              \
      for (int i = 0; i < N; i++) (*this)[i] = all;                                      \
    }                                                                                    \
    template <typename U>                                                                \
    METAL_FUNC explicit vec(const vec<U, N>& other) {                                    \
      for (int i = 0; i < N; i++) (*this)[i] = T(other[i]);                              \
    }                                                                                    \
    template <typename A, typename B, typename... C>                                     \
    METAL_FUNC vec(A a, B b, C... c) {                                                   \
      static_assert(sizeof...(C) == N - 2, "one value per component");                   \
      const T values[N] = {T(a), T(b), T(c)...};                                         \
      for (int i = 0; i < N; i++) (*this)[i] = values[i];                                \
    }                                                                                    \
    METAL_FUNC T& operator[](int i) { return (&x)[i]; }                                  \
    METAL_FUNC const T& operator[](int i) const { return (&x)[i]; }                      \
    METAL_FUNC vec operator-() const { return vec(T(0)) - *this; }                       \
    FM_EACH_OPERATOR(vec, T, +)                                                          \
    FM_EACH_OPERATOR(vec, T, -)                                                          \
    FM_EACH_OPERATOR(vec, T, *)                                                          \
    FM_EACH_OPERATOR(vec, T, /)                                                          \
    FM_EACH_OPERATOR(vec, T, &)                                                          \
    FM_EACH_OPERATOR(vec, T, |)                                                          \
    FM_EACH_OPERATOR(vec, T, ^)                                                          \
    FM_EACH_OPERATOR(vec, T, <<)                                                         \
    FM_EACH_OPERATOR(vec, T, >>)                                                         \
  };
#define FM_MEMBERS2 x, y
#define FM_MEMBERS3 x, y, z
#define FM_MEMBERS4 x, y, z, w
FM_VECTOR(2, 2, FM_MEMBERS2)
FM_VECTOR(3, 4, FM_MEMBERS3)
FM_VECTOR(4, 4, FM_MEMBERS4)

template <typename To, typename From>
METAL_FUNC To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type: the sizes differ");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

struct mem_flags {
  enum flags { mem_none, mem_device, mem_threadgroup };
};
METAL_FUNC void threadgroup_barrier(int) { __syncthreads(); }
METAL_FUNC void simdgroup_barrier(int) { __syncwarp(); }

// Simdgroup functions: all 32 lanes take part, as the kernels promise.
#define FM_ALL 0xffffffffu
template <typename T> METAL_FUNC T simd_shuffle(T x, uint lane) { return __shfl_sync(FM_ALL, x, lane); }
template <typename T> METAL_FUNC T simd_broadcast(T x, uint lane) { return __shfl_sync(FM_ALL, x, lane); }
template <typename T> METAL_FUNC T simd_shuffle_xor(T x, uint mask) { return __shfl_xor_sync(FM_ALL, x, mask); }
template <typename T> METAL_FUNC T simd_shuffle_down(T x, uint delta) { return __shfl_down_sync(FM_ALL, x, delta); }
template <typename T> METAL_FUNC T simd_shuffle_up(T x, uint delta) { return __shfl_up_sync(FM_ALL, x, delta); }
METAL_FUNC bool simd_all(bool x) { return __all_sync(FM_ALL, x); }
METAL_FUNC bool simd_any(bool x) { return __any_sync(FM_ALL, x); }

// The functions of namespace metal that ops/cuda.py lets through.
namespace metal {
using flash_moe::as_type;
using flash_moe::simd_all;
using flash_moe::simd_any;
using flash_moe::simd_broadcast;
using flash_moe::simd_shuffle;
using flash_moe::simd_shuffle_down;
using flash_moe::simd_shuffle_up;
using flash_moe::simd_shuffle_xor;
using flash_moe::vec;

// half and bfloat are computed in float and rounded once; an integer never comes here by accident.
#define FM_MATH(NAME, EXPRESSION)                                                \
  METAL_FUNC float NAME(float x) { return EXPRESSION; }                          \
  METAL_FUNC __half NAME(__half h) { return __half(NAME(float(h))); }            \
  METAL_FUNC __nv_bfloat16 NAME(__nv_bfloat16 h) { return __nv_bfloat16(NAME(float(h))); }
FM_MATH(ceil, ::ceilf(x))
FM_MATH(cos, ::cosf(x))
FM_MATH(exp, ::expf(x))
FM_MATH(exp2, ::exp2f(x))
FM_MATH(fabs, ::fabsf(x))
FM_MATH(floor, ::floorf(x))
FM_MATH(log, ::logf(x))
FM_MATH(log2, ::log2f(x))
FM_MATH(rint, ::rintf(x))
FM_MATH(round, ::roundf(x))
FM_MATH(rsqrt, ::rsqrtf(x))
FM_MATH(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : x != x ? 0.0f : x)
FM_MATH(sin, ::sinf(x))
FM_MATH(sqrt, ::sqrtf(x))
FM_MATH(tanh, ::tanhf(x))
FM_MATH(trunc, ::truncf(x))
METAL_FUNC float pow(float x, float y) { return ::powf(x, y); }
METAL_FUNC float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
METAL_FUNC bool isnan(float x) { return x != x; }
METAL_FUNC bool isinf(float x) { return ::fabsf(x) == INFINITY; }
METAL_FUNC bool isfinite(float x) { return ::fabsf(x) < INFINITY; }
METAL_FUNC float fmax(float a, float b) { return ::fmaxf(a, b); }
METAL_FUNC float fmin(float a, float b) { return ::fminf(a, b); }
METAL_FUNC float max(float a, float b) { return ::fmaxf(a, b); }
METAL_FUNC float min(float a, float b) { return ::fminf(a, b); }
METAL_FUNC float abs(float x) { return ::fabsf(x); }
METAL_FUNC int abs(int x) { return x < 0 ? -x : x; }
METAL_FUNC float clamp(float x, float low, float high) { return ::fminf(::fmaxf(x, low), high); }
#define FM_INTEGER(T)                                                     \
  METAL_FUNC T max(T a, T b) { return a > b ? a : b; }                    \
  METAL_FUNC T min(T a, T b) { return a < b ? a : b; }                    \
  METAL_FUNC T clamp(T x, T low, T high) { return min(max(x, low), high); }
FM_INTEGER(int)
FM_INTEGER(uint)
FM_INTEGER(long)
FM_INTEGER(ulong)
template <typename T> METAL_FUNC T select(T a, T b, bool condition) { return condition ? b : a; }
template <typename T, int N>
METAL_FUNC T dot(vec<T, N> a, vec<T, N> b) {
  T r = a[0] * b[0];
  for (int i = 1; i < N; i++) r += a[i] * b[i];
  return r;
}

namespace fast {
METAL_FUNC float cos(float x) { return __cosf(x); }
METAL_FUNC float exp(float x) { return __expf(x); }
METAL_FUNC float exp2(float x) { return ::exp2f(x); }
METAL_FUNC float log(float x) { return __logf(x); }
METAL_FUNC float log2(float x) { return __log2f(x); }
METAL_FUNC float pow(float x, float y) { return __powf(x, y); }
METAL_FUNC float sin(float x) { return __sinf(x); }
}  // namespace fast
}  // namespace metal

#define FM_REDUCE(NAME, EXPRESSION)                        \
  template <typename T>                                    \
  METAL_FUNC T NAME(T a) {                                 \
    for (uint d = 16; d; d /= 2) {                         \
      const T b = simd_shuffle_xor(a, d);                  \
      a = EXPRESSION;                                      \
    }                                                      \
    return a;                                              \
  }
FM_REDUCE(simd_sum, T(a + b))
FM_REDUCE(simd_max, metal::max(a, b))
FM_REDUCE(simd_min, metal::min(a, b))
#if __CUDA_ARCH__ >= 800  // one instruction instead of ten
METAL_FUNC uint simd_max(uint x) { return __reduce_max_sync(FM_ALL, x); }
METAL_FUNC uint simd_min(uint x) { return __reduce_min_sync(FM_ALL, x); }
#endif
namespace metal {
using flash_moe::simd_max;
using flash_moe::simd_min;
using flash_moe::simd_sum;
}  // namespace metal

}  // namespace flash_moe

// The kernel is a function in MLX's namespace; these names hide CUDA's vectors of the same name.
namespace mlx::core::cu {
namespace metal = ::flash_moe::metal;
using half = __half;
using float16_t = __half;
using bfloat = __nv_bfloat16;
using bfloat16_t = __nv_bfloat16;
using ::flash_moe::as_type;
using ::flash_moe::mem_flags;
using ::flash_moe::simd_all;
using ::flash_moe::simd_any;
using ::flash_moe::simd_broadcast;
using ::flash_moe::simd_max;
using ::flash_moe::simd_min;
using ::flash_moe::simd_shuffle;
using ::flash_moe::simd_shuffle_down;
using ::flash_moe::simd_shuffle_up;
using ::flash_moe::simd_shuffle_xor;
using ::flash_moe::simd_sum;
using ::flash_moe::simdgroup_barrier;
using ::flash_moe::threadgroup_barrier;
using ::flash_moe::uchar;
using ::flash_moe::uint;
using ::flash_moe::ulong;
using ::flash_moe::ushort;
using ::flash_moe::vec;
#define FM_TYPES(T)                  \
  using T##2 = ::flash_moe::vec<T, 2>; \
  using T##3 = ::flash_moe::vec<T, 3>; \
  using T##4 = ::flash_moe::vec<T, 4>;
FM_TYPES(char)
FM_TYPES(uchar)
FM_TYPES(short)
FM_TYPES(ushort)
FM_TYPES(int)
FM_TYPES(uint)
FM_TYPES(long)
FM_TYPES(ulong)
FM_TYPES(half)
FM_TYPES(bfloat)
FM_TYPES(float)
}  // namespace mlx::core::cu

// Address spaces last: from here on these words are Metal's.
#define device
#define thread
#define constant const
#define threadgroup __shared__
