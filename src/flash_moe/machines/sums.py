"""Sums the outputs of the experts over all ranks."""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import numpy as np

from ..errors import PeerError
from ..mlx_cache import communicating
from ..share import Share

_BITS = 16  # maximum of the fingerprint of the chosen experts; a float32 sum of 256 of them is exact


class Sums:
    """Adds the parts of all ranks. Sums over ranks are created and evaluated only here.

    If a peer has stopped, only a first evaluation with ``mx.eval`` raises an error. ``np.array``, or any evaluation
    after ``mx.async_eval``, would silently return the rank's own part. So a sum is evaluated here with ``mx.eval``. It
    also carries two more numbers, which every rank checks: the number of ranks, and a fingerprint of the experts that
    they chose.

    A rank whose pass fails sends zeros that count as no rank. So all ranks end the pass in the same layer.

    Args:
        group: the group of MLX.
        share: the share of the experts that this rank computes.
        widths: width of a token's part in each layer with experts, in the order of a pass.

    Attributes:
        rank, size: rank and size of the group. widths: the argument.
        entered: number of sums that this rank has begun.
        layer: layer of the running or next sum. waiting: whether a sum is running. nbytes: its bytes.
        seconds: seconds spent in sums.
        stopped: function that is called before a sum. If it returns True, the pass ends with KeyboardInterrupt.
        cause: function that waits for the cause from the failed rank. broken: function that is called with the reason
            why sums are no longer possible.
    """

    def __init__(self, group: mx.distributed.Group, share: Share, widths: Mapping[int, int]) -> None:
        self.rank, self.size, self.share = group.rank(), group.size(), share
        self._group, self.widths = group, widths
        self._pending: deque[tuple[int, int]] = deque()
        self.entered, self.layer, self.waiting, self.nbytes, self.seconds = 0, -1, False, 0, 0.0
        self.stopped: Callable[[], bool] = lambda: False
        self.cause: Callable[[], str] = lambda: ""
        self.broken: Callable[[str], None] = lambda reason: None

    @property
    def pending(self) -> int:
        """The number of sums that the pass has not entered yet."""
        return len(self._pending)

    def begin(self, chunks: Sequence[int]) -> None:
        """Begins a pass through all layers, with each of these numbers of tokens in turn."""
        self._pending = deque((layer, tokens * width) for tokens in chunks for layer, width in self.widths.items())
        self.layer = self._pending[0][0] if self._pending else -1

    def add(self, part: mx.array, layer: int, chosen: np.ndarray) -> mx.array:
        """Returns the sum of the parts of all ranks in float32, with the same bits on every rank. Waits for all ranks.

        Args:
            part: [T, W], the part of this rank.
            chosen: [T, K], the experts of the tokens.

        Raises:
            PeerError: a rank stopped, its pass failed, or it chose other experts.
        """
        if self.stopped():
            raise KeyboardInterrupt
        if not self._pending or self._pending[0] != (layer, part.size):
            raise PeerError(
                f"layer {layer} adds {part.size} numbers, expected {self._pending[0] if self._pending else 'no sum'}; "
                "this network cannot run in a group"
            )
        fingerprint = float(zlib.crc32(chosen.astype(np.int32).tobytes()) & ((1 << _BITS) - 1))
        total, ranks, agreed = self._exchange(part.astype(mx.float32), 1.0, fingerprint)
        if ranks != self.size:
            self._pending.clear()  # every rank detects this in the same sum
            raise PeerError(f"layer {layer}: {self.cause() or 'another rank failed and did not say why'}")
        if agreed != self.size * fingerprint:
            self._pending.clear()
            raise PeerError(
                f"layer {layer}: the ranks chose different experts; all must run the same model on machines that round alike"
            )
        return total

    def give_up(self) -> None:
        """Tells the other ranks, in their next sum, that the pass failed on this rank.

        Raises:
            PeerError: the group is broken.
        """
        if self._pending:
            self._exchange(mx.zeros(self._pending[0][1]), 0.0, 0.0)
            self._pending.clear()

    def _exchange(self, part: mx.array, count: float, fingerprint: float) -> tuple[mx.array, float, float]:
        flat = mx.concatenate([part.reshape(-1), mx.array([count, fingerprint])])
        mx.eval(flat)  # an error of this rank is raised before anything is sent
        total = mx.distributed.all_sum(flat, group=self._group)
        self._pending.popleft()
        self.nbytes, self.entered, self.waiting, start = flat.nbytes, self.entered + 1, True, time.perf_counter()
        try:
            with communicating:
                mx.eval(total)
        except RuntimeError as error:
            self._pending.clear()
            if not (cause := self.cause()):  # the ranks still run, but sums are no longer possible
                self.broken(cause := f"the sum failed on rank {self.rank}: {error}")
            raise PeerError(f"layer {self.layer}: {cause}") from error
        finally:
            self.waiting = False
            self.seconds += time.perf_counter() - start
        if self._pending:
            self.layer = self._pending[0][0]
        ranks, agreed = np.array(total, copy=False)[-2:].tolist()  # avoids another evaluation
        return total[:-2].reshape(part.shape), ranks, agreed
