// total = x + residual and y = total · rsqrt(mean(total²) + eps) · weight, a threadgroup of THREADS per row.
//
// x, residual: [rows, WIDTH]; weight: [WIDTH]; eps: float [1]
// y, total: T [rows, WIDTH]
constexpr uint SIMDGROUPS = THREADS / 32;
constexpr uint COUNT = (WIDTH + THREADS - 1) / THREADS;  // elements of a thread
threadgroup float sums[SIMDGROUPS];

const uint thread_id = thread_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup;
const uint row = threadgroup_position_in_grid.y * uint(WIDTH);

float values[COUNT];
float sum = 0.0f;
for (uint i = 0; i < COUNT; i++) {
  const uint column = i * THREADS + thread_id;
  values[i] = 0.0f;
  if (column < uint(WIDTH)) {
    const T rounded = static_cast<T>(float(x[row + column]) + float(residual[row + column]));
    total[row + column] = rounded;
    values[i] = float(rounded);  // what later layers see is what is normalised
  }
  sum = metal::fma(values[i], values[i], sum);
}
sum = simd_sum(sum);
if (lane == 0) {
  sums[simdgroup_index_in_threadgroup] = sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
const float squares = simd_sum(lane < SIMDGROUPS ? sums[lane] : 0.0f);  // in every simdgroup: saves a second barrier
const float factor = metal::rsqrt(squares / float(WIDTH) + eps[0]);
for (uint i = 0; i < COUNT; i++) {
  const uint column = i * THREADS + thread_id;
  if (column < uint(WIDTH)) {
    y[row + column] = static_cast<T>(values[i] * factor * float(weight[column]));
  }
}
