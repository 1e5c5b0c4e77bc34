"""The Mixture of Experts with NumPy arrays and the CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice

import mlx.core as mx
import numpy as np

from ..machines.sums import Sums
from ..ops.cpu.arranged import Arranged
from ..ops.cpu.experts import Experts, Rows, Swiglu
from ..ops.cpu.memory import aligned
from ..ops.cpu.router import route
from .cpu_layers import Pass, Weights
from .expert_choice import ExpertChoice
from .mlp import SwiGLU
from .prefetch import LayerPrefetch
from .sparse_moe import SparseMoE, check_routing

_AT_ONCE = 8  # experts with many rows that are computed together, while the next ones are read
_SMALL = 1 << 20  # bytes of records that are computed together, regardless of their number


class DenseMlp:
    """Computes y += MLP(h)."""

    def __init__(self, mlp: SwiGLU, weights: Weights) -> None:
        self._experts = Experts(None, weights.swiglu(mlp), weights.workers)

    def __call__(self, h: np.ndarray, y: np.ndarray, run: Pass) -> None:
        all_rows = Rows(None, np.arange(run.tokens), np.ones(run.tokens, np.float32))
        self._experts.add(self._experts.arrange(h), [all_rows], y)


class CpuMoE:
    """Computes y += MoE(h); see :class:`~.sparse_moe.SparseMoE`.

    Attributes:
        prefetch: prefetches for the next layer; None if prefetching is off.
    """

    def __init__(self, moe: SparseMoE, weights: Weights) -> None:
        self._layer, self._store, self._k, self._normalize = moe.layer, moe.store, moe.k, moe.normalize
        self._choice: ExpertChoice | None = moe.choice
        self._sums: Sums | None = moe.sums
        self.prefetch: LayerPrefetch | None = None
        self.gates = weights.products(moe.gates.groups)
        layout = self._store.layouts[self._layer]
        self._at_once = max(_AT_ONCE, _SMALL // layout.stride)
        routed = Swiglu.of_record(layout)
        self._experts = Experts(routed, weights.swiglu(moe.shared_expert), weights.workers)

    def router_logits(self, h: np.ndarray) -> np.ndarray:
        """Returns the router's logits, [T, E]."""
        return self.gates(h, aligned(len(h), self.gates.rows))[:, :-1]

    def __call__(self, h: np.ndarray, y: np.ndarray, run: Pass) -> None:
        arranged, logits, ids, weights, shared = self._routed(h, run)
        if self._sums is not None:
            self._of_all_ranks(self._sums, arranged, ids, weights, shared, y)
        elif run.tokens > 1:
            self._rows(arranged, ids, weights, y, before=[shared])
        else:
            self._token(arranged, logits[0, :-1], ids[0], weights[0], shared, y)

    def _of_all_ranks(
        self, sums: Sums, arranged: Arranged, ids: np.ndarray, weights: np.ndarray, shared: Rows, y: np.ndarray
    ) -> None:
        """Computes the experts of this rank's share, and adds the outputs of all ranks.

        Only rank 0 adds the residual and the shared expert.
        """
        own, rest, residual = sums.share.owns(self._layer, ids), [shared], y
        if sums.rank != 0:
            rest, residual = [], y.copy()
            y[:] = 0
        if len(y) == 1:
            self._fetched(arranged, ids[own], weights[own], rest, residual, y)
        else:
            if rest:
                self._experts.add(arranged, rest, y)
            self._rows(arranged, ids, weights, y, own)
        y[:] = np.array(sums.add(mx.array(y), self._layer, ids))

    def front(self, h: np.ndarray, y: np.ndarray, run: Pass) -> None:
        """Runs everything except the routed experts, for separate timing."""
        arranged, _, _, _, shared = self._routed(h, run)
        self._experts.add(arranged, [shared], y)

    def experts(self, h: np.ndarray, ids: np.ndarray, weights: np.ndarray, y: np.ndarray) -> None:
        """Runs only the routed experts of many tokens, with ids [T, K] int64 and weights [T, K] float32."""
        self._rows(self._experts.arrange(h), ids, weights, y)

    def _routed(self, h: np.ndarray, run: Pass) -> tuple[Arranged, np.ndarray, np.ndarray, np.ndarray, Rows]:
        """Returns the reordered h, logits of the gates, ids and weights [T, K], and rows of the shared expert."""
        logits = self.gates(h, run.room("gates", self.gates.rows))
        ids, weights = np.empty((run.tokens, self._k), np.int64), np.empty((run.tokens, self._k), np.float32)
        shared_gate = logits[:, -1]
        with np.errstate(over="ignore"):  # exp may overflow to inf; the gate is 0 there
            shared = Rows(None, np.arange(run.tokens), 1 / (1 + np.exp(-shared_gate)))
        probabilities = logits[:, :-1].copy()
        route(probabilities, self._normalize, ids, weights)
        check_routing(weights, self._layer)
        return self._experts.arrange(h), logits, ids, weights, shared

    def _token(
        self, arranged: Arranged, logits: np.ndarray, ids: np.ndarray, weights: np.ndarray, shared: Rows, y: np.ndarray
    ) -> None:
        """Computes the experts of one token: those in memory together, and each other as soon as it is loaded."""
        if self._choice is not None:
            probabilities = np.exp(logits - logits.max())
            probabilities /= probabilities.sum()
            ids, weights = self._choice(probabilities, partial(self._store.in_memory, self._layer))
        self._fetched(arranged, ids, weights, [shared], y, y)

    def _fetched(
        self,
        arranged: Arranged,
        ids: np.ndarray,
        weights: np.ndarray,
        rest: list[Rows],
        residual: np.ndarray,
        y: np.ndarray,
    ) -> None:
        """Adds the experts of one token, [n], and those of ``rest``: the shared expert, or none.

        Predicts the experts of the next layer from the residual.
        """
        chosen, one = ids.tolist(), np.zeros(1, np.int64)
        records = self._store.fetch_bytes(self._layer, chosen)
        if self._store.holds_everything:
            rows = [*rest, *(Rows(r.ctypes.data, one, weights[i : i + 1]) for i, r in enumerate(records))]
            if rows:
                self._experts.add(arranged, rows, y)
            return
        if rest:
            self._experts.add(arranged, rest, y)
        if self.prefetch is not None:
            self.prefetch.reading(chosen, self.prefetch.logits(residual))
        for i, record in enumerate(records):
            self._experts.add(arranged, [Rows(record.ctypes.data, one, weights[i : i + 1])], y)

    def _rows(
        self,
        arranged: Arranged,
        ids: np.ndarray,
        weights: np.ndarray,
        y: np.ndarray,
        own: np.ndarray | None = None,
        before: Sequence[Rows] = (),
    ) -> None:
        """Computes the experts of many tokens. Each used expert is fetched once, in sorted order, and multiplied with
        all its tokens.

        Args:
            own: mask [T, K] of the ids to compute; None for all.
            before: rows to compute before the first of them.
        """
        order = np.argsort(ids, axis=None, kind="stable")
        if own is not None:
            order = order[own.reshape(-1)[order]]
        experts, starts = np.unique(ids.reshape(-1)[order], return_index=True)
        ends, sorted_weights = [*starts[1:].tolist(), order.size], weights.reshape(-1)[order]
        tokens = order // ids.shape[1]
        capacity = self._store.capacity
        for first in range(0, len(experts), capacity):
            group = range(first, min(first + capacity, len(experts)))
            records = self._store.fetch_bytes(self._layer, experts[first : group.stop].tolist())
            following = experts[group.stop : group.stop + capacity].tolist()
            if following:
                self._store.prefetch(self._layer, following)
            numbered = zip(group, records, strict=True)
            while several := list(islice(numbered, self._at_once)):
                rows = [
                    Rows(record.ctypes.data, tokens[starts[i] : ends[i]], sorted_weights[starts[i] : ends[i]])
                    for i, record in several
                ]
                self._experts.add(arranged, [*before, *rows], y)
                before = ()
