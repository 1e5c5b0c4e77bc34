// y_m = x · W_mᵀ for a few tokens and one or several matrices, affinely quantised alike.
//
// x          T  [TOKENS, IN]
// WEIGHT(m)  u32 [ROWS_OF(m), IN * BITS / 32]: generated, as the following are
// SCALES(m)  S  [ROWS_OF(m), IN / GROUP], BIASES(m) the same; S is any float type
// OUTPUT(m)  T  [TOKENS, ROWS_OF(m)]
//
// Matrix m = MATRIX(threadgroup) has the threadgroups from FIRST(m) on. LANES lanes share a set of ROWS rows, so a
// simdgroup has 32 / LANES sets.
constexpr uint SETS = 32 / LANES, BLOCKS = IN / 32;
const uint tg = threadgroup_position_in_grid.x;
const uint m = MATRIX(tg);
const uint out = ROWS_OF(m);
const uint lane = thread_index_in_simdgroup % LANES;
const uint simdgroup = (tg - FIRST(m)) * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup;
const uint row0 = (simdgroup * SETS + thread_index_in_simdgroup / LANES) * ROWS;

uint rows[ROWS];
float sums[ROWS * TOKENS];
#pragma unroll
for (int r = 0; r < ROWS; r++) {
  // a row past the end is read as the last one and not written: all lanes stay together
  rows[r] = metal::min(row0 + r, out - 1);
}
#pragma unroll
for (int i = 0; i < ROWS * TOKENS; i++) sums[i] = 0.0f;

for (uint block = lane; block < BLOCKS; block += LANES) {
  // every load of the block is on its way before the first is used
  uint packed[ROWS * BITS];
  float scale[ROWS], bias[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) load_block<BITS>(WEIGHT(m) + size_t(rows[r] * BLOCKS + block) * BITS, packed + r * BITS);
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const uint group = rows[r] * (IN / GROUP) + block / (GROUP / 32);
    scale[r] = float(SCALES(m)[group]);
    bias[r] = float(BIASES(m)[group]);
  }

  float dots[ROWS * TOKENS], x_sums[TOKENS];
#pragma unroll
  for (int i = 0; i < ROWS * TOKENS; i++) dots[i] = 0.0f;
#pragma unroll
  for (int t = 0; t < TOKENS; t++) x_sums[t] = 0.0f;
#pragma unroll
  for (int chunk = 0; chunk < 4; chunk++) {
    float q[ROWS * 8];
#pragma unroll
    for (int r = 0; r < ROWS; r++) unpack_chunk<BITS>(packed + r * BITS, chunk, q + 8 * r);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      float xs[8];
      load_chunk(x + t * IN + block * 32 + chunk * 8, xs);
      x_sums[t] += sum_chunk(xs);
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const int i = r * TOKENS + t;
        dots[i] = dot_chunk<FORM>(q + 8 * r, xs, scale[r], bias[r], dots[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < ROWS * TOKENS; i++) {
    const int r = i / TOKENS;
    sums[i] = finish_block<FORM>(dots[i], x_sums[i % TOKENS], scale[r], bias[r], sums[i]);
  }
}

#pragma unroll
for (int r = 0; r < ROWS; r++) {
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    const float total = sum_lanes<LANES>(sums[r * TOKENS + t]);
    if (lane == 0 && row0 + r < out) OUTPUT(m)[t * out + row0 + r] = T(total);
  }
}
