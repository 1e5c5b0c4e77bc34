"""Decides whether a model runs through the CPU kernels."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping
from functools import cache

import mlx.core as mx

from ..config import ModelConfig
from ..ops.blas import on_cpu
from ..ops.dispatch import on_gpu
from ..record import PROJECTIONS, RecordLayout

_log = logging.getLogger(__name__)
_FEWEST_WEIGHTS = 1 << 20  # weights per token; below this, loading the kernels (0.3 s) takes longer than they save


def uses_cpu_kernels(
    config: ModelConfig,
    layouts: Mapping[int, RecordLayout],
    experts_per_token: int,
    dtype: mx.Dtype,
    wanted: bool | None,
) -> bool:
    """Returns whether a model uses the CPU kernels, from the device, the size of the model and the installed packages.

    Args:
        wanted: ``kernels`` of :meth:`flash_moe.Model.load`. ``FLASH_MOE_KERNELS`` applies too.
    """
    setting = os.environ.get("FLASH_MOE_KERNELS", "").lower()
    if on_gpu() or not on_cpu(dtype) or wanted is False or setting == "off":
        return False
    forced = wanted is True or setting == "on"
    if not forced and token_weights(config, experts_per_token) < _FEWEST_WEIGHTS:
        return False
    if not all(supported(layout) for layout in layouts.values()):
        return False
    if importlib.util.find_spec("numba") is None:
        _hint()
        return False
    from ..ops.cpu.attention import supports

    return supports(config.head_dim)


@cache
def _hint() -> None:
    """Logs once that Numba is missing."""
    _log.warning("without Numba the CPU is about 20 times slower; install it with: pip install 'flash-moe[cpu]'")


def supported(layout: RecordLayout) -> bool:
    """Returns whether experts are SwiGLU without biases added to outputs."""
    return set(layout.linears) == set(PROJECTIONS) and not any(part.name == "bias" for part in layout.parts)


def token_weights(config: ModelConfig, experts_per_token: int) -> int:
    """Returns the approximate number of weights that a token uses."""
    c, attention = config, config.layer_types.count("full_attention")
    mixer = c.hidden_size * (2 * c.key_dim + 3 * c.value_dim) * (c.num_hidden_layers - attention)
    mixer += c.hidden_size * c.head_dim * (3 * c.num_attention_heads + 2 * c.num_key_value_heads) * attention
    experts = 3 * c.hidden_size * (c.moe_intermediate_size * experts_per_token + c.shared_expert_intermediate_size)
    return mixer + experts * sum(c.sparse_layers) + c.hidden_size * c.vocab_size
