// <metal_integer>.
#pragma once

namespace metal {

template <class T>
inline unsigned long long emu_bits(T x) {
  return (unsigned long long)x & (~0ull >> (64 - CHAR_BIT * sizeof(T)));
}

#define EMU_INTEGER_VECTOR(T, N)                                                                  \
  inline T##N max(T##N a, T##N b) EMU_EACH(T, N, max(a[i], b[i])) inline T##N min(T##N a, T##N b) \
      EMU_EACH(T, N, min(a[i], b[i])) inline T##N clamp(T##N a, T##N lo, T##N hi)                 \
          EMU_EACH(T, N, clamp(a[i], lo[i], hi[i])) inline T##N abs(T##N a) EMU_EACH(T, N, abs(a[i]))

#define EMU_INTEGER(T)                                                                                  \
  inline T max(T a, T b) { return a > b ? a : b; }                                                      \
  inline T min(T a, T b) { return a < b ? a : b; }                                                      \
  inline T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }                                       \
  inline T abs(T a) { return a < T(0) ? T(-a) : a; }                                                    \
  inline T max3(T a, T b, T c) { return max(a, max(b, c)); }                                            \
  inline T min3(T a, T b, T c) { return min(a, min(b, c)); }                                            \
  inline T popcount(T a) { return T(__builtin_popcountll(emu_bits(a))); }                               \
  inline T clz(T a) {                                                                                   \
    int width = CHAR_BIT * sizeof(T);                                                                   \
    return emu_bits(a) ? T(__builtin_clzll(emu_bits(a)) - (64 - width)) : T(width);                     \
  }                                                                                                     \
  inline T ctz(T a) { return emu_bits(a) ? T(__builtin_ctzll(emu_bits(a))) : T(CHAR_BIT * sizeof(T)); } \
  inline T extract_bits(T x, uint offset, uint bits) {                                                  \
    uint width = CHAR_BIT * sizeof(T);                                                                  \
    return bits == 0 ? T(0) : T(T(x << (width - bits - offset)) >> (width - bits));                     \
  }                                                                                                     \
  EMU_INTEGER_VECTOR(T, 2) EMU_INTEGER_VECTOR(T, 3) EMU_INTEGER_VECTOR(T, 4)
EMU_INTEGER(char)
EMU_INTEGER(uchar)
EMU_INTEGER(short)
EMU_INTEGER(ushort)
EMU_INTEGER(int)
EMU_INTEGER(uint)
EMU_INTEGER(long)
EMU_INTEGER(ulong)

inline int mulhi(int a, int b) { return int((long(a) * b) >> 32); }
inline uint mulhi(uint a, uint b) { return uint((ulong(a) * b) >> 32); }
inline uint rotate(uint a, uint b) { return (a << (b & 31)) | (a >> (-b & 31)); }
inline uint reverse_bits(uint a) { return __builtin_bitreverse32(a); }

}  // namespace metal
