// y = residual + sum over k of weights[k] * (down_k · h[k]), for all records at once.
//
// RECORD(k)   const device u32 [words]: generated, one record of a bank or one of several buffers
// RESIDUAL(i) float: generated, element i of residual T [OUT], or zero
// h           T [K, IN]
// weights     f32 [K]
// y           T [OUT]
//
// A record holds, at these words: down weights u32 [OUT, IN * BITS / 32] at DOWN, their scales and biases
// S [OUT, IN / GROUP] at DOWN_SCALES and DOWN_BIASES, which only mode AFFINE has, and a global scale f32 at DOWN_GLOBAL, if
// that is not 0.
// A threadgroup has K simdgroups, one per record; all of them compute the same rows, which are then added in the order
// of the records: the same sum on every run. LANES lanes share a set of ROWS rows.
constexpr uint SETS = 32 / LANES, BLOCKS = IN / 32, TILE = SETS * ROWS;
constexpr int PARTS = GROUP < 32 ? 2 : 1;  // of a block, with a scale each
threadgroup float tile[K * TILE];

const uint k = simdgroup_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup % LANES;
const uint first = thread_index_in_simdgroup / LANES * ROWS;  // of this set's rows within the tile
const uint tile0 = threadgroup_position_in_grid.x * TILE;

const device uint* record = RECORD(k);
const device S* scales = (const device S*)(record + DOWN_SCALES);
const device S* biases = (const device S*)(record + DOWN_BIASES);

uint rows[ROWS];
float sums[ROWS];
#pragma unroll
for (int r = 0; r < ROWS; r++) {
  // a row past the end is read as the last one and not written: all lanes stay together
  rows[r] = metal::min(tile0 + first + r, uint(OUT - 1));
  sums[r] = 0.0f;
}

for (uint block = lane; block < BLOCKS; block += LANES) {
  // every load of the block is on its way before the first is used
  uint packed[ROWS * BITS];
  float scale[ROWS * PARTS], bias[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    load_block<BITS>(record + DOWN + (rows[r] * BLOCKS + block) * BITS, packed + r * BITS);
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const uint row = rows[r] * (IN / GROUP);
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
      scale[r * PARTS + p] = read_scale<MODE>(scales, row + (block * 32 + 16 * p) / GROUP);
    }
    bias[r] = MODE == AFFINE ? float(biases[row + block * 32 / GROUP]) : 0.0f;
  }

  float dots[ROWS * PARTS], x_sum = 0.0f;
#pragma unroll
  for (int i = 0; i < ROWS * PARTS; i++) dots[i] = 0.0f;
#pragma unroll
  for (int chunk = 0; chunk < 4; chunk++) {
    float xs[8], q[8];
    load_chunk(h + k * IN + block * 32 + chunk * 8, xs);
    x_sum += sum_chunk(xs);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const int at = r * PARTS + chunk * PARTS / 4;
      unpack_chunk<BITS, MODE>(packed + r * BITS, chunk, q);
      dots[at] = dot_chunk<FORM>(q, xs, scale[at], bias[r], dots[at]);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
#pragma unroll
    for (int i = r * PARTS; i < (r + 1) * PARTS; i++) {
      sums[r] = finish_block<FORM>(dots[i], x_sum, scale[i], bias[r], sums[r]);
    }
  }
}

#pragma unroll
for (int r = 0; r < ROWS; r++) {
  const float total = sum_lanes<LANES>(sums[r]) * global_factor<DOWN_GLOBAL>(record);
  if (lane == 0) tile[k * TILE + first + r] = total;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

const uint i = thread_index_in_threadgroup;
if (i < TILE && tile0 + i < uint(OUT)) {
  float sum = 0.0f;
  for (int j = 0; j < K; j++) sum = metal::fma(weights[j], tile[j * TILE + i], sum);
  y[tile0 + i] = T(RESIDUAL(tile0 + i) + sum);
}
