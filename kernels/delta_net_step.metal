// The Gated DeltaNet step of one token after its input projections; a threadgroup per value head. Every element of the
// state is in one thread's registers, from its one read to its one write.
//
// projected: T, one after the other: qkv [CHANNELS] with CHANNELS = 2 · HK · DK + HV · DV, z [HV, DV], b [HV], a [HV]
// constants: float, one after the other: log_decay [HV], dt_bias [HV], norm_weight [DV], eps of the L2 norms, eps of the
// gated norm; conv_weight: [TAPS, CHANNELS]; conv_state: T [TAPS - 1, CHANNELS]; state: float [HV, DV, DK]
// y: T [HV, DV]; new_conv: T [TAPS - 1, CHANNELS]; new_state: float [HV, DV, DK]
constexpr uint SIMDGROUPS = THREADS / 32;
constexpr uint KEYS = HK * DK;
constexpr uint CHANNELS = 2 * KEYS + HV * DV;
constexpr uint Z = CHANNELS, B = Z + HV * DV, A = B + HV;   // places in projected
constexpr uint DT_BIAS = HV, NORM = 2 * HV, EPS = NORM + DV;  // and in constants
constexpr uint QUADS = DK / 4;                              // float4 in a row of the state
constexpr uint COUNT = (QUADS + 31) / 32;                   // of these a lane has COUNT
constexpr uint ROWS = (DV + SIMDGROUPS - 1) / SIMDGROUPS;   // rows of a simdgroup
threadgroup float mixed[2 * DK + DV];                       // q, k and v after the convolution
threadgroup float reads[DV];                                // S · q

const uint thread_id = thread_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup;
const uint sg = simdgroup_index_in_threadgroup;
const uint head = threadgroup_position_in_grid.x;
const uint key_head = head / (HV / HK);
const device float4* state4 = (const device float4*)state + head * DV * QUADS;
device float4* new_state4 = (device float4*)new_state + head * DV * QUADS;

// the longest wait first: all of the state is under way before anything else begins
float s[ROWS][COUNT][4];
for (uint r = 0; r < ROWS; r++) {
  const uint row = r * SIMDGROUPS + sg;
  for (uint i = 0; i < COUNT; i++) {
    const uint quad = i * 32 + lane;
    if (row < uint(DV) && quad < QUADS) {
      const float4 v = state4[row * QUADS + quad];
      s[r][i][0] = v.x;
      s[r][i][1] = v.y;
      s[r][i][2] = v.z;
      s[r][i][3] = v.w;
    } else {
      for (uint c = 0; c < 4; c++) {
        s[r][i][c] = 0.0f;
      }
    }
  }
}

// convolution and SiLU; key channels are computed by every head that shares them and written by the first
for (uint i = thread_id; i < uint(2 * DK + DV); i += THREADS) {
  uint channel = 2 * KEYS + head * DV + (i - 2 * DK);
  if (i < uint(DK)) {
    channel = key_head * DK + i;
  } else if (i < uint(2 * DK)) {
    channel = KEYS + key_head * DK + (i - DK);
  }
  const bool writes = i >= uint(2 * DK) || head % (HV / HK) == 0;
  float sum = 0.0f;
  for (uint tap = 0; tap < uint(TAPS); tap++) {
    const T x = tap + 1 < uint(TAPS) ? conv_state[tap * CHANNELS + channel] : projected[channel];
    sum = metal::fma(float(conv_weight[tap * CHANNELS + channel]), float(x), sum);
    if (writes && tap > 0) {
      new_conv[(tap - 1) * CHANNELS + channel] = x;
    }
  }
  mixed[i] = sum / (1.0f + metal::exp(-sum));
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// a lane's part of q and k, normalised; every simdgroup sums for itself, which saves a barrier
float q[COUNT][4];
float k[COUNT][4];
float q_squares = 0.0f;
float k_squares = 0.0f;
for (uint i = 0; i < COUNT; i++) {
  const uint quad = i * 32 + lane;
  for (uint c = 0; c < 4; c++) {
    q[i][c] = quad < QUADS ? mixed[4 * quad + c] : 0.0f;
    k[i][c] = quad < QUADS ? mixed[DK + 4 * quad + c] : 0.0f;
    q_squares = metal::fma(q[i][c], q[i][c], q_squares);
    k_squares = metal::fma(k[i][c], k[i][c], k_squares);
  }
}
const float q_factor = metal::rsqrt(simd_sum(q_squares) + constants[EPS]) * metal::rsqrt(float(DK));
const float k_factor = metal::rsqrt(simd_sum(k_squares) + constants[EPS]);
for (uint i = 0; i < COUNT; i++) {
  for (uint c = 0; c < 4; c++) {
    q[i][c] *= q_factor;
    k[i][c] *= k_factor;
  }
}

// softplus(t) = max(t, 0) + log(1 + e), e = exp(-|t|); the quotient corrects the rounding of 1 + e
const float t = float(projected[A + head]) + constants[DT_BIAS + head];
const float e = metal::exp(-metal::abs(t));
const float u = 1.0f + e;
const float dt = metal::max(t, 0.0f) + (u == 1.0f ? e : metal::log(u) * (e / (u - 1.0f)));
const float decay = metal::exp(dt * constants[head]);
const float beta = 1.0f / (1.0f + metal::exp(-float(projected[B + head])));

for (uint r = 0; r < ROWS; r++) {
  const uint row = r * SIMDGROUPS + sg;
  if (row < uint(DV)) {
    float found = 0.0f;  // what the decayed state holds for k
    for (uint i = 0; i < COUNT; i++) {
      for (uint c = 0; c < 4; c++) {
        s[r][i][c] *= decay;
        found = metal::fma(s[r][i][c], k[i][c], found);
      }
    }
    const float write = beta * (mixed[2 * DK + row] - simd_sum(found));
    float read = 0.0f;
    for (uint i = 0; i < COUNT; i++) {
      for (uint c = 0; c < 4; c++) {
        s[r][i][c] = metal::fma(write, k[i][c], s[r][i][c]);
        read = metal::fma(s[r][i][c], q[i][c], read);
      }
      const uint quad = i * 32 + lane;
      if (quad < QUADS) {
        new_state4[row * QUADS + quad] = float4(s[r][i][0], s[r][i][1], s[r][i][2], s[r][i][3]);
      }
    }
    read = simd_sum(read);
    if (lane == 0) {
      reads[row] = read;
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// gated norm: RMSNorm(S · q) · weight · SiLU(z)
float squares = 0.0f;
for (uint i = lane; i < uint(DV); i += 32) {
  squares = metal::fma(reads[i], reads[i], squares);
}
const float factor = metal::rsqrt(simd_sum(squares) / float(DV) + constants[EPS + 1]);
for (uint i = thread_id; i < uint(DV); i += THREADS) {
  const float gate = float(projected[Z + head * DV + i]);
  const float silu = gate / (1.0f + metal::exp(-gate));
  y[head * DV + i] = static_cast<T>(reads[i] * factor * constants[NORM + i] * silu);
}
