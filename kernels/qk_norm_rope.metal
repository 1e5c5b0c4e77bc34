// RMSNorm of every query and key head, rotary embedding of its first ROTARY elements, and the split of query and gate;
// a simdgroup per token and head.
//
// qg: T [tokens, HQ, 2, D], query and gate; k: T [tokens, HKV, D]; q_weight, k_weight: [D]; eps: float [1]
// frequencies: float [2, ROTARY / 2], turns per position, each the sum of two floats; place: int [2], start and tokens
// q_out: T [HQ, tokens, D]; k_out: T [HKV, tokens, D]; gate: T [tokens, HQ, D]
constexpr uint HEADS = HQ + HKV;
constexpr uint HALF = ROTARY / 2;

const uint lane = thread_index_in_simdgroup;
const uint row = threadgroup_position_in_grid.x * uint(SIMDGROUPS) + simdgroup_index_in_threadgroup;
const uint tokens = uint(place[1]);
if (row >= tokens * HEADS) {
  return;
}
const uint token = row / HEADS;
const uint head = row % HEADS;
const bool is_query = head < uint(HQ);
const uint kv_head = is_query ? 0 : head - uint(HQ);
const device T* x = is_query ? qg + (token * HQ + head) * 2 * D : k + (token * HKV + kv_head) * D;
device T* y = is_query ? q_out + (head * tokens + token) * D : k_out + (kv_head * tokens + token) * D;

float sum = 0.0f;
for (uint i = lane; i < uint(D); i += 32) {
  const float value = float(x[i]);
  sum = metal::fma(value, value, sum);
}
const float factor = metal::rsqrt(simd_sum(sum) / float(D) + eps[0]);

const float position = float(uint(place[0]) + token);
for (uint i = lane; i < HALF; i += 32) {
  // n is any integer near the number of turns, so that position · frequency − n is rounded only once it is small
  const float n = metal::rint(position * frequencies[i]);
  const float turn = metal::fma(position, frequencies[i], -n) + position * frequencies[HALF + i];
  const float angle = 6.28318530717958647692f * turn;
  const float cosine = metal::cos(angle);
  const float sine = metal::sin(angle);
  const float a = float(x[i]) * factor * float(is_query ? q_weight[i] : k_weight[i]);
  const float b = float(x[i + HALF]) * factor * float(is_query ? q_weight[i + HALF] : k_weight[i + HALF]);
  y[i] = static_cast<T>(a * cosine - b * sine);
  y[i + HALF] = static_cast<T>(b * cosine + a * sine);
}
for (uint i = ROTARY + lane; i < uint(D); i += 32) {
  y[i] = static_cast<T>(float(x[i]) * factor * float(is_query ? q_weight[i] : k_weight[i]));
}
if (is_query) {
  for (uint i = lane; i < uint(D); i += 32) {
    gate[(token * HQ + head) * D + i] = x[D + i];
  }
}
