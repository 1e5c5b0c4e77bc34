"""The rank of a model in a group of machines."""

from __future__ import annotations

from typing import Any

from .following import FollowingNetwork


class Ranked:
    """A model that runs alone or as one of several ranks."""

    _decoder: Any

    def close(self) -> None:
        """Releases the resources of the model."""
        raise NotImplementedError

    @property
    def rank(self) -> int:
        """The rank of this process in its group; 0 without a group."""
        return int(getattr(self._decoder, "rank", 0))

    def follow(self) -> bool:
        """On ranks other than 0, runs the commands of rank 0 until it closes its model, and then closes this model.

        Returns:
            False immediately on rank 0 and without a group. On other ranks, True at the end.

        Raises:
            PeerError: a rank stopped, is silent, or hangs.
        """
        if not isinstance(network := self._decoder, FollowingNetwork):
            return False
        try:
            network.follow()
        finally:
            self.close()
        return True
