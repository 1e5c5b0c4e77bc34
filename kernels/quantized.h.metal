// Dot products with quantised weights: w = scale * q + bias, q packed from the least significant bit on.
//
// The unit of work is a block: 32 consecutive weights of one row. At any bit width it is BITS whole words. As group sizes
// are multiples of 32 it has one scale and one bias; nvfp4 has groups of 16, hence two scales, and no mode but the affine
// one has a bias. A block is read whole and multiplied in 4 chunks of 8.

// How a weight is multiplied, cheapest last; all three sum in float32.
enum Form {
  NAIVE,    // sum += (q * scale + bias) * x
  FUSED,    // sum = fma(q, scale * x, fma(bias, x, sum))
  HOISTED,  // scale * (sum of q * x) + bias * (sum of x): the sum of x is shared by all rows
};

// How q and scale are stored. Affine: an integer, and a float. Else q is e2m1 (4 bits) or e4m3 (8), and the scale e8m0, or
// for nvfp4 e4m3. Both small floats are a half with fewer bits, which is 2^14 or 2^8 too small: the scale makes up for it.
enum Mode { AFFINE, MXFP4, NVFP4, MXFP8 };

// words: BITS words of a row, 16-byte aligned where BITS % 4 == 0 and 8-byte aligned where it is even.
template <int BITS>
METAL_FUNC void load_block(const device uint* words, thread uint* block) {
  if (BITS % 4 == 0) {
    for (int i = 0; i < BITS / 4; i++) {
      const uint4 four = ((const device uint4*)words)[i];
      block[4 * i] = four.x;
      block[4 * i + 1] = four.y;
      block[4 * i + 2] = four.z;
      block[4 * i + 3] = four.w;
    }
  } else if (BITS % 2 == 0) {
    for (int i = 0; i < BITS / 2; i++) {
      const uint2 two = ((const device uint2*)words)[i];
      block[2 * i] = two.x;
      block[2 * i + 1] = two.y;
    }
  } else {
    for (int i = 0; i < BITS; i++) block[i] = words[i];
  }
}

// Weight i of a block as a float. Its bits become the low bits of the mantissa of a power of two, which is then
// subtracted: exact, and cheaper than a conversion from integer, which runs at a fraction of the rate.
// With i known at compile time that is and-or, subtract; the power is chosen so that the bits need no shift.
template <int BITS>
METAL_FUNC float quantized_weight(const thread uint* block, int i) {
  const uint mask = (1u << BITS) - 1;
  const int first = i * BITS, word = first / 32;
  int at = first % 32;
  uint bits = block[word];
  if (at + BITS > 32) {
    bits = (bits >> at) | (block[word + 1] << (32 - at));
    at = 0;
  } else if (at >= 16) {
    bits >>= 16;
    at -= 16;
  }
  // 2^(23 - at): a mantissa of 23 bits counts in steps of 2^-at
  const uint power = uint(150 - at) << 23;
  return as_type<float>((bits & (mask << at)) | power) - as_type<float>(power);
}

// e2m1 or e4m3 in the lowest bits, in the places of a half.
template <int BITS>
METAL_FUNC float small_float(uint bits) {
  const uint sign = 1u << (BITS - 1), places = BITS == 4 ? 9 : 7;
  return float(as_type<half>(ushort(((bits & (sign - 1)) << places) | ((bits & sign) << (16 - BITS)))));
}

// The weights of a chunk: q[8].
template <int BITS, int MODE>
METAL_FUNC void unpack_chunk(const thread uint* block, int chunk, thread float* q) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int first = (8 * chunk + i) * BITS;
    q[i] = MODE == AFFINE ? quantized_weight<BITS>(block, 8 * chunk + i)
                          : small_float<BITS == 8 ? 8 : 4>(block[first / 32] >> (first % 32));
  }
}

// A scale as a float, with what makes up for small floats.
template <int MODE, typename S>
METAL_FUNC float read_scale(const device S* scales, uint i) {
  return float(scales[i]);
}

template <int MODE>
METAL_FUNC float read_scale(const device uchar* scales, uint i) {
  if (MODE == NVFP4) return small_float<8>(scales[i]) * 4194304.0f;  // 2^(8 + 14)
  return as_type<float>(uint(scales[i]) << 23) * (MODE == MXFP4 ? 16384.0f : 256.0f);
}

// What a product is multiplied with: the global scale at a word of a record, over the largest one; at 0 there is none.
template <int AT>
METAL_FUNC float global_factor(const device uint* record) {
  return AT == 0 ? 1.0f : as_type<float>(record[AT]) / 2688.0f;
}

// 8 elements of x, which start at a multiple of 16 bytes.
METAL_FUNC void load_chunk(const device float* x, thread float* out) {
  for (int i = 0; i < 2; i++) {
    const float4 four = ((const device float4*)x)[i];
    out[4 * i] = four.x;
    out[4 * i + 1] = four.y;
    out[4 * i + 2] = four.z;
    out[4 * i + 3] = four.w;
  }
}

METAL_FUNC void load_chunk(const device half* x, thread float* out) {
  uint words[4];
  load_block<4>((const device uint*)x, words);
  for (int i = 0; i < 4; i++) {
    const half2 two = as_type<half2>(words[i]);
    out[2 * i] = float(two.x);
    out[2 * i + 1] = float(two.y);
  }
}

METAL_FUNC void load_chunk(const device bfloat16_t* x, thread float* out) {
  uint words[4];
  load_block<4>((const device uint*)x, words);
  for (int i = 0; i < 4; i++) {
    out[2 * i] = as_type<float>(words[i] << 16);
    out[2 * i + 1] = as_type<float>(words[i] & 0xffff0000u);
  }
}

METAL_FUNC float sum_chunk(const thread float* x) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// sum + the chunk's part of one row; HOISTED leaves scale and bias to `finish_block`.
template <int FORM>
METAL_FUNC float dot_chunk(const thread float* q, const thread float* x, float scale, float bias, float sum) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    if (FORM == NAIVE) {
      sum += (q[i] * scale + bias) * x[i];
    } else if (FORM == FUSED) {
      sum = metal::fma(q[i], scale * x[i], metal::fma(bias, x[i], sum));
    } else {
      sum = metal::fma(q[i], x[i], sum);
    }
  }
  return sum;
}

// sum + a block, of which `dot` is what dot_chunk returned and `x_sum` the sum of its x.
template <int FORM>
METAL_FUNC float finish_block(float dot, float x_sum, float scale, float bias, float sum) {
  return FORM == HOISTED ? metal::fma(scale, dot, metal::fma(bias, x_sum, sum)) : sum + dot;
}

// The sum over the LANES neighbouring lanes that share a row, in each of them.
template <int LANES>
METAL_FUNC float sum_lanes(float x) {
  if (LANES == 32) return simd_sum(x);
  for (int d = LANES / 2; d > 0; d /= 2) x += simd_shuffle_xor(x, d);
  return x;
}
