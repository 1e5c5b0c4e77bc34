"""A 4-bit matrix-vector product: kernels of the kind that the library has, their data and their oracle."""

import math
from dataclasses import dataclass

import emulator
import mlx.core as mx
import numpy as np

GROUP = 64  # weights that share a scale and a bias
ROWS = 4  # rows per simdgroup

# w[i] = scale * q[i] + bias, as two fused operations per weight
HEADER = """
template <typename T>
METAL_FUNC float dot8(uint packed, const thread float* x, float scale, float bias, float sum) {
  for (uint i = 0; i < 8; i++) {
    float q = float((packed >> (4 * i)) & 0xF);
    sum = metal::fma(q, scale * x[i], metal::fma(bias, x[i], sum));
  }
  return sum;
}
"""

# w: uint32 [OUT, IN / 8], scales and biases: T [OUT, IN / 64], x: T [IN]
SOURCE = """
  constexpr uint ROWS = 4;
  const uint lane = thread_index_in_simdgroup;
  const uint group = threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup;
  const uint row0 = group * ROWS;
  if (row0 >= uint(OUT)) return;
  const device uint4* w4 = (const device uint4*)w;
  float sums[ROWS] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (uint block = lane; block < uint(IN) / 32; block += 32) {
    float xs[32];
    const device vec<T, 4>* x4 = (const device vec<T, 4>*)(x + block * 32);
    for (uint j = 0; j < 8; j++) {
      float4 v = float4(x4[j]);
      xs[4 * j] = v.x; xs[4 * j + 1] = v.y; xs[4 * j + 2] = v.z; xs[4 * j + 3] = v.w;
    }
    for (uint r = 0; r < ROWS; r++) {
      const uint row = row0 + r;
      uint4 p = w4[row * (IN / 32) + block];
      const float scale = float(scales[row * (IN / 64) + block / 2]);
      const float bias = float(biases[row * (IN / 64) + block / 2]);
      sums[r] = dot8<T>(p.x, xs, scale, bias, sums[r]);
      sums[r] = dot8<T>(p.y, xs + 8, scale, bias, sums[r]);
      sums[r] = dot8<T>(p.z, xs + 16, scale, bias, sums[r]);
      sums[r] = dot8<T>(p.w, xs + 24, scale, bias, sums[r]);
    }
  }
  for (uint r = 0; r < ROWS; r++) {
    const float total = simd_sum(sums[r]);
    if (lane == 0) out[row0 + r] = static_cast<T>(total);
  }
"""

# The same with x staged in threadgroup memory, once for all simdgroups.
STAGED = (
    SOURCE.replace(
        "  constexpr uint ROWS = 4;\n",
        """  constexpr uint ROWS = 4;
  threadgroup float staged[IN];
  const uint thread_id = thread_index_in_threadgroup;
  for (uint i = thread_id; i < uint(IN); i += threads_per_threadgroup.x) {
    staged[i] = float(x[i]);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
""",
    )
    .replace(
        "const device vec<T, 4>* x4 = (const device vec<T, 4>*)(x +",
        "const threadgroup float4* x4 = (const threadgroup float4*)(staged +",
    )
    .replace("float4 v = float4(x4[j]);", "float4 v = x4[j];")
)

UNIT_ROUNDOFF = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}


def float64(array: mx.array) -> np.ndarray:
    """An `mx.array` of any float type, exactly."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


@dataclass(frozen=True)
class Case:
    """Random weights with their exact product.

    Attributes:
        inputs: w, scales, biases, x.
        expected: float64 [out].
        magnitude: The sum of the absolute values of each row's terms, which bounds the rounding of float sums.
        dtype: Of scales, biases, x and the output.
    """

    inputs: list[mx.array]
    expected: np.ndarray
    magnitude: np.ndarray
    dtype: mx.Dtype

    @classmethod
    def random(cls, rows: int, columns: int, dtype: mx.Dtype, seed: int = 0) -> "Case":
        rng = np.random.default_rng(seed)
        q = rng.integers(0, 16, (rows, columns), dtype=np.uint32)
        packed = sum(q[:, i::8] << np.uint32(4 * i) for i in range(8))
        groups = (rows, columns // GROUP)
        scales, biases, x = (
            mx.array(values.astype(np.float32)).astype(dtype)
            for values in (
                rng.uniform(0.005, 0.02, groups),
                rng.uniform(-0.15, -0.05, groups),
                rng.normal(size=columns),
            )
        )
        weights = q * np.repeat(float64(scales), GROUP, 1) + np.repeat(float64(biases), GROUP, 1)
        terms = weights * float64(x)
        return cls([mx.array(packed), scales, biases, x], terms.sum(1), np.abs(terms).sum(1), dtype)

    def error(self, found: mx.array, roundings: int = 2) -> float:
        """The largest error in units of what is allowed.

        Args:
            found: The kernel's output.
            roundings: Allowed in the float sums, in units of `magnitude` at float32, beside half an ulp of the output.
        """
        allowed = UNIT_ROUNDOFF[self.dtype] * np.abs(self.expected) + roundings * 2.0**-24 * self.magnitude
        error = np.max(np.abs(float64(found) - self.expected) / allowed)
        return math.inf if np.isnan(error) else float(error)


def run(case: Case, source: str = SOURCE, header: str = HEADER, simdgroups: int = 2, **options) -> mx.array:
    """The kernel `source` on `case`; `options` are the emulator's."""
    rows, columns = case.inputs[0].shape[0], case.inputs[3].shape[0]
    kernel = emulator.metal_kernel("matvec", ["w", "scales", "biases", "x"], ["out"], source, header, **options)
    (out,) = kernel(
        inputs=case.inputs,
        template=[("T", case.dtype), ("OUT", rows), ("IN", columns)],
        grid=(32 * simdgroups * -(-rows // (ROWS * simdgroups)), 1, 1),
        threadgroup=(32 * simdgroups, 1, 1),
        output_shapes=[(rows,)],
        output_dtypes=[case.dtype],
    )
    return out
