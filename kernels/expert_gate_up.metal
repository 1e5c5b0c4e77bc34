// h[k] = silu(gate_k · x) * (up_k · x) for every record k, read where it lies.
//
// RECORD(k) const device u32 [words]: generated, one record of a bank or one of several buffers
// x         T [IN]
// h         T [K, OUT]
//
// A record holds, at these words: gate weights u32 [OUT, IN * GATE_BITS / 32] at GATE, their scales and biases
// GATE_S [OUT, IN / GATE_GROUP] at GATE_SCALES and GATE_BIASES; the same for up.
// Grid: x over rows, y over records. LANES lanes share a set of ROWS rows of both matrices.
constexpr uint SETS = 32 / LANES, BLOCKS = IN / 32;
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
  float gate_scale[ROWS], gate_bias[ROWS], up_scale[ROWS], up_bias[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const uint at = rows[r] * BLOCKS + block;
    load_block<GATE_BITS>(record + GATE + at * GATE_BITS, gate + r * GATE_BITS);
    load_block<UP_BITS>(record + UP + at * UP_BITS, up + r * UP_BITS);
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const uint gate_group = rows[r] * (IN / GATE_GROUP) + block / (GATE_GROUP / 32);
    const uint up_group = rows[r] * (IN / UP_GROUP) + block / (UP_GROUP / 32);
    gate_scale[r] = float(gate_scales[gate_group]);
    gate_bias[r] = float(gate_biases[gate_group]);
    up_scale[r] = float(up_scales[up_group]);
    up_bias[r] = float(up_biases[up_group]);
  }

  float gate_dots[ROWS], up_dots[ROWS], x_sum = 0.0f;
#pragma unroll
  for (int r = 0; r < ROWS; r++) gate_dots[r] = up_dots[r] = 0.0f;
#pragma unroll
  for (int chunk = 0; chunk < 4; chunk++) {
    float xs[8], q[8];
    load_chunk(x + block * 32 + chunk * 8, xs);
    x_sum += sum_chunk(xs);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      unpack_chunk<GATE_BITS>(gate + r * GATE_BITS, chunk, q);
      gate_dots[r] = dot_chunk<FORM>(q, xs, gate_scale[r], gate_bias[r], gate_dots[r]);
      unpack_chunk<UP_BITS>(up + r * UP_BITS, chunk, q);
      up_dots[r] = dot_chunk<FORM>(q, xs, up_scale[r], up_bias[r], up_dots[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    gate_sums[r] = finish_block<FORM>(gate_dots[r], x_sum, gate_scale[r], gate_bias[r], gate_sums[r]);
    up_sums[r] = finish_block<FORM>(up_dots[r], x_sum, up_scale[r], up_bias[r], up_sums[r]);
  }
}

#pragma unroll
for (int r = 0; r < ROWS; r++) {
  const float g = sum_lanes<LANES>(gate_sums[r]), u = sum_lanes<LANES>(up_sums[r]);
  // exp may overflow to infinity for very negative g: silu is 0 there
  if (lane == 0 && row0 + r < uint(OUT)) h[k * OUT + row0 + r] = T(g / (1.0f + metal::exp(-g)) * u);
}
