"""Apple's chips, and the predicted cost of work on them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..errors import ArgumentError
from .costs import Costs, LayerCost, ReadCost, expert_flops, token_bytes
from .needs import Kind, Needs

# GB/s of memory, TFLOPS of the largest GPU, GB/s of the SSD.
# Memory: Apple's technical specifications of each chip (the larger figure if a chip has two).
# TFLOPS, float32: Apple's announcements of M1, M1 Pro, M1 Max, M1 Ultra and M2; else cores x 128 lanes x 2 x clock.
# SSD: Apple's announcements of MacBook Pro (7.4 GB/s from M1 Pro on, 14.5 from M5 Pro on), and measurements of
# base models in reviews; small SSDs are slower.
_CHIPS = {
    "M1": (68, 2.6, 2.9), "M1 Pro": (200, 5.2, 6.0), "M1 Max": (400, 10.4, 6.0), "M1 Ultra": (800, 21.0, 6.0),
    "M2": (100, 3.6, 2.9), "M2 Pro": (200, 6.8, 6.0), "M2 Max": (400, 13.6, 6.0), "M2 Ultra": (800, 27.2, 6.0),
    "M3": (100, 3.5, 2.9), "M3 Pro": (150, 6.4, 6.0), "M3 Max": (400, 14.2, 6.0), "M3 Ultra": (819, 28.4, 6.0),
    "M4": (120, 4.2, 2.9), "M4 Pro": (273, 8.4, 6.0), "M4 Max": (546, 16.8, 6.0),
    "M5": (153, 4.2, 6.0), "M5 Pro": (307, 8.3, 14.5), "M5 Max": (614, 16.6, 14.5),
}  # fmt: skip

# Efficiencies relative to those figures, and host times of a layer and, for sampling, of a token of the vocabulary.
# These are assumptions: nobody has measured them yet.
_OF_BANDWIDTH, _OF_FLOPS, _OF_SSD, _COPY = 0.7, 0.5, 0.8, 0.2  # copies reach the share _COPY of the bandwidth
LAYER_SECONDS, _DRAW_SECONDS = 150e-6, 15e-9


@dataclass(frozen=True)
class Machine:
    """The specifications of a machine: bytes of memory, and bytes or operations per second."""

    name: str
    memory: int
    bandwidth: float
    flops: float
    ssd: float

    def costs(self, needs: Needs, mapped: bool) -> Costs:
        """Predicts the cost of a model's work on this machine.

        Args:
            mapped: whether mapped records are used in place.
        """
        ssd, copy = _OF_SSD * self.ssd, math.inf if mapped else _COPY * self.bandwidth
        reads = ReadCost(ssd, ssd, copy, copy)
        return predicted(needs, _OF_BANDWIDTH * self.bandwidth, _OF_FLOPS * self.flops, reads)


def predicted(needs: Needs, bandwidth: float, flops: float, reads: ReadCost | None) -> Costs:
    """Predicts the cost of a model's work from two speeds: of matrix-vector products and of large products."""

    def layer(kind: Kind) -> LayerCost:
        work = needs.work[kind]
        return LayerCost(
            token=token_bytes(needs, kind) / bandwidth + LAYER_SECONDS,
            key=work.kv_per_token / bandwidth,
            chunk=needs.layer[kind] / bandwidth + LAYER_SECONDS,
            chunk_token=work.flops / flops,
            chunk_pair=work.pair_flops / flops,
        )

    return Costs(
        bandwidth=bandwidth,
        flops=flops,
        layers={kind: layer(kind) for kind in needs.layers},
        record=needs.record / bandwidth,
        row=expert_flops(needs) / flops,
        draw=_DRAW_SECONDS * needs.dimensions.vocab_size,
        reads=reads,
        timed=False,
    )


def parse_machine(text: str) -> Machine:
    """Parses the name of a machine with an Apple chip, such as "M3 Max 48GB".

    Raises:
        ArgumentError: the chip is unknown, or the size of the memory is missing.
    """
    match = re.fullmatch(
        r"(?:apple\s+)?(m\d+)(?:\s+(pro|max|ultra))?(?:[\s,]+(\d+)\s*gi?b)?", text.strip(), re.I | re.A
    )
    chip = " ".join(part for part in (match[1].upper(), (match[2] or "").capitalize()) if part) if match else ""
    if match is not None and chip in _CHIPS and match[3] is None:
        raise ArgumentError(f"{text!r} does not say how much memory the machine has; add it, as in '{chip} 48GB'")
    if match is None or chip not in _CHIPS or int(match[3]) == 0:
        raise ArgumentError(
            f"unknown machine {text!r}; expected a chip and its memory, such as 'M3 Max 48GB', with one of the chips "
            f"{', '.join(_CHIPS)}"
        )
    bandwidth, teraflops, ssd = _CHIPS[chip]
    return Machine(f"{chip} {match[3]} GB", int(match[3]) << 30, bandwidth * 1e9, teraflops * 1e12, ssd * 1e9)
