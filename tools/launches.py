"""Counts what a token of one sequence has a GPU launch, ours and mlx-lm's, without a GPU.

    python tools/launches.py

The graph that MLX evaluates is the same wherever it is built: the tool has the library believe that there is a GPU, and
counts the operations of each evaluation, traced ones as they were fused. Views launch nothing, joining n arrays n copies,
each of this library's kernels one. Copies that a back end makes for want of contiguous inputs are not seen. The model is
small, since sizes do not matter; every fourth layer is attention, as in Qwen3.5.
"""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from random_checkpoint import text_config, write_checkpoint

from flash_moe import Model
from flash_moe.nn.run_ahead import AheadSwitch
from flash_moe.ops import kernel
from flash_moe.ops.kernel import Kernel

LAYERS = 4
_VIEWS = {
    *("AsStrided", "Broadcast", "BroadcastAxes", "Contiguous", "Copy", "ExpandDims", "Flatten", "Full", "Reshape"),
    *("Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View"),
}
_NODE, _EDGE = re.compile(r'^\{ (\d+) \[label ="(\w+)"'), re.compile(r'^"\w+" -> (\d+)$')


class Launches:
    """Counts by operation, and how often something was evaluated."""

    def __init__(self) -> None:
        self.operations: Counter[str] = Counter()
        self.evaluations = 0

    @property
    def total(self) -> int:
        """All launches."""
        return sum(self.operations.values())

    def add(self, *arrays: Any) -> None:
        """Counts what evaluating these would launch now."""
        wanted = [array for _, array in tree_flatten(list(arrays)) if isinstance(array, mx.array)]
        with tempfile.NamedTemporaryFile("r", suffix=".dot") as file:
            mx.export_to_dot(file.name, *wanted)
            lines = file.read().splitlines()
        inputs = Counter(match[1] for line in lines if (match := _EDGE.match(line)))
        found: Counter[str] = Counter()
        for node, name in (match.groups() for line in lines if (match := _NODE.match(line))):
            if name not in _VIEWS:
                found[name] += inputs[node] if name == "Concatenate" else 1
        self.operations += found
        self.evaluations += bool(found)


@contextmanager
def counted() -> Iterator[Launches]:
    """Counts the evaluations within."""
    found, evaluate, start = Launches(), mx.eval, mx.async_eval

    def counting(then: Callable[..., None]) -> Callable[..., None]:
        def run(*arrays: Any) -> None:
            found.add(*arrays)
            then(*arrays)

        return run

    with patch.object(mx, "eval", counting(evaluate)), patch.object(mx, "async_eval", counting(start)):
        yield found


