"""A layer of the decoder: mixer and feed-forward network, each after its norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..config import FULL_ATTENTION, ModelConfig
from ..experts.store import ExpertStore
from ..machines.sums import Sums
from ..ops.dispatch import on_gpu
from ..ops.norm import add_rms_norm, rms_norm
from .attention import GatedAttention
from .cache import DeltaCache, KVCache
from .decode_step import DecodeStep
from .expert_choice import ExpertChoice
from .gated_delta_net import GatedDeltaNet
from .mlp import SwiGLU
from .module import Module
from .sparse_moe import SparseMoE
from .weights import Weights


class DecoderLayer(Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)).

    Shape:
        x: [T, H] to [T, H].
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        weights: Weights,
        store: ExpertStore,
        experts_per_token: int,
        choice: ExpertChoice | None = None,
        sums: Sums | None = None,
    ) -> None:
        super().__init__()
        self.input_layernorm = weights.array("input_layernorm.weight", config.hidden_size)
        self.post_attention_layernorm = weights.array("post_attention_layernorm.weight", config.hidden_size)
        self.mixer: Any
        if config.layer_types[layer] == FULL_ATTENTION:
            self.mixer = GatedAttention(config, weights.at("self_attn"))
        else:
            self.mixer = GatedDeltaNet(config, weights.at("linear_attn"))
        if config.sparse_layers[layer]:
            self.mlp = SparseMoE(config, layer, weights.at("mlp"), store, experts_per_token, choice, sums)
        else:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, weights.at("mlp"))
        self._eps = config.rms_norm_eps
        self._step = None
        if isinstance(self.mlp, SparseMoE):
            norms = self.input_layernorm, self.post_attention_layernorm
            self._step = DecodeStep(self.mixer, self.mlp, *norms, config.rms_norm_eps)

    def __call__(self, x: mx.array, cache: KVCache | DeltaCache) -> mx.array:
        if x.shape[0] == 1 and on_gpu() and self._step is not None:
            return self._step(x, cache)
        return self._rest(x + self.mixer(rms_norm(x, self.input_layernorm, self._eps), cache))

    def together(self, x: mx.array, caches: Sequence[KVCache | DeltaCache], counts: Sequence[int]) -> mx.array:
        """Runs tokens of several sequences as :meth:`__call__` does: counts[i] rows of x per sequence."""
        return self._rest(x + self.mixer.together(rms_norm(x, self.input_layernorm, self._eps), caches, counts))

    def _rest(self, x: mx.array) -> mx.array:
        mx.async_eval(x)  # the device starts while the host describes the rest
        h = rms_norm(x, self.post_attention_layernorm, self._eps)
        x = self.mlp(h, x) if isinstance(self.mlp, SparseMoE) else x + self.mlp(h)
        mx.async_eval(x)
        return x

    def ahead(self, x: mx.array, cache: KVCache | DeltaCache) -> list[mx.array]:
        """Runs one token through a sparse layer with the loaded experts; see :meth:`DecodeStep.ahead`."""
        assert self._step is not None
        return self._step.ahead(x, cache, *self.mlp.ahead())

    def describe(self, x: mx.array, cache: KVCache | DeltaCache) -> None:
        """Describes the graph of the layer for x [T, H] without the routed experts, for :func:`needed_kernels`."""
        mixed = self.mixer(rms_norm(x, self.input_layernorm, self._eps), cache)
        h, x = add_rms_norm(mixed, x, self.post_attention_layernorm, self._eps)
        if isinstance(self.mlp, SparseMoE):
            self.mlp.describe(h, x)
        else:
            self.mlp(h)

    def front(self, x: mx.array, cache: KVCache | DeltaCache) -> tuple[mx.array, ...]:
        """Runs the part of a sparse layer that does not need the routed experts.

        Returns:
            The inputs of the experts, [T, H], and the results of :meth:`SparseMoE.route` for them.
        """
        x = x + self.mixer(rms_norm(x, self.input_layernorm, self._eps), cache)
        h = rms_norm(x, self.post_attention_layernorm, self._eps)
        return h, *self.mlp.route(h, x)

    def router_logits(self, residual: mx.array) -> mx.array:
        """Returns the router logits [T, E] float32 for the residual stream [T, H] after the mixer."""
        logits: mx.array = self.mlp.gates(rms_norm(residual, self.post_attention_layernorm, self._eps))[0]
        return logits.astype(mx.float32)
