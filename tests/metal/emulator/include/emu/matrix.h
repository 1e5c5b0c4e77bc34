// <metal_simdgroup_matrix>: 8x8 matrices spread over a simdgroup.
// Lane -> (row, two columns) is the layout that MLX's steel/gemm/mma.h relies on.
#pragma once

namespace metal {

METAL_FUNC uint emu_matrix_row(uint lane) { return ((lane / 4) & 4) + (lane / 2) % 4; }
METAL_FUNC uint emu_matrix_column(uint lane) { return ((lane / 4) & 2) * 2 + (lane % 2) * 2; }

template <class T, int R, int C>
struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "simdgroup_matrix: only 8x8 exists");
  typedef vec<T, 2> storage_type;
  storage_type e;

  simdgroup_matrix() {}
  explicit simdgroup_matrix(T diagonal) {
    uint row = emu_matrix_row(emu_lane()), column = emu_matrix_column(emu_lane());
    for (uint k = 0; k < 2; k++) e[k] = row == column + k ? diagonal : T(0);
  }
  storage_type& thread_elements() { return e; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int R, int C = R>
METAL_FUNC simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T x) {
  simdgroup_matrix<T, R, C> m;
  m.e[0] = m.e[1] = x;
  return m;
}

#define EMU_MATRIX_MEMORY(SPACE)                                                                                      \
  template <class T>                                                                                                  \
  METAL_FUNC void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, const SPACE T* p, ulong stride = 8, ulong2 origin = 0, \
                                 bool transpose = false) {                                                            \
    uint r = emu_matrix_row(emu_lane()), c = emu_matrix_column(emu_lane());                                           \
    for (uint k = 0; k < 2; k++)                                                                                      \
      m.e[k] =                                                                                                        \
          transpose ? p[(origin.y + c + k) * stride + origin.x + r] : p[(origin.y + r) * stride + origin.x + c + k];  \
  }                                                                                                                   \
  template <class T>                                                                                                  \
  METAL_FUNC void simdgroup_store(simdgroup_matrix<T, 8, 8> m, SPACE T* p, ulong stride = 8, ulong2 origin = 0,       \
                                  bool transpose = false) {                                                           \
    uint r = emu_matrix_row(emu_lane()), c = emu_matrix_column(emu_lane());                                           \
    for (uint k = 0; k < 2; k++)                                                                                      \
      (transpose ? p[(origin.y + c + k) * stride + origin.x + r] : p[(origin.y + r) * stride + origin.x + c + k]) =   \
          m.e[k];                                                                                                     \
  }
EMU_MATRIX_MEMORY(device)
EMU_MATRIX_MEMORY(threadgroup)

template <class D, class A, class B, class C>
METAL_FUNC void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                              simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c,
                                              uint site = EMU_SITE) {
  struct Mine {
    float a0, a1, b0, b1;
  } mine = {float(a.e[0]), float(a.e[1]), float(b.e[0]), float(b.e[1])};
  const emu_slots* slots = emu_collective(&mine, sizeof(mine), EMU_MATRIX, site);
  float left[8][8], right[8][8];
  for (uint lane = 0; lane < 32; lane++) {
    Mine v = emu_lane_value<Mine>(slots, lane);
    uint r = emu_matrix_row(lane), k = emu_matrix_column(lane);
    left[r][k] = v.a0, left[r][k + 1] = v.a1, right[r][k] = v.b0, right[r][k + 1] = v.b1;
  }
  uint row = emu_matrix_row(emu_lane()), column = emu_matrix_column(emu_lane());
  for (uint j = 0; j < 2; j++) {
    float x = float(c.e[j]);
    for (uint k = 0; k < 8; k++) x = __builtin_fmaf(left[row][k], right[k][column + j], x);
    d.e[j] = D(x);
  }
}
template <class D, class A, class B>
METAL_FUNC void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                   simdgroup_matrix<B, 8, 8> b, uint site = EMU_SITE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8, 8>(D(0)), site);
}

}  // namespace metal
