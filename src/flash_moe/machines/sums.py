"""The sum over all ranks of what each computed of its experts."""

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

_BITS = 16  # of the fingerprint of the chosen experts: a float32 sum of 256 of them is exact


class Sums:
    """Adds the parts of all ranks: the only place where a sum over ranks is made and evaluated.

    When a peer is gone, only ``mx.eval`` as the first evaluation of a sum raises. ``np.array``, or whatever follows
    ``mx.async_eval``, would silently read the rank's own part. So a sum is evaluated here, by ``mx.eval``, and carries two
    more numbers: of how many ranks it is, and a fingerprint of the experts that they chose. Every rank checks both.

    A rank whose pass fails sends zeros that count as no rank: all ranks leave the same layer, and stay in step.

    Args:
        group: of MLX.
        share: of the experts, that this rank computes.
        widths: numbers in a token's part of each layer with experts, in the order of a pass.

    Attributes:
        rank, size: of the group; widths: as given.
        entered: sums that this rank has begun, since the beginning.
        layer: of the sum that is under way, or comes next; waiting: whether it is under way; nbytes: of it.
        seconds: spent in sums.
        stopped: asked before a sum; where it says yes, the pass ends with KeyboardInterrupt.
        cause: waits for what the failed rank says of its failure; broken: called with why no sum can be made any more.
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
        """Sums that the pass has still to enter."""
        return len(self._pending)

    def begin(self, chunks: Sequence[int]) -> None:
        """Notes that a pass begins: through all layers with each of these numbers of tokens in turn."""
        self._pending = deque((layer, tokens * width) for tokens in chunks for layer, width in self.widths.items())
        self.layer = self._pending[0][0] if self._pending else -1

    def add(self, part: mx.array, layer: int, chosen: np.ndarray) -> mx.array:
        """Returns the parts of all ranks, added in float32: every rank gets the same bits. Waits for all of them.

        Args:
            part: this rank's, [T, W].
            chosen: the experts of the tokens, [T, K].

        Raises:
            PeerError: a rank is gone, its pass failed, or it chose other experts.
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
            self._pending.clear()  # every rank sees it, in this sum
            raise PeerError(f"layer {layer}: {self.cause() or 'another rank failed and did not say why'}")
        if agreed != self.size * fingerprint:
            self._pending.clear()
            raise PeerError(
                f"layer {layer}: the ranks chose different experts; all must run the same model on machines that round alike"
            )
        return total

    def give_up(self) -> None:
        """Tells the other ranks, in the sum that they enter next, that this rank's pass has failed.

        Raises:
            PeerError: the group is broken.
        """
        if self._pending:
            self._exchange(mx.zeros(self._pending[0][1]), 0.0, 0.0)
            self._pending.clear()

    def _exchange(self, part: mx.array, count: float, fingerprint: float) -> tuple[mx.array, float, float]:
        flat = mx.concatenate([part.reshape(-1), mx.array([count, fingerprint])])
        mx.eval(flat)  # an error of this rank's own shows before anything is sent
        total = mx.distributed.all_sum(flat, group=self._group)
        self._pending.popleft()
        self.nbytes, self.entered, self.waiting, start = flat.nbytes, self.entered + 1, True, time.perf_counter()
        try:
            with communicating:
                mx.eval(total)
        except RuntimeError as error:
            self._pending.clear()
            if not (cause := self.cause()):  # the ranks are there, but no sum can be made any more
                self.broken(cause := f"the sum failed on rank {self.rank}: {error}")
            raise PeerError(f"layer {self.layer}: {cause}") from error
        finally:
            self.waiting = False
            self.seconds += time.perf_counter() - start
        if self._pending:
            self.layer = self._pending[0][0]
        ranks, agreed = np.array(total, copy=False)[-2:].tolist()  # without another evaluation
        return total[:-2].reshape(part.shape), ranks, agreed
