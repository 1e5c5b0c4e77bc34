"""The Mixture of Experts: a router, K routed experts that a store fetches, and one shared expert."""

from __future__ import annotations

import json
from functools import partial

import mlx.core as mx
import numpy as np

from ..config import ModelConfig
from ..errors import NumericalError
from ..experts.store import Arrivals, Bank, ExpertStore, Records
from ..machines.sums import Sums
from ..ops import expert_kernels, kernel
from ..ops.dispatch import kernels_wanted, on_gpu, use_kernel
from ..ops.experts import (
    add_weighted,
    enough,
    experts_for_rows,
    experts_for_token,
    experts_in_place,
    fewest_products,
    parts_of,
    takes_each,
)
from ..ops.router import route
from .expert_choice import ExpertChoice
from .mlp import SwiGLU
from .module import Module, traced
from .prefetch import LayerPrefetch
from .shared_record import shared_record
from .weights import Weights


class SparseMoE(Module):
    """residual + Σ_k weight_k · expert_k(x) + sigmoid(shared_expert_gate · x) · shared_expert(x).

    The host waits for the device only once per layer, when it reads the K indices back. It starts the rest of the layer
    without waiting. If the layer is fully resident, kernels look up the records on the device, and the host never
    waits.

    Shape:
        x, residual: [T, H] to [T, H].

    Args:
        layer: index of the layer, for the store and for errors.
        experts_per_token: K.
        choice: changes the experts of a single token on the host; None uses those that the router chose.
        sums: adds the expert outputs of several machines; None for a single machine.

    Attributes:
        layer, store, k, choice, sums: the arguments. normalize: whether the weights of a token's experts sum to one.
        prefetch: prefetches for the next layer; None if prefetching is off.
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
        hidden, intermediate = config.hidden_size, config.shared_expert_intermediate_size
        self.gates = weights.linears({"gate": config.num_experts, "shared_expert_gate": 1}, hidden)
        self.layer, self.store, self.k, self.normalize = layer, store, experts_per_token, config.norm_topk_prob
        self.choice, self.sums = None if store.holds_everything else choice, sums
        self.prefetch: LayerPrefetch | None = None
        self._layout = store.layouts[layer]
        self._fewest = self.k if choice is None and sums is None else 1  # number of experts that a token may use
        self._layout_json = json.dumps(self._layout.to_json())
        shared, self._record = weights.at("shared_expert"), None
        if on_gpu() and kernels_wanted() is not False and self._supported() and sums is None:
            copied = shared_record(shared, intermediate, self._layout)
            self._record, shared = copied or (None, shared)
        self.shared_expert = SwiGLU(hidden, intermediate, shared)
        self.traced_bank, self._traced_each = traced(self.of_bank), traced(self._of_each)

    def __call__(self, x: mx.array, residual: mx.array) -> mx.array:
        return self.experts(x, *self.route(x, residual))

    def uses_kernel(self, x: mx.array) -> bool:
        """Returns whether kernels compute the experts of these tokens [T, H]."""
        shared = int(self._record is not None)
        sizes = self._fewest, self.k, shared, self._layout_json, x.dtype
        return x.shape[0] == 1 and self._supported() and use_kernel("experts", *sizes)

    def _supported(self) -> bool:
        return expert_kernels.supports(self._layout, self.k + 1)

    def whole(self, x: mx.array) -> Bank | None:
        """Returns the bank of a fully resident layer for one token, if products can use it; else None."""
        router_decides = self.choice is None and self.prefetch is None and self.sums is None
        in_place = self.store.by_part or self.uses_kernel(x)
        return self.store.whole(self.layer, self.k) if router_decides and in_place else None

    def ahead(self) -> tuple[Bank, mx.array]:
        """Returns the store's bank and the table of slots of the layer, for a token that runs ahead."""
        return self.store.ahead(self.layer)

    def route(self, x: mx.array, residual: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Computes everything that does not need the routed experts.

        Returns:
            The ids [T, K]; the weights [T, K], or [T, K + 1] if the shared expert is computed with the routed ones; and
                the rest [T, H]: the residual plus the shared expert, or the residual alone if the shared expert is
                computed with the routed ones. If the host chooses the experts, K is E here, and the weights are not
                normalised.
        """
        router, shared_gate = self.gates(x)
        chosen = (self.k, self.normalize) if self.choice is None or x.shape[0] > 1 else (router.shape[1], False)
        if self._record is not None and self.uses_kernel(x):
            return *route(router, *chosen, shared_gate), residual
        ids, weights = route(router, *chosen)
        return ids, weights, residual + mx.sigmoid(shared_gate) * self.shared_expert(x)

    def describe(self, x: mx.array, residual: mx.array) -> None:
        """Describes :meth:`route` with and without kernels, and queries the kernel of the routed experts."""
        self.route(x, residual)
        if self._record is not None and not self.uses_kernel(x) and self.choice is None and x.shape[0] == 1:
            route(self.gates(x)[0], self.k, self.normalize, self.gates(x)[1])

    def experts(self, x: mx.array, ids: mx.array, weights: mx.array, rest: mx.array) -> mx.array:
        """Fetches the routed experts and adds their outputs to ``rest``, which :meth:`route` returns."""
        one = x.shape[0] == 1
        ahead = self.prefetch.logits(rest) if one and self.prefetch is not None else None
        mx.async_eval(ids, weights)
        # in a separate evaluation, which the host does not wait for: the shared expert is computed during the fetch
        mx.async_eval(*([rest] if self._adds_rest else []), *([] if ahead is None else [ahead]))
        if (
            one and self.choice is None and kernel.back_end() == "cuda"
        ):  # on CUDA, where reading the weights would move them to the host
            chosen = np.array(ids)  # NaN then appears in the logits
        else:
            chosen = chosen_experts(ids, weights, self.layer)
        if self.sums is not None:
            return self._of_all_ranks(self.sums, x, chosen, weights, rest, ahead)
        if one:
            if self.choice is not None:
                chosen, weights = self._choose(self.choice, chosen, weights)
            return self._for_token(x, chosen[0].tolist(), weights, rest, ahead)
        return rest + self._for_rows(x, chosen, weights)

    @property
    def _adds_rest(self) -> bool:
        """Whether this machine adds the residual and the shared expert; in a group, only rank 0 does."""
        return self.sums is None or self.sums.rank == 0

    def _of_all_ranks(
        self, sums: Sums, x: mx.array, chosen: np.ndarray, weights: mx.array, rest: mx.array, ahead: mx.array | None
    ) -> mx.array:
        """Computes the experts of this rank's share, and returns the sum over all ranks."""
        own = sums.share.owns(self.layer, chosen)
        part = rest if self._adds_rest else mx.zeros_like(rest)
        if x.shape[0] > 1:
            part = part + self._for_rows(x, chosen, weights, own)
        elif own.any():
            columns = np.flatnonzero(own[0])
            part = self._for_token(x, chosen[0, columns].tolist(), weights[:, mx.array(columns)], part, ahead)
        elif self.prefetch is not None:
            self.prefetch.reading([], ahead)
        return sums.add(part, self.layer, chosen).astype(x.dtype)

    def of_bank(self, x: mx.array, rows: mx.array, weights: mx.array, rest: mx.array, bank: Bank) -> mx.array:
        """Computes the experts of one token from rows of a bank, without making the host wait.

        NaN appears in the logits.
        """
        if isinstance(bank, dict) or not self.uses_kernel(x):
            rows = rows.reshape(-1)
            if isinstance(bank, mx.array):  # copies whole records; the arithmetic is the same as for other banks
                bank, rows = bank[rows], mx.arange(rows.size, dtype=mx.uint32)
            y = experts_in_place(x, bank, enough(rows), self._layout)
            return add_weighted(rest, weights.reshape(-1), y)
        return expert_kernels.experts_for_token(
            x, bank, weights, self._layout, rows=rows, shared=self._shared(weights, rows.size), residual=rest
        )

    def _choose(self, choice: ExpertChoice, ids: np.ndarray, weights: mx.array) -> tuple[np.ndarray, mx.array]:
        """Chooses the used experts [1, n] from all experts and their probabilities [1, E]."""
        count = ids.shape[1]
        probabilities = np.empty(count, np.float32)
        probabilities[ids[0]] = np.array(weights)[0, :count]
        used, factors = choice(probabilities, partial(self.store.in_memory, self.layer))
        return used[None], mx.concatenate([mx.array(factors[None]), weights[:, count:]], axis=1)

    def _for_token(
        self, x: mx.array, chosen: list[int], weights: mx.array, rest: mx.array, ahead: mx.array | None
    ) -> mx.array:
        meanwhile = None if self.prefetch is None else partial(self.prefetch.reading, chosen, ahead)
        records: Records | Arrivals
        if not self.uses_kernel(x) and takes_each(self._layout, x.dtype):
            records = self.store.fetch_each(self.layer, chosen, meanwhile)
            y = rest + experts_for_token(x, records, weights[0], self._layout)  # waits for all records
        else:
            records = self.store.fetch(self.layer, chosen, meanwhile)
            y = self._of_records(x, records, weights, rest)
        records.used_by(y)
        return y

    def _of_records(self, x: mx.array, records: Records, weights: mx.array, rest: mx.array) -> mx.array:
        """Computes experts whose records are all loaded, and adds them to ``rest``."""
        if records.rows is not None and on_gpu():
            bank, rows = records.arrays[0], list(records.rows)
            if isinstance(bank, dict):  # like :func:`enough`, but without a launch
                rows += rows[-1:] * (fewest_products() - len(rows))
            y: mx.array = self.traced_bank(x, mx.array(rows, dtype=mx.uint32), weights, rest, bank)
            return y
        if not self.uses_kernel(x):
            if not on_gpu():
                return rest + experts_for_token(x, records.stacked(), weights[0], self._layout)
            y = self._traced_each(x, weights, rest, *records.arrays)
            return y
        shared = self._shared(weights, len(records.arrays))
        return expert_kernels.experts_for_token(x, records.arrays, weights, self._layout, shared=shared, residual=rest)

    def _of_each(self, x: mx.array, weights: mx.array, rest: mx.array, *records: mx.array) -> mx.array:
        """Computes experts from separate records in place, with the arithmetic of a bank, and adds them to ``rest``."""
        layout, rows = self._layout, mx.arange(len(records), dtype=mx.uint32)
        if kernel.back_end() == "cuda":  # mapped records are copies there anyway
            y = experts_in_place(x, mx.stack(list(records)), enough(rows), layout)
            return add_weighted(rest, weights.reshape(-1), y)
        each = [experts_in_place(x, parts_of(record, layout), rows[:1], layout) for record in records]
        return add_weighted(rest, weights.reshape(-1), mx.concatenate(each))

    def _of_group(self, x: mx.array, records: Records, counts: np.ndarray) -> mx.array:
        """Computes rows [R, H] that are sorted by record; the result is [R, H]."""
        count = x.shape[0]
        if (more := fewest_products() - count) > 0:  # repeats the last row, so that all groups give the same bits
            x = mx.concatenate([x, mx.repeat(x[-1:], more, axis=0)])
            return self._of_group(x, records, np.append(counts[:-1], counts[-1] + more))[:count]
        if records.rows is None or not self.store.by_part:
            return experts_for_rows(x, records.stacked(), counts.tolist(), self._layout)
        slots = np.repeat(np.array(records.rows, np.uint32), counts)
        order = np.argsort(slots, kind="stable")  # rows of a record stay adjacent, in the order of slots
        rows, back = mx.array(slots[order]), mx.array(np.argsort(order))
        return experts_in_place(x[mx.array(order)], records.arrays[0], rows, self._layout, grouped=True)[back]

    def _shared(self, weights: mx.array, routed: int) -> mx.array | None:
        return self._record if weights.shape[1] > routed else None

    def _for_rows(self, x: mx.array, chosen: np.ndarray, weights: mx.array, own: np.ndarray | None = None) -> mx.array:
        """Computes the experts of many tokens. Each used expert is fetched once, in sorted order, and multiplied with
        all its tokens.

        Args:
            own: mask [T, K] of the chosen experts to compute; None for all.
        """
        tokens, k = chosen.shape
        order = np.argsort(chosen, axis=None, kind="stable")
        if own is not None:
            order = order[own.reshape(-1)[order]]
        if not order.size:
            return mx.zeros_like(x)
        experts, counts = np.unique(chosen.reshape(-1)[order], return_counts=True)
        rows = x[mx.array(order // k)]  # [T·K, H], sorted by expert
        outputs, start = [], 0
        groups = [slice(i, i + self.store.capacity) for i in range(0, len(experts), self.store.capacity)]
        for number, group in enumerate(groups):
            records = self.store.fetch(self.layer, experts[group].tolist())
            stop = start + int(counts[group].sum())
            y = self._of_group(rows[start:stop], records, counts[group])
            records.used_by(y)
            mx.async_eval(y)
            if number + 1 < len(groups):
                self.store.prefetch(self.layer, experts[groups[number + 1]].tolist())
            outputs.append(y)
            start = stop
        inverse = np.full(chosen.size, order.size)
        inverse[order] = np.arange(order.size)
        if order.size < chosen.size:
            outputs.append(mx.zeros_like(x[:1]))  # zeros for the experts of other ranks
        y = mx.concatenate(outputs)[mx.array(inverse)].reshape(tokens, k, -1)
        return (weights[..., None] * y.astype(mx.float32)).sum(axis=1).astype(x.dtype)


def chosen_experts(ids: mx.array, weights: mx.array, layer: int) -> np.ndarray:
    """Reads the ids [T, K] back to the host.

    Raises:
        NumericalError: a weight is NaN.
    """
    chosen = np.array(ids)
    check_routing(np.array(weights, copy=False), layer)
    return chosen


def check_routing(weights: np.ndarray, layer: int) -> None:
    """Raises NumericalError if a routing weight is NaN."""
    if np.isnan(weights).any():
        raise NumericalError(
            f"the router of layer {layer} produced NaN; the checkpoint is damaged (run `flash-moe verify`) "
            "or its activations overflow (load it with dtype='float32')"
        )