def _made_up(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """What a kernel gives: zeros, or, where these are ids, numbers that differ."""
    if dtype != mx.uint32:
        return mx.zeros(shape, dtype=dtype)
    return mx.array(np.arange(np.prod(shape), dtype=np.uint32).reshape(shape))


@contextmanager
def one_launch_each() -> Iterator[None]:
    """Within, those of MLX's operations that are one launch on a GPU, and many on the CPU, are one."""

    def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
        return mx.depends([mx.zeros(x.shape, dtype=x.dtype)], [x] if weight is None else [x, weight])[0]

    def rope(x: mx.array, *_: Any, offset: int | mx.array = 0, **options: Any) -> mx.array:
        inputs = [x] if isinstance(offset, int) else [x, offset]
        return mx.depends([mx.zeros(x.shape, dtype=x.dtype)], inputs)[0]

    def look(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        return mx.depends([mx.zeros(q.shape, dtype=q.dtype)], [q, k, v])[0]

    def dequantize(w: mx.array, scales: mx.array, *rest: Any, bits: int, dtype: Any = None, **options: Any) -> mx.array:
        shape, dtype = (*w.shape[:-1], w.shape[-1] * 32 // bits), dtype or scales.dtype
        return mx.depends([mx.zeros(shape, dtype=dtype)], [w, scales])[0]

    found = {"rms_norm": rms_norm, "rope": rope, "scaled_dot_product_attention": look}
    with patch.multiple(mx.fast, **found), patch.object(mx, "dequantize", dequantize):
        yield


@contextmanager
def as_on_a_gpu(back_end: str) -> Iterator[None]:
    """Within, the library believes that there is a GPU; its kernels are one operation each that computes nothing."""

    def launch(self: Kernel, inputs: Sequence[mx.array], **options: Any) -> list[mx.array]:
        shapes = zip(options["output_shapes"], options["output_dtypes"], strict=True)
        return mx.depends([_made_up(shape, dtype) for shape, dtype in shapes], list(inputs))

    with ExitStack() as stack:
        stack.enter_context(patch.object(kernel, "back_end", lambda: back_end))
        stack.enter_context(patch.object(Kernel, "__call__", launch))
        stack.enter_context(patch("flash_moe.ops.experts.use_blas", lambda *_: False))
        stack.enter_context(patch("flash_moe.ops.norm.on_cpu", lambda *_: False))
        stack.enter_context(one_launch_each())
        yield


class _Ahead(AheadSwitch):
    """Always ahead."""

    def __init__(self) -> None:
        super().__init__(LAYERS)
        self.ahead = True

    def record(self, seconds: float, misses: int) -> None:
        """Changes nothing."""


def make_checkpoint(folder: Path) -> Path:
    """Writes a small model with 4-bit weights in bfloat16."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
    text = text_config(num_hidden_layers=LAYERS, num_experts=32, **sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlx_lm import convert

        source, target = write_checkpoint(folder / "float", text), folder / "quantized"
        convert(str(source), str(target), quantize=True, q_bits=4, q_group_size=32, dtype="bfloat16")
    return target


def ours(folder: Path, kernels: bool, way: str, back_end: str = "cuda", k: int = 4) -> Launches:
    """Counts a token's launches.

    Args:
        way: "read back" waits for the indices of every layer, "ahead" runs ahead, "resident" never waits; "mapped" is
            the first with mapped records.
    """
    io = way if way in ("mapped", "resident") else "slots"
    options: dict[str, Any] = {"expert_io": io, "expert_cache": 1 << 20 if way == "ahead" else 0}
    with (
        as_on_a_gpu(back_end),
        patch("flash_moe.experts.opening._GROUP_BYTES", 0),
        Model.load(folder, experts_per_token=k, dtype="bfloat16", kernels=kernels, **options) as model,
    ):
        decoder, cache = model._decoder, model._decoder.new_cache()
        for _ in range(3):
            with counted() as found:
                mx.eval(decoder(mx.array([1]), cache), *cache.arrays)
            if decoder.run_ahead is not None:
                decoder.run_ahead.switch = _Ahead()
        return found


def mlx_lm(folder: Path) -> Launches:
    """Counts a token's launches of mlx-lm's model."""
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    cache = make_prompt_cache(model)
    for _ in range(2):
        with counted() as found, one_launch_each():
            hidden = model.language_model.model(mx.array([[1]]), cache=cache)
            mx.eval(hidden, [layer.state for layer in cache])
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_checkpoint(Path(scratch))
        rows = {"mlx-lm, resident": mlx_lm(folder)}
        for kernels in (False, True):
            for way in ("read back", "ahead", "resident", "mapped"):
                rows[f"kernels {'on' if kernels else 'off'}, {way}"] = ours(folder, kernels, way)
    print("| a token | launches per layer | evaluations per layer |\n|---|---|---|")
    for name, found in rows.items():
        print(f"| {name} | {found.total / LAYERS:.1f} | {found.evaluations / LAYERS:.1f} |")
    if "-v" in sys.argv:
        for name, found in rows.items():
            print(f"\n{name}: {dict(found.operations.most_common())}")


if __name__ == "__main__":
    main()
