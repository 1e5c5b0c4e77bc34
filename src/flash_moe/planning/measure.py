"""Measures the cost of work on this machine, in a few measurements of about a second each."""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from ..bench.fetches import Streaming, fetch_speed
from ..checkpoint.records import RecordTable
from ..generation.sampling import Sampler, Sampling
from ..loading import prove_kernels
from ..models import AdaptedFiles, ModelFiles
from ..nn.linear import Linear
from ..ops.blas import matmul
from ..ops.dispatch import kernels
from ..ops.linear import linear
from ..record import Part, RecordLayout
from .chips import predicted
from .costs import Costs, ReadCost
from .needs import Needs
from .probe import Probe, made_up_array, run_seconds

_READ_SECONDS = 0.3  # seconds for each kind of fetch
_HEAD_BYTES = 64 << 20  # bytes of a matrix; more than the caches of processors
_ROWS, _COLUMNS = 256, 4096  # rows of a large product


def measure(
    checkpoint: ModelFiles | AdaptedFiles,
    table: RecordTable,
    needs: Needs,
    dtype: mx.Dtype,
    expert_io: str,
    *,
    here: bool,
) -> Costs:
    """Times layers with random weights, and reads of experts. Layers of mlx-lm's networks are predicted from products.

    Args:
        dtype: dtype of activations.
        here: whether the weights are on this machine, so that reads can be timed.

    Raises:
        ExpertReadError: a record cannot be read.
    """
    reads = _reads(table, needs, expert_io) if here and table.layouts and expert_io != "resident" else None
    if isinstance(checkpoint, AdaptedFiles):
        return predicted(needs, _record_bandwidth(table.layouts[0], dtype), _flops(checkpoint, dtype), reads)
    prove_kernels(checkpoint, table.layouts, needs.experts_per_token, dtype)
    probe = Probe(checkpoint, table, needs.experts_per_token, dtype, expert_io)
    record, row = probe.expert_costs()
    bandwidth, flops = _bandwidth(checkpoint, dtype), _flops(checkpoint, dtype)
    return Costs(bandwidth, flops, probe.layer_costs(), record, row, _draw(checkpoint), reads)


def _reads(table: RecordTable, needs: Needs, expert_io: str) -> ReadCost | None:
    kind: Streaming = "mapped" if expert_io == "mapped" else "slots"
    token = fetch_speed(table, kind, min(needs.experts_per_token, table.num_experts), _READ_SECONDS)
    group = fetch_speed(table, kind, needs.capacity, _READ_SECONDS)
    return ReadCost(token.cold or token.warm, group.cold or group.warm, token.warm, group.warm)


def _bandwidth(checkpoint: ModelFiles, dtype: mx.Dtype) -> float:
    """Measures the bytes per second of the output head's matrix in a matrix-vector product."""
    module = checkpoint.head
    stored = {part: checkpoint.resident.get(f"{module}.{part}") for part in ("weight", "scales", "biases")}
    weight = stored["weight"]
    assert weight is not None  # Model.load raises a better error
    rows = max(1, min(_HEAD_BYTES * weight.shape[0] // weight.nbytes, 4 * weight.shape[0]))
    arrays = {
        part: None if info is None else made_up_array(info.dtype, (rows, *info.shape[1:]))
        for part, info in stored.items()
    }
    on_cpu = checkpoint.uses_cpu_kernels({}, checkpoint.shape.experts_per_token, dtype)
    held = {
        part: array if array is None or on_cpu or array.dtype in (mx.uint32, mx.uint8) else array.astype(dtype)
        for part, array in arrays.items()
    }
    scales = stored["scales"]
    quantization = None if scales is None else checkpoint.quantization.of([module], weight, scales)
    x = made_up_array("F32", (1, checkpoint.shape.hidden_size)).astype(dtype)
    matrix = held["weight"], held["scales"], held["biases"], quantization
    if on_cpu:
        from ..nn.cpu_timed import product

        multiply = product(Linear(*matrix), x)  # type: ignore[arg-type]
    else:
        multiply = partial(linear, x, *matrix)  # type: ignore[arg-type]
    with kernels(None):
        seconds = run_seconds(multiply)
    return sum(array.nbytes for array in held.values() if array is not None) / seconds


def _record_bandwidth(layout: RecordLayout, dtype: mx.Dtype) -> float:
    """Measures the bytes per second of MLX's matrix-vector product, for a matrix in the format of the experts."""
    first = next(iter(layout.linears.values()))
    rows = _HEAD_BYTES // (first.weight.nbytes // first.rows)

    def made_up(part: Part | None) -> mx.array | None:
        if part is None:
            return None
        array = made_up_array(part.dtype, (rows, part.shape[-1]))
        return array if array.dtype in (mx.uint32, mx.uint8) else array.astype(dtype)

    weight, scales, biases = made_up(first.weight), made_up(first.scales), made_up(first.biases)
    assert weight is not None
    x, q = made_up_array("F32", (1, first.columns)).astype(dtype), first.quantization
    if q is None or scales is None:
        return weight.nbytes / run_seconds(lambda: x @ weight.T)
    seconds = run_seconds(lambda: mx.quantized_matmul(x, weight, scales, biases, transpose=True, **q.to_json()))
    return sum(part.nbytes for part in (weight, scales, biases) if part is not None) / seconds


def _flops(checkpoint: ModelFiles | AdaptedFiles, dtype: mx.Dtype) -> float:
    """Measures the operations per second of a product with many rows."""
    hidden = checkpoint.shape.hidden_size
    a, b = (made_up_array("F32", shape).astype(dtype) for shape in ((_ROWS, hidden), (hidden, _COLUMNS)))
    return 2.0 * _ROWS * hidden * _COLUMNS / run_seconds(lambda: matmul(a, b))


def _draw(checkpoint: ModelFiles) -> float:
    """Measures the seconds to sample a token."""
    logits, draw = made_up_array("F32", (checkpoint.dimensions.vocab_size,)), Sampler(Sampling(temperature=1.0))
    return run_seconds(lambda: draw(logits))
