"""mlx-lm's time for a token and for a prompt, all weights in memory: what streaming is compared with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from decode_397b import make_banks, mlx_lm_model, mlx_lm_run, parts_of_banks, resident
from pieces_397b import head_alone
from sparse_checkpoint import QUANTIZATION

from flash_moe.record import PROJECTIONS, ProjectionFormat, RecordLayout

CHUNK = 2048  # tokens of a prompt that mlx-lm runs together
REPEATS = 3  # of tokens


def reference(text: dict[str, Any], ks: list[int], prompt: int, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Measures tokens and prompts with every K.

    Yields:
        A row: what was measured, K, milliseconds of a token or prompt and, without the output head, of one layer.
    """
    layers, hidden = text["num_hidden_layers"], text["hidden_size"]
    formats = dict.fromkeys(PROJECTIONS, ProjectionFormat("BF16", QUANTIZATION))
    layout = RecordLayout.build(hidden, text["moe_intermediate_size"], formats)
    arrays, modules = resident(text)
    parts = parts_of_banks(make_banks(text, layout), layout)
    for k in ks:
        model = mlx_lm_model(text | {"num_experts_per_tok": k}, arrays, modules, parts)
        head = head_alone(model.language_model.lm_head, hidden, mx.bfloat16, 16)
        say(f"mlx-lm, K={k}")
        run = mlx_lm_run(model)
        seconds = statistics.median([run() for _ in range(REPEATS + 1)][1:])
        yield {"of": "token", "K": k, "ms": 1e3 * seconds, "ms_per_layer": 1e3 * (seconds - head) / layers}
        with _fused_delta_rule():
            seconds = _prompt_seconds(model, prompt)
        yield _row("prompt, fused delta rule", k, seconds, layers)
        yield _row("prompt", k, _prompt_seconds(model, prompt), layers)
        del model, run
        mx.clear_cache()


def _row(of: str, k: int, seconds: float, layers: int) -> dict[str, Any]:
    return {"of": of, "K": k, "ms": 1e3 * seconds, "ms_per_layer": 1e3 * seconds / layers}


def _prompt_seconds(model: Any, prompt: int) -> float:
    """Seconds of a prompt through all layers, without the head, in mlx-lm's chunks: of a second run."""
    from mlx_lm.models.cache import make_prompt_cache

    tokens = mx.random.randint(0, model.language_model.args.vocab_size, (1, prompt))
    for _ in range(2):
        cache = make_prompt_cache(model)
        mx.eval(tokens)
        mx.synchronize()
        start = time.perf_counter()
        for first in range(0, prompt, CHUNK):
            hidden = model.language_model.model(tokens[:, first : first + CHUNK], cache=cache)
            mx.eval(hidden, [layer.state for layer in cache])
        mx.synchronize()
    return time.perf_counter() - start


@contextmanager
def _fused_delta_rule() -> Iterator[None]:
    """Within, mlx-lm's delta rule is MLX's own fused operation, as it is flash_moe's on a GPU."""
    from mlx_lm.models import qwen3_5
    from mlx_lm.models.gated_delta import compute_g

    def fused(
        q: mx.array, k: mx.array, v: mx.array, a: mx.array, b: mx.array, A_log: mx.array, dt_bias: mx.array,
        state: Any = None, mask: Any = None, **options: Any,
    ) -> Any:  # fmt: skip
        assert mask is None, "one sequence without padding has no mask"
        if state is None:
            state = mx.zeros((q.shape[0], v.shape[2], v.shape[3], q.shape[3]), dtype=mx.float32)
        return mx.fast.gated_delta_update(q, k, v, compute_g(A_log, a, dt_bias), mx.sigmoid(b), state)

    original, qwen3_5.gated_delta_update = qwen3_5.gated_delta_update, fused
    try:
        yield
    finally:
        qwen3_5.gated_delta_update = original
