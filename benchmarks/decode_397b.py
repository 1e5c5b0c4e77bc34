"""Decoding on a GPU with the layer sizes of Qwen3.5-397B-A17B, resident, against mlx-lm on the same weights.

    python benchmarks/decode_397b.py [--layers 8] [--k 4]

Random 4-bit weights in groups of 64. flash_moe runs as for a resident model, where the host never waits, as it never
does in mlx-lm; with the router's indices read back in every layer, as streaming needs, with kernels and without; and
ahead of the host, with all experts loaded and with misses in a share of experts, drawn anew for every token (reading
them takes no time here); also in the way that the library chooses by itself. Kernels are those that prove themselves
first; what that takes is printed, and again when it is remembered.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from random_checkpoint import tensor_shapes  # noqa: E402
from sparse_checkpoint import FULL_SIZE, GATES, QUANTIZATION  # noqa: E402
from turns import medians  # noqa: E402

from flash_moe.checkpoint.names import module_path  # noqa: E402
from flash_moe.experts.store import ExpertStore  # noqa: E402
from flash_moe.models.qwen3_5 import Qwen35  # noqa: E402
from flash_moe.nn.decoder import Decoder  # noqa: E402
from flash_moe.nn.needed_kernels import needed_kernels  # noqa: E402
from flash_moe.nn.run_ahead import AheadSwitch, best_length  # noqa: E402
from flash_moe.nn.streaming_options import PLAIN  # noqa: E402
from flash_moe.nn.weights import Weights  # noqa: E402
from flash_moe.proofs.prover import name_of, prove  # noqa: E402
from flash_moe.record import PROJECTIONS, ProjectionFormat, RecordLayout  # noqa: E402

TOKENS, WARM_UP, REPEATS = 40, 8, 5


Parts = dict[int, dict[str, mx.array]]


class Banks(ExpertStore):
    """Banks that are in memory already, of whole records or by part."""

    def __init__(self, banks: Any, experts: int, layout: RecordLayout, no_wait: bool, missing: float | None) -> None:
        super().__init__(dict.fromkeys(banks, layout), experts)
        self._banks, self.no_wait = banks, no_wait
        self.by_part = isinstance(banks[0], dict)
        self.keeps_experts, self._missing = missing is not None, missing or 0.0
        self._table, self._random = mx.arange(experts, dtype=mx.uint32), np.random.default_rng(0)

    def ahead(self, layer: int) -> tuple[Any, mx.array]:
        return self._banks[layer], self._table

    def _loaded_layers(self, layers: Any, ids: np.ndarray) -> int:
        whole = (self._random.random(ids.shape) >= self._missing).all(axis=1)
        return len(layers) if whole.all() else int(whole.argmin())

    def _arrive(self, layer: int, experts: Any) -> Iterator[int]:
        return iter(experts)

    def _bank_of(self, layer: int) -> Any:
        return self._banks[layer]

    def _whole(self, layer: int) -> Any:
        return self._banks[layer] if self.no_wait else None

    def in_memory(self, layer: int, experts: Any) -> list[bool]:
        return [True] * len(experts)

    def prefetch(self, layer: int, experts: Any) -> None: ...

    def close(self) -> None: ...


class Ahead(AheadSwitch):
    """Always ahead, as far as it is best with this share of layers that lack an expert."""

    def __init__(self, missing: float, layers: int) -> None:
        super().__init__(layers)
        self.ahead, self.length = True, max(2, best_length(missing, layers)[0])

    def record(self, seconds: float, misses: int) -> None: ...


class Chosen(AheadSwitch):
    """Chooses as the library does, with this many experts missing of a token."""

    def __init__(self, missing: float, layers: int) -> None:
        super().__init__(layers)
        self._each, self._rest = missing, 0.0

    def record(self, seconds: float, misses: int) -> None:
        self._rest += self._each
        super().record(seconds, int(self._rest))
        self._rest %= 1


def quantized(shape: tuple[int, ...], q: Any) -> tuple[mx.array, mx.array, mx.array]:
    """Random packed weights of mean zero with scales that keep activations near one."""
    *rows, columns = shape
    words = mx.random.randint(-(1 << 31), (1 << 31) - 1, (*rows, columns * q.bits // 32), dtype=mx.int32).view(
        mx.uint32
    )
    scales = mx.full((*rows, columns // q.group_size), columns**-0.5 / (1 << (q.bits - 2)), dtype=mx.bfloat16)
    biases = -scales * (((1 << q.bits) - 1) / 2)
    mx.eval(words, scales, biases)
    return words, scales, biases


def resident(text: dict[str, Any]) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Canonical names to arrays, and quantisation by module."""
    arrays: dict[str, mx.array] = {}
    modules: dict[str, Any] = {}
    for name, shape in tensor_shapes(text).items():
        if ".experts." in name:
            continue
        if name.endswith("conv1d.weight"):
            arrays[name] = (0.5 * mx.random.normal((shape[2], shape[0]))).astype(mx.bfloat16)
        elif name.endswith(("A_log", "dt_bias")):
            arrays[name] = mx.zeros(shape)
        elif len(shape) == 1:
            arrays[name] = mx.ones(shape, dtype=mx.bfloat16)
        else:
            q = GATES if name.endswith(("mlp.gate.weight", "shared_expert_gate.weight")) else QUANTIZATION
            modules[module_path(name)] = q
            for kind, array in zip(("weight", "scales", "biases"), quantized(shape, q), strict=True):
                arrays[f"{module_path(name)}.{kind}"] = array
    return arrays, modules


