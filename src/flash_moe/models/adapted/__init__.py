"""Networks of mlx-lm with streamed experts, for every family that mlx-lm knows and this library does not.

No code here is specific to one family. The weights of mlx-lm's expert modules, SwitchGLU and SwitchMLP, come from an
expert store. Everything else, including activations and biases, is mlx-lm's.
"""

from .expert_modules import stream_experts

__all__ = ["stream_experts"]
