"""Computes hidden states as in generation: one token after the other through all layers.

This is slower than running layer by layer, and needs all resident weights in memory. But it is the only way to measure
options that act on single tokens: dropping missing experts and preferring cached ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field

import mlx.core as mx

from ..experts.opening import open_store
from ..generation.engine import CLEAR_INTERVAL
from ..generation.streaming_stats import ChoiceStats
from ..mlx_cache import clear_cache
from ..nn.streaming_options import PLAIN, StreamingOptions
from .layerwise_model import LayerwiseModel, Progress


@dataclass(frozen=True)
class DecodedModel(LayerwiseModel):
    """A checkpoint that scores texts token by token.

    With these options, dropped and swapped experts depend on the state of memory, so two runs may differ.

    Attributes:
        streaming: options for experts that are not in memory.
        choices: statistics of unused experts for each call of :meth:`final_states`; empty if the options are off.
    """

    streaming: StreamingOptions = PLAIN
    choices: list[ChoiceStats] = field(default_factory=list, compare=False)
    unit = "decoded tokens"

    def final_states(self, sequences: Sequence[Sequence[int]], progress: Progress | None = None) -> list[mx.array]:
        """Returns the results of :meth:`LayerwiseModel.final_states`; ``progress`` counts tokens."""
        checked = self.checked(sequences)
        done, total, states = 0, sum(len(tokens) for tokens in checked), []
        store = open_store(self.checkpoint.records(), self.expert_io, self.experts_per_token)
        with closing(store):
            decoder = self.checkpoint.load_network(store, self.experts_per_token, self.dtype, streaming=self.streaming)
            for tokens in checked:
                cache, rows = decoder.new_cache(), []
                for token in tokens:
                    rows.append(decoder(mx.array([token], dtype=mx.int32), cache))
                    mx.eval(rows[-1], *cache.arrays)
                    done += 1
                    if done % CLEAR_INTERVAL == 0:
                        clear_cache()
                    if progress is not None:
                        progress(done, total)
                states.append(mx.concatenate(rows))
                mx.eval(states[-1])
            if decoder.choice is not None:
                self.choices.append(ChoiceStats.of(decoder.choice.counters))
        return states
