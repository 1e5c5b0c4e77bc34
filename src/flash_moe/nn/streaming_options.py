"""The options for experts that are not in memory. By default, they are read."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ArgumentError


@dataclass(frozen=True)
class StreamingOptions:
    """Options for tokens that run alone, as in decoding. Chunks of a prompt are always computed exactly.

    Attributes:
        prefetch: whether to read the experts that the next layer will probably need, after the reads of the current
            layer. Changes no output.
        drop_cold_below: a chosen expert that is not in memory is left out if its share of the routing weights is below
            this value. At least one expert stays. 0 drops nothing.
        prefer_cached: a chosen expert that is not in memory is replaced by one that is, if the router probability of
            the replacement is at least 1 - prefer_cached times that of the chosen expert. 0 replaces nothing.

    Raises:
        ArgumentError: a number is not from 0 to 1.
    """

    prefetch: bool = False
    drop_cold_below: float = 0.0
    prefer_cached: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.prefetch, bool):
            raise ArgumentError(f"prefetch is {self.prefetch!r}, expected True or False")
        for name in ("drop_cold_below", "prefer_cached"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ArgumentError(f"{name} is {value!r}, expected a number from 0 to 1; 0 is off")

    @property
    def changes_experts(self) -> bool:
        """Whether the used experts may differ from the router's K most probable ones."""
        return bool(self.drop_cold_below or self.prefer_cached)


PLAIN = StreamingOptions()
