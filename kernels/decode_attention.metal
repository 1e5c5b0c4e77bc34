// One token's attention over a chunk of the keys of one KV head, for all GROUP query heads that share it: the softmax's
// maximum and denominator, and the weighted sum of values before the division. Keys go by in tiles of 32.
//
// q: T [HKV, GROUP, D]; keys, values: T [HKV, capacity, D]; scale: float [1]
// sizes: int [4]: valid keys, capacity, keys per chunk, chunks
// best, total: float [HKV, GROUP, chunks]; sums: float [HKV, GROUP, chunks, D]
constexpr uint THREADS = 256;
constexpr uint SIMDGROUPS = THREADS / 32;
constexpr uint TILE = 32;                                // one key per lane in the softmax
constexpr uint SLICES = THREADS / TILE;                  // threads that share a key in a dot product
constexpr uint QUADS = D / 4;
constexpr uint SLICE = QUADS / SLICES;                   // float4 of a key that a thread holds
constexpr uint PARTS = THREADS / QUADS;                  // in the sum a thread has 4 columns of every PARTS-th head
constexpr uint EACH = (GROUP + PARTS - 1) / PARTS;
constexpr uint SOFTMAXES = (GROUP + SIMDGROUPS - 1) / SIMDGROUPS;
threadgroup float4 queries[GROUP * QUADS];
threadgroup float scores[GROUP * TILE];
threadgroup float4 weights[GROUP * TILE / 4];
threadgroup float fades[GROUP];                          // what a new maximum leaves of the sums so far

const uint thread_id = thread_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup;
const uint sg = simdgroup_index_in_threadgroup;
const uint chunk = threadgroup_position_in_grid.x;
const uint kv_head = threadgroup_position_in_grid.y;
const uint chunks = uint(sizes[3]);
const uint begin = chunk * uint(sizes[2]);
const uint end = metal::min(begin + uint(sizes[2]), uint(sizes[0]));
const device vec<T, 4>* q4 = (const device vec<T, 4>*)q + kv_head * GROUP * QUADS;
const device vec<T, 4>* keys4 = (const device vec<T, 4>*)keys + kv_head * uint(sizes[1]) * QUADS;
const device vec<T, 4>* values4 = (const device vec<T, 4>*)values + kv_head * uint(sizes[1]) * QUADS;

for (uint i = thread_id; i < GROUP * QUADS; i += THREADS) {
  float4 query = float4(q4[i]);
  query.x *= scale[0];
  query.y *= scale[0];
  query.z *= scale[0];
  query.w *= scale[0];
  queries[i] = query;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

float maxima[SOFTMAXES];
float denominators[SOFTMAXES];
for (uint i = 0; i < SOFTMAXES; i++) {
  maxima[i] = -INFINITY;
  denominators[i] = 0.0f;
}
float out[EACH][4];
for (uint e = 0; e < EACH; e++) {
  for (uint c = 0; c < 4; c++) {
    out[e][c] = 0.0f;
  }
}
const uint slice = thread_id % SLICES;
const uint quad = thread_id % QUADS;
const uint part = thread_id / QUADS;

for (uint start = begin; start < end; start += TILE) {
  // scores [GROUP, TILE]: SLICES threads per key, each key read once
  const uint key = metal::min(start + thread_id / SLICES, end - 1);
  float k[SLICE * 4];
  for (uint j = 0; j < SLICE; j++) {
    const float4 v = float4(keys4[key * QUADS + j * SLICES + slice]);
    k[4 * j] = v.x;
    k[4 * j + 1] = v.y;
    k[4 * j + 2] = v.z;
    k[4 * j + 3] = v.w;
  }
  for (uint head = 0; head < uint(GROUP); head++) {
    float dot = 0.0f;
    for (uint j = 0; j < SLICE; j++) {
      const float4 query = queries[head * QUADS + j * SLICES + slice];
      dot = metal::fma(query.x, k[4 * j], dot);
      dot = metal::fma(query.y, k[4 * j + 1], dot);
      dot = metal::fma(query.z, k[4 * j + 2], dot);
      dot = metal::fma(query.w, k[4 * j + 3], dot);
    }
    for (uint mask = 1; mask < SLICES; mask *= 2) {
      dot += simd_shuffle_xor(dot, mask);
    }
    if (slice == 0) {
      scores[head * TILE + thread_id / SLICES] = dot;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // weights [GROUP, TILE]: a simdgroup per head, a lane per key
  for (uint i = 0; i < SOFTMAXES; i++) {
    const uint head = i * SIMDGROUPS + sg;
    if (head < uint(GROUP)) {
      const float score = start + lane < end ? scores[head * TILE + lane] : -INFINITY;
      const float maximum = metal::max(maxima[i], simd_max(score));
      const float fade = metal::exp(maxima[i] - maximum);
      const float weight = metal::exp(score - maximum);
      denominators[i] = denominators[i] * fade + simd_sum(weight);
      maxima[i] = maximum;
      const uint first = lane & ~3u;
      const float4 four = float4(simd_shuffle(weight, first), simd_shuffle(weight, first + 1),
                                 simd_shuffle(weight, first + 2), simd_shuffle(weight, first + 3));
      if (lane == first) {
        weights[(head * TILE + lane) / 4] = four;
      }
      if (lane == 0) {
        fades[head] = fade;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // sums [GROUP, D]: four keys at a time; keys past the end have weight 0
  if (part < PARTS) {
    for (uint e = 0; e < EACH; e++) {
      const uint head = e * PARTS + part;
      for (uint c = 0; c < 4; c++) {
        out[e][c] *= head < uint(GROUP) ? fades[head] : 0.0f;
      }
    }
    for (uint j = 0; j < TILE && start + j < end; j += 4) {
      float v[4][4];
      for (uint i = 0; i < 4; i++) {
        const float4 value = float4(values4[metal::min(start + j + i, end - 1) * QUADS + quad]);
        v[i][0] = value.x;
        v[i][1] = value.y;
        v[i][2] = value.z;
        v[i][3] = value.w;
      }
      for (uint e = 0; e < EACH; e++) {
        const uint head = e * PARTS + part;
        if (head < uint(GROUP)) {
          const float4 w = weights[(head * TILE + j) / 4];
          for (uint c = 0; c < 4; c++) {
            out[e][c] = metal::fma(w.x, v[0][c], out[e][c]);
            out[e][c] = metal::fma(w.y, v[1][c], out[e][c]);
            out[e][c] = metal::fma(w.z, v[2][c], out[e][c]);
            out[e][c] = metal::fma(w.w, v[3][c], out[e][c]);
          }
        }
      }
    }
  }
}

for (uint i = 0; i < SOFTMAXES; i++) {
  const uint head = i * SIMDGROUPS + sg;
  if (head < uint(GROUP) && lane == 0) {
    best[(kv_head * GROUP + head) * chunks + chunk] = maxima[i];
    total[(kv_head * GROUP + head) * chunks + chunk] = denominators[i];
  }
}
for (uint e = 0; e < EACH; e++) {
  const uint head = e * PARTS + part;
  if (part < PARTS && head < uint(GROUP)) {
    const uint first = ((kv_head * GROUP + head) * chunks + chunk) * D + 4 * quad;
    for (uint c = 0; c < 4; c++) {
      sums[first + c] = out[e][c];
    }
  }
}
