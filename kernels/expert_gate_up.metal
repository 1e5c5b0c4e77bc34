// h[k] = silu(gate_k · x) * (up_k · x) for every record k, read where it lies.
//
// RECORD(k) const device u32 [words]: generated, one record of a bank or one of several buffers
// x         T [IN]
// h         T [K, OUT]
//
// A record holds, at these words: gate weights u32 [OUT, IN * GATE_BITS / 32] at GATE, their scales and biases
// GATE_S [OUT, IN / GATE_GROUP] at GATE_SCALES and GATE_BIASES, which only mode AFFINE has, and a global scale f32 at
// GATE_GLOBAL, if that is not 0; the same for up.
// Grid: x over rows, y over records. LANES lanes share a set of ROWS rows of both matrices.
constexpr uint SETS = 32 / LANES, BLOCKS = IN / 32;
constexpr int GATE_PARTS = GATE_GROUP < 32 ? 2 : 1, UP_PARTS = UP_GROUP < 32 ? 2 : 1;  // of a block, with a scale each
const uint k = threadgroup_position_in_grid.y;
const uint lane = thread_index_in_simdgroup % LANES;
const uint simdgroup = threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup;
const uint row0 = (simdgroup * SETS + thread_index_in_simdgroup / LANES) * ROWS;

const device uint* record = RECORD(k);
const device GATE_S* gate_scales = (const device GATE_S*)(record + GATE_SCALES);
const device GATE_S* gate_biases = (const device GATE_S*)(record + GATE_BIASES);
const device UP_S* up_scales = (const device UP_S*)(record + UP_SCALES);
const device UP_S* up_biases = (const device UP_S*)(record + UP_BIASES);

uint rows[ROWS];
float gate_sums[ROWS], up_sums[ROWS];
#pragma unroll
for (int r = 0; r < ROWS; r++) {
  // a row past the end is read as the last one and not written: all lanes stay together
  rows[r] = metal::min(row0 + r, uint(OUT - 1));
  gate_sums[r] = up_sums[r] = 0.0f;
}

for (uint block = lane; block < BLOCKS; block += LANES) {
  // every load of the block is on its way before the first is used
  uint gate[ROWS * GATE_BITS], up[ROWS * UP_BITS];
  float gate_scale[ROWS * GATE_PARTS], gate_bias[ROWS], up_scale[ROWS * UP_PARTS], up_bias[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const uint at = rows[r] * BLOCKS + block;
    load_block<GATE_BITS>(record + GATE + at * GATE_BITS, gate + r * GATE_BITS);
    load_block<UP_BITS>(record + UP + at * UP_BITS, up + r * UP_BITS);
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const uint gate_row = rows[r] * (IN / GATE_GROUP), up_row = rows[r] * (IN / UP_GROUP);
#pragma unroll
    for (int p = 0; p < GATE_PARTS; p++) {
      gate_scale[r * GATE_PARTS + p] = read_scale<GATE_MODE>(gate_scales, gate_row + (block * 32 + 16 * p) / GATE_GROUP);
    }
#pragma unroll
    for (int p = 0; p < UP_PARTS; p++) {
      up_scale[r * UP_PARTS + p] = read_scale<UP_MODE>(up_scales, up_row + (block * 32 + 16 * p) / UP_GROUP);
    }
    gate_bias[r] = GATE_MODE == AFFINE ? float(gate_biases[gate_row + block * 32 / GATE_GROUP]) : 0.0f;
    up_bias[r] = UP_MODE == AFFINE ? float(up_biases[up_row + block * 32 / UP_GROUP]) : 0.0f;
  }

  float gate_dots[ROWS * GATE_PARTS], up_dots[ROWS * UP_PARTS], x_sum = 0.0f;
#pragma unroll
  for (int i = 0; i < ROWS * GATE_PARTS; i++) gate_dots[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < ROWS * UP_PARTS; i++) up_dots[i] = 0.0f;
#pragma unroll
  for (int chunk = 0; chunk < 4; chunk++) {
    float xs[8], q[8];
    load_chunk(x + block * 32 + chunk * 8, xs);
    x_sum += sum_chunk(xs);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const int gate_at = r * GATE_PARTS + chunk * GATE_PARTS / 4, up_at = r * UP_PARTS + chunk * UP_PARTS / 4;
      unpack_chunk<GATE_BITS, GATE_MODE>(gate + r * GATE_BITS, chunk, q);
      gate_dots[gate_at] = dot_chunk<FORM>(q, xs, gate_scale[gate_at], gate_bias[r], gate_dots[gate_at]);
      unpack_chunk<UP_BITS, UP_MODE>(up + r * UP_BITS, chunk, q);
      up_dots[up_at] = dot_chunk<FORM>(q, xs, up_scale[up_at], up_bias[r], up_dots[up_at]);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
#pragma unroll
    for (int i = r * GATE_PARTS; i < (r + 1) * GATE_PARTS; i++) {
      gate_sums[r] = finish_block<FORM>(gate_dots[i], x_sum, gate_scale[i], gate_bias[r], gate_sums[r]);
    }
#pragma unroll
    for (int i = r * UP_PARTS; i < (r + 1) * UP_PARTS; i++) {
      up_sums[r] = finish_block<FORM>(up_dots[i], x_sum, up_scale[i], up_bias[r], up_sums[r]);
    }
  }
}

#pragma unroll
for (int r = 0; r < ROWS; r++) {
  const float g = sum_lanes<LANES>(gate_sums[r]) * global_factor<GATE_GLOBAL>(record);
  const float u = sum_lanes<LANES>(up_sums[r]) * global_factor<UP_GLOBAL>(record);
  // exp may overflow to infinity for very negative g: silu is 0 there
  if (lane == 0 && row0 + r < uint(OUT)) h[k * OUT + row0 + r] = T(g / (1.0f + metal::exp(-g)) * u);
}
