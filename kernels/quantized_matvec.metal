// y = x · Wᵀ for a few tokens, W affinely quantised.
//
// x        T  [TOKENS, IN]
// w        u32 [OUT, IN * BITS / 32]
// scales   S  [OUT, IN / GROUP], biases the same; S is any float type
// y        T  [TOKENS, OUT]
//
// LANES lanes share a set of ROWS rows, so a simdgroup has 32 / LANES sets.
constexpr uint SETS = 32 / LANES, BLOCKS = IN / 32;
const uint lane = thread_index_in_simdgroup % LANES;
const uint simdgroup = threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup;
const uint row0 = (simdgroup * SETS + thread_index_in_simdgroup / LANES) * ROWS;

uint rows[ROWS];
float sums[ROWS * TOKENS];
#pragma unroll
for (int r = 0; r < ROWS; r++) {
  // a row past the end is read as the last one and not written: all lanes stay together
  rows[r] = metal::min(row0 + r, uint(OUT - 1));
}
#pragma unroll
for (int i = 0; i < ROWS * TOKENS; i++) sums[i] = 0.0f;

for (uint block = lane; block < BLOCKS; block += LANES) {
  // every load of the block is on its way before the first is used
  uint packed[ROWS * BITS];
  float scale[ROWS], bias[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) load_block<BITS>(w + size_t(rows[r] * BLOCKS + block) * BITS, packed + r * BITS);
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const uint group = rows[r] * (IN / GROUP) + block / (GROUP / 32);
    scale[r] = float(scales[group]);
    bias[r] = float(biases[group]);
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
    for (int r = 0; r < ROWS; r++) unpack_chunk<BITS, AFFINE>(packed + r * BITS, chunk, q + 8 * r);
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
    if (lane == 0 && row0 + r < uint(OUT)) y[t * OUT + row0 + r] = T(total);
  }
}
