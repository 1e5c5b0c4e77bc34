// y = x · rsqrt(mean(x²) + eps) · weight, a threadgroup of THREADS per row.
//
// x: [rows, WIDTH]; weight: [WIDTH]; eps: float [1]
// y: T [rows, WIDTH]
constexpr uint SIMDGROUPS = THREADS / 32;
constexpr uint COUNT = (WIDTH + THREADS - 1) / THREADS;  // elements of a thread
threadgroup float sums[SIMDGROUPS];

const uint thread_id = thread_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup;
const uint row = threadgroup_position_in_grid.y * uint(WIDTH);

float values[COUNT];  // the row is read once
float sum = 0.0f;
for (uint i = 0; i < COUNT; i++) {
  const uint column = i * THREADS + thread_id;
  values[i] = column < uint(WIDTH) ? float(x[row + column]) : 0.0f;
  sum = metal::fma(values[i], values[i], sum);
}
sum = simd_sum(sum);
if (lane == 0) {
  sums[simdgroup_index_in_threadgroup] = sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
const float total = simd_sum(lane < SIMDGROUPS ? sums[lane] : 0.0f);  // in every simdgroup: saves a second barrier
const float factor = metal::rsqrt(total / float(WIDTH) + eps[0]);
for (uint i = 0; i < COUNT; i++) {
  const uint column = i * THREADS + thread_id;
  if (column < uint(WIDTH)) {
    y[row + column] = static_cast<T>(values[i] * factor * float(weight[column]));
  }
}
