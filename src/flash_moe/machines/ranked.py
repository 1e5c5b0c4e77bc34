"""A model's place in a group of machines."""

from __future__ import annotations

from typing import Any

from .following import FollowingNetwork


class Ranked:
    """A model that is one of several ranks, or alone."""

    _decoder: Any

    def close(self) -> None:
        """Ends what the model holds."""
        raise NotImplementedError

    @property
    def rank(self) -> int:
        """Which of the machines of a group this is; 0 for one alone."""
        return int(getattr(self._decoder, "rank", 0))

    def follow(self) -> bool:
        """On every rank of a group but 0: runs what rank 0 runs, until that closes its model; then closes this one.

        Returns:
            False at once on rank 0, and without a group; True elsewhere, when it is over.

        Raises:
            PeerError: a rank is gone, silent or stuck.
        """
        if not isinstance(network := self._decoder, FollowingNetwork):
            return False
        try:
            network.follow()
        finally:
            self.close()
        return True
