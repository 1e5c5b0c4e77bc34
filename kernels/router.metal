// softmax over the experts of a token and the K largest, in descending order; ties go to the lower expert.
//
// logits   T  [tokens, E]
// ids      u32 [tokens, K]
// weights  f32 [tokens, K + SHARED]: probabilities, divided by their sum where NORMALIZE; NaN where any logit is NaN
// SHARED_LOGIT(token) float: generated; its sigmoid follows the K weights where SHARED
//
// One simdgroup per token, with all logits in registers: no threadgroup memory and no barrier. Experts lane, lane + 32,
// ... are a lane's own. A logit is kept as a key, an unsigned integer of the same order, and 0 once it is taken.
constexpr int OWN = (E + 31) / 32;
const uint lane = thread_index_in_simdgroup;
const uint token = threadgroup_position_in_grid.x;

uint keys[OWN];
bool bad = false;
#pragma unroll
for (int i = 0; i < OWN; i++) {
  const uint e = lane + 32 * i;
  keys[i] = 0;
  if (e < uint(E)) {
    const float logit = float(logits[token * E + e]);
    bad = bad || metal::isnan(logit);
    keys[i] = order_key(logit);
  }
}
bad = simd_any(bad);

float largest = 0.0f, taken = 0.0f, mine = 0.0f;
uint my_id = 0;
for (int k = 0; k < K; k++) {
  uint key = 0, own = 0;
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    if (keys[i] > key) {
      key = keys[i];
      own = i;
    }
  }
  const uint best = simd_max(key);
  const uint id = simd_min(key == best ? lane + 32 * own : 0xffffffffu);
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    if (lane + 32 * i == id) keys[i] = 0;
  }

  const float logit = key_value(best);
  if (k == 0) {
    largest = logit;
    if (!NORMALIZE) {
      // the sum over all experts, of which this one has just left `keys`
#pragma unroll
      for (int i = 0; i < OWN; i++) taken += keys[i] == 0 ? 0.0f : metal::exp(key_value(keys[i]) - largest);
      taken = simd_sum(taken) + metal::exp(logit - largest);
    }
  }
  const float e = metal::exp(logit - largest);
  if (NORMALIZE) taken += e;
  if (lane == uint(k)) {
    mine = e;
    my_id = id;
  }
}

if (lane < uint(K)) {
  ids[token * K + lane] = my_id;
  weights[token * (K + SHARED) + lane] = bad ? NAN : mine / taken;
}
if (SHARED && lane == 0) weights[token * (K + SHARED) + K] = 1.0f / (1.0f + metal::exp(-SHARED_LOGIT(token)));
