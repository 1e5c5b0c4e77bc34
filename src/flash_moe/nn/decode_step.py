"""Runs one token through one layer on a GPU in traces, because describing the graph takes longer than computing it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..experts.store import Bank
from ..ops.decode_attention import cache_sizes
from ..ops.norm import add_rms_norm, rms_norm
from ..ops.qk_norm_rope import place
from ..ops.scalars import integers
from .cache import DeltaCache, KVCache
from .module import traced
from .sparse_moe import SparseMoE


class DecodeStep:
    """The parts of a layer's step with fixed shapes, each traced once.

    Three parts are not traced: writing to a KV cache, which a trace would copy; MLX's own attention, whose shapes
    change with every token; and experts that the host fetches. If the layer is fully resident, its bank is one more
    argument, and the trace includes the experts.

    Args:
        mixer: attention or Gated DeltaNet.
        moe: the layer's experts.
        input_norm, post_norm: weights [H] of the norms before the mixer and the experts.
        eps: epsilon of both norms.
    """

    def __init__(self, mixer: Any, moe: SparseMoE, input_norm: mx.array, post_norm: mx.array, eps: float) -> None:
        self._mixer, self._moe = mixer, moe
        self._input_norm, self._post_norm, self._eps = input_norm, post_norm, eps
        self._heads, self._attend = traced(self._heads_of), traced(self._attend_and_finish)
        self._project, self._output = traced(self._project_of), traced(self._output_and_finish)
        self._delta = traced(self._delta_layer)

    def __call__(self, x: mx.array, cache: KVCache | DeltaCache) -> mx.array:
        """Runs the layer.

        Args:
            x: [1, H].
            cache: extended in place.

        Returns:
            [1, H], not evaluated.
        """
        whole = self._moe.whole(x)
        if isinstance(whole, mx.array):
            (y,) = self._run(x, cache, (whole,))
        else:
            h, ids, weights, rest = self._run(x, cache, ())
            if whole is None:
                y = self._moe.experts(h, ids, weights, rest)
            else:
                y = self._moe.traced_bank(h, ids.reshape(-1), weights, rest, whole)
        mx.async_eval(y)
        return y

    def ahead(self, x: mx.array, cache: KVCache | DeltaCache, bank: Bank, table: mx.array) -> list[mx.array]:
        """Runs the layer with the loaded experts. If an expert is not loaded, the output is wrong.

        Args:
            x, cache: as above.
            bank, table: the results of :meth:`~flash_moe.experts.store.ExpertStore.ahead`.

        Returns:
            The output [1, H] and the arguments of :meth:`SparseMoE.experts`, not evaluated.
        """
        if isinstance(bank, mx.array) and self._moe.uses_kernel(x):
            found = self._run(x, cache, (bank, table))
        else:  # traces the same parts as when the host fetches, so that fusion gives the same bits
            h, ids, weights, rest = routed = self._run(x, cache, ())
            found = [self._moe.traced_bank(h, table[ids].reshape(-1), weights, rest, bank), *routed]
        mx.async_eval(found)
        return found

    def _run(self, x: mx.array, cache: KVCache | DeltaCache, bank: tuple[mx.array, ...]) -> list[mx.array]:
        """Runs the traced parts, and returns the result of :meth:`_finish_layer`."""
        found: list[mx.array]
        if isinstance(cache, DeltaCache):
            conv, state, *found = self._delta(x, cache.conv, cache.state, *bank)
            cache.advance(1, conv, state)
        elif self._mixer.uses_kernels():
            q, key, value, gate = self._heads(x, place(cache.length, 1))
            cache.append(key, value)
            found = self._attend(x, q, gate, cache.keys, cache.values, cache_sizes(cache.length, cache.keys), *bank)
        else:
            q, key, value, gate = self._project(x, integers(cache.length))
            found = self._output(x, self._mixer.look(q, *cache.append(key, value)), gate, *bank)
        return found

    def _delta_layer(self, x: mx.array, conv: mx.array, state: mx.array, *bank: mx.array) -> list[mx.array]:
        mixed, conv, state = self._mixer.step(rms_norm(x, self._input_norm, self._eps), conv, state)
        return [conv, state, *self._finish_layer(x, mixed, *bank)]

    def _heads_of(self, x: mx.array, place: mx.array) -> tuple[mx.array, ...]:
        return self._mixer.heads(rms_norm(x, self._input_norm, self._eps), place)

    def _project_of(self, x: mx.array, start: mx.array) -> tuple[mx.array, ...]:
        return self._mixer.project(rms_norm(x, self._input_norm, self._eps), start)

    def _output_and_finish(self, x: mx.array, y: mx.array, gate: mx.array, *bank: mx.array) -> list[mx.array]:
        return self._finish_layer(x, self._mixer.output(y, gate), *bank)

    def _attend_and_finish(self, x: mx.array, *rest: mx.array) -> list[mx.array]:
        attention, bank = rest[:5], rest[5:]
        return self._finish_layer(x, self._mixer.attend(*attention), *bank)

    def _finish_layer(self, x: mx.array, mixed: mx.array, *bank: mx.array) -> list[mx.array]:
        """Returns the arguments of the experts. With a bank, it returns the output of the layer instead; with a bank
        and a table of slots, both.
        """
        h, x = add_rms_norm(mixed, x, self._post_norm, self._eps)
        ids, weights, rest = self._moe.route(h, x)
        if not bank:
            return [h, ids, weights, rest]
        if len(bank) == 1:
            return [self._moe.of_bank(h, ids, weights, rest, bank[0])]
        return [self._moe.of_bank(h, bank[1][ids], weights, rest, bank[0]), h, ids, weights, rest]
