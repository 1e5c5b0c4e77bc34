"""Networks of mlx-lm, whose routed experts are streamed: for every family that mlx-lm knows and this library does not.

Nothing here is special to one of them. Where mlx-lm computes with experts, in SwitchGLU and SwitchMLP, their weights come
from an expert store; everything else, activations and biases included, stays mlx-lm's.
"""

from .expert_modules import stream_experts

__all__ = ["stream_experts"]
