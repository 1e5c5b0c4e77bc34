"""Quantises one expert for its inputs, through the second moments of the inputs.

The inputs of gate and up are the tokens that are routed to the expert, weighted by their routing weight. If only a few
tokens choose the expert, these moments are inaccurate, so they are mixed with those of all tokens of the layer. The
inputs of the down projection are the outputs of the quantised gate and up projections. It is first refitted to these
inputs, so that its outputs stay close to the original ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..formats import ProjectionFormat
from ..record import PROJECTIONS
from .affine import Affine
from .error_feedback import quantized

_DAMPING = 0.1  # share of the mean diagonal of the moments that is added to the diagonal
_PRIOR = 1.0  # weight of the layer's moments, or of the damping, in tokens per dimension


@dataclass(frozen=True)
class Expert:
    """The projections of one expert, [out, in] float32 each."""

    gate_proj: np.ndarray
    up_proj: np.ndarray
    down_proj: np.ndarray

    def hidden(self, x: np.ndarray) -> np.ndarray:
        """Returns the inputs of the down projection for x [T, H]: silu(gate · x) · up · x, [T, I]."""
        gate = x @ self.gate_proj.T
        with np.errstate(over="ignore"):  # exp may overflow to inf for very negative gates, where silu is 0
            gate /= 1 + np.exp(-gate)
        gate *= x @ self.up_proj.T
        return gate


def second_moments(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns Σ_t weights[t] x_t x_tᵀ / Σ_t weights[t] for rows [T, n], as [n, n] float64; zero if there are no rows."""
    return _cross_moments(x, x, weights)


def quantize_expert(
    expert: Expert,
    formats: Mapping[str, ProjectionFormat],
    x: np.ndarray,
    weights: np.ndarray,
    layer_moments: np.ndarray,
) -> tuple[dict[str, Affine], Expert]:
    """Quantises those projections of an expert that ``formats`` names.

    Args:
        formats: formats of the projections to quantise.
        x: [T, H] float32, the tokens that are routed to the expert; T may be 0.
        weights: [T], the routing weights of these tokens.
        layer_moments: [H, H] float64, second moments of all tokens of the layer.

    Returns:
        The quantised projections, and the expert with them.
    """
    found: dict[str, Affine] = {}
    count, (intermediate, hidden) = _effective_count(weights), expert.gate_proj.shape
    share = count / (count + _PRIOR * hidden)
    moments = _damped(share * second_moments(x, weights) + (1 - share) * layer_moments, _DAMPING)
    now = {name: getattr(expert, name) for name in PROJECTIONS}
    for names in _alike(formats):
        stacked = np.concatenate([now[name] for name in names])  # same inputs, so one factorisation is enough
        affine, weights_now = _quantized(stacked, moments, formats[names[0]])
        for i, name in enumerate(names):
            rows = slice(i * intermediate, (i + 1) * intermediate)
            found[name] = Affine(affine.codes[rows], affine.scales[rows], affine.biases[rows])
            now[name] = weights_now[rows]
    if "down_proj" in formats:
        before, after = expert.hidden(x), Expert(**now).hidden(x)
        damping = _DAMPING + _PRIOR * intermediate / max(count, 1)
        moments = _damped(second_moments(after, weights), damping)
        # ridge regression of the original outputs on the new inputs, regularised towards the original weights
        shift = _cross_moments(before - after, after, weights)
        wanted = expert.down_proj + np.linalg.solve(moments, (expert.down_proj @ shift).T).T.astype(np.float32)
        found["down_proj"], now["down_proj"] = _quantized(wanted, moments, formats["down_proj"])
    return found, Expert(**now)


def _alike(formats: Mapping[str, ProjectionFormat]) -> list[list[str]]:
    """Groups those of gate and up that are quantised; projections with the same format form one group."""
    names = [name for name in ("gate_proj", "up_proj") if name in formats]
    alike = len({formats[name] for name in names}) == 1
    return [names] if alike else [[name] for name in names]


def _quantized(weights: np.ndarray, moments: np.ndarray, fmt: ProjectionFormat) -> tuple[Affine, np.ndarray]:
    assert fmt.quantization is not None
    found = quantized(weights, moments, fmt.quantization, fmt.dtype)
    return found, found.dequantized().reshape(weights.shape)


def _effective_count(weights: np.ndarray) -> float:
    """Returns the effective number of equally weighted tokens: (Σ w)² / Σ w²."""
    return float(weights.sum() ** 2 / np.square(weights).sum()) if weights.any() else 0.0


def _cross_moments(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    total = float(weights.sum())
    return ((x * weights[:, None]).T @ y).astype(np.float64) / (total or 1.0)


def _damped(moments: np.ndarray, damping: float) -> np.ndarray:
    """Adds damping to the diagonal of the moments. Zero moments become a multiple of the identity."""
    mean = float(np.diag(moments).mean())
    return moments + (damping * mean if mean > 0 else 1.0) * np.eye(len(moments))