def make_banks(text: dict[str, Any], layout: RecordLayout) -> dict[int, mx.array]:
    count, banks = text["num_experts"], {}
    for layer in range(text["num_hidden_layers"]):
        parts = []
        for name, projection in layout.projections:
            size, hidden = text["moe_intermediate_size"], text["hidden_size"]
            shape = (count, hidden, size) if name == "down_proj" else (count, size, hidden)
            for array in quantized(shape, projection.quantization):
                flat = array if array.dtype == mx.uint32 else array.view(mx.uint32)
                parts.append(flat.reshape(count, -1))
        banks[layer] = mx.concatenate(parts, axis=1)
        mx.eval(banks[layer])
        mx.clear_cache()
    assert banks[0].shape[1] * 4 == layout.stride
    return banks


def parts_of_banks(banks: dict[int, mx.array], layout: RecordLayout) -> Parts:
    """Copies of the banks with an array for each part of the records, as mlx-lm has them."""
    found: Parts = {}
    for layer, bank in banks.items():
        found[layer] = {}
        for part in layout.parts:
            words = bank[:, part.offset // 4 : (part.offset + part.nbytes) // 4]
            typed = words if part.dtype == "U32" else words.view(mx.bfloat16)
            found[layer][part.key] = mx.contiguous(typed.reshape(len(bank), *part.shape))
        mx.eval(found[layer])
        mx.clear_cache()
    return found


def mlx_lm_model(text: dict[str, Any], arrays: Any, modules: Any, parts: Parts) -> Any:
    """mlx-lm's model with the same weights."""
    from mlx import nn
    from mlx_lm.models import qwen3_5_moe

    model = qwen3_5_moe.Model(qwen3_5_moe.ModelArgs.from_dict({"model_type": "qwen3_5_moe", "text_config": text}))

    def predicate(path: str, module: Any) -> Any:
        gate = path.endswith(("mlp.gate", "shared_expert_gate"))
        return hasattr(module, "to_quantized") and {"group_size": 64, "bits": 8 if gate else 4}

    nn.quantize(model, class_predicate=predicate)
    weights = []
    for name, array in arrays.items():
        if name.endswith("conv1d.weight"):
            array = array.T[..., None]
        weights.append((Qwen35().mlx_name(name), array))
    for layer, by_part in parts.items():
        for name, array in by_part.items():
            weights.append((f"language_model.model.layers.{layer}.mlp.switch_mlp.{name}", array))
    model.load_weights(weights)
    mx.eval(model.parameters())
    return model


def mlx_lm_run(model: Any) -> Callable[[], float]:
    from mlx_lm.generate import generate_step

    def run() -> float:
        for number, _ in enumerate(generate_step(mx.array([1, 2, 3]), model, max_tokens=TOKENS + WARM_UP)):
            if number == WARM_UP - 1:
                start = time.perf_counter()
        return (time.perf_counter() - start) / TOKENS

    return run


def our_run(decoder: Decoder) -> Callable[[], float]:
    def run() -> float:
        cache, token = decoder.new_cache(), 1
        for number in range(TOKENS + WARM_UP):
            hidden = decoder(mx.array([token]), cache)
            mx.async_eval(hidden, *cache.arrays)
            token = int(mx.argmax(decoder.logits(hidden)[0]))
            if number == WARM_UP - 1:
                start = time.perf_counter()
        return (time.perf_counter() - start) / TOKENS

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--k", type=int, nargs="+", default=[4, 10])
    arguments = parser.parse_args()
    text = FULL_SIZE | {"num_hidden_layers": arguments.layers, "num_experts": arguments.experts}
    layout = RecordLayout.build(
        text["hidden_size"],
        text["moe_intermediate_size"],
        dict.fromkeys(PROJECTIONS, ProjectionFormat("BF16", QUANTIZATION)),
    )
    mx.random.seed(0)
    arrays, modules = resident(text)
    banks = make_banks(text, layout)
    parts = parts_of_banks(banks, layout)
    print(
        f"{datetime.date.today()}, {mx.device_info().get('device_name')}, mlx {mx.__version__}, {arguments.layers} layers"
    )
    print("\n| decode | ms per token | per layer | of mlx-lm |\n|---|---|---|---|", flush=True)
    for k in arguments.k:
        text_k = text | {"num_experts_per_tok": k}
        config = Qwen35().config(text_k)
        runs: dict[str, Callable[[], float]] = {}
        model = mlx_lm_model(text_k, arrays, modules, parts)
        runs["mlx-lm"] = mlx_lm_run(model)
        weights = Weights(arrays, modules)
        for what in ("tried", "remembered"):
            start = time.perf_counter()
            cases = needed_kernels(config, weights, dict.fromkeys(banks, layout), k, mx.bfloat16, PLAIN)
            verdicts = prove(cases)
            print(f"| K={k}: {len(cases)} kernels {what} | {1e3 * (time.perf_counter() - start):.0f} | | |", flush=True)
        for case in cases:
            verdict = verdicts.get(case)
            if verdict is None or not verdict.used:
                print(f"not used: {name_of(case)}: {verdict}", flush=True)
        variants = [
            ("kernels off, indices read back", False, False, None),
            ("kernels off, ahead", False, False, 0.0),
            ("kernels off, resident", False, True, None),
            ("indices read back", None, False, None),
            *((f"ahead, {1 - missing:.1%} loaded", None, False, missing) for missing in (0.0, 0.001, 0.01, 0.05, 0.1)),
            ("95.0% loaded, as the library chooses", None, False, 0.05),
            ("resident", None, True, None),
        ]
        for name, kernels, no_wait, missing in variants:
            store = Banks(parts if kernels is False else banks, arguments.experts, layout, no_wait, missing)
            decoder = Decoder(config, weights, store, k, mx.bfloat16, use_kernels=kernels)
            if missing is not None:
                assert decoder.run_ahead is not None
                decoder.run_ahead.switch = (
                    Chosen(missing * k * arguments.layers, arguments.layers)
                    if "chooses" in name
                    else Ahead(1 - (1 - missing) ** k, arguments.layers)
                )
            runs[f"flash_moe, {name}"] = our_run(decoder)
        times = medians(REPEATS, runs)
        for name, found in times.items():
            print(
                f"| K={k}: {name} | {found * 1e3:.2f} | {found / arguments.layers * 1e3:.3f} | {found / times['mlx-lm']:.2f} |",
                flush=True,
            )
        del model, runs
        mx.clear_cache()


if __name__ == "__main__":
    main()
