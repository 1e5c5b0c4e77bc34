"""The results of quality.py for people: a table, and what the best recipe of few bits loses."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from typing import Any

Result = dict[str, Any]  # a cell, as quality.py writes it

BUDGET = 2.6  # bits per weight of the experts, scales and biases included
COLUMNS = (
    "experts", "bits per weight", "K", "kB per token", "perplexity", "KL, 10⁻³ nats", "KL 99.9%, nats",
    "same top token, %", "KL everywhere", "calls parse, %", "calls right, %", "cases",
)  # fmt: skip
NOTES = (
    "± is one standard error; that of means over tokens takes the tokens of a conversation together. Perplexity, KL and "
    "same top token are those of the assistant's tokens; KL and same top token compare with the float checkpoint at its "
    "own K. KL everywhere, in 10⁻³ nats, is over all tokens. Bits per weight are those of the routed experts as stored, "
    'scales and biases included; kB per token are those of their bytes. "Naive" rounds as MLX does; what else is not '
    '"calibrated" is convert\'s default, a search for scales. "Rest" are the bits of what is always in memory; where '
    "nothing is said, it has the experts' bits, but never fewer than 4."
)


def table(results: Sequence[Result], recipes: Sequence[str]) -> str:
    """The results as Markdown, in the order of ``recipes`` and of falling K, with notes."""
    lines = [_row(COLUMNS), _row("---" for _ in COLUMNS)]
    for r in sorted(results, key=lambda r: (recipes.index(r["recipe"]), -r["k"])):
        differs, everywhere, calls = r["divergence"], r["divergence_everywhere"], r["tool_calls"]
        lines.append(_row((
            r["recipe"], f"{r['bits_per_weight']:.2f}", r["k"], f"{r['bytes_per_token'] / 1000:.0f}",
            _shown(r["perplexity"]["perplexity"], 1, 3), _shown(differs["kl"], 1000, 1), f"{differs['kl_999']:.3f}",
            _shown(differs["same_top"], 100, 1), _shown(everywhere["kl"], 1000, 1), _shown(calls["parsed"], 100, 1),
            _shown(calls["right"], 100, 1), calls["cases"],
        )))  # fmt: skip
    return "\n".join([*lines, "", f"{datetime.date.today()}, {platform.machine()}. {NOTES}"])


def summary(results: Sequence[Result], reference: str, naive: str) -> str:
    """What the recipe of least KL among those within the budget loses, as a share of what the naive one loses.

    Args:
        reference: the recipe that nothing is lost against; at the largest K, as are all here.
        naive: the recipe to be compared with. Other naive ones are no candidates.
    """
    own = max((r["k"] for r in results), default=0)
    at_own = {r["recipe"]: r for r in results if r["k"] == own}
    within = [r for name, r in at_own.items() if r["bits_per_weight"] <= BUDGET and "naive" not in name]
    if not within or not {reference, naive} <= at_own.keys():
        return f"No summary yet: it needs {reference!r}, {naive!r} and a recipe of at most {BUDGET} bits at the same K."
    best = min(within, key=lambda r: r["divergence"]["kl"]["value"])
    right = at_own[reference]["tool_calls"]["right"]["value"]
    kl, kl_naive = (r["divergence"]["kl"]["value"] for r in (best, at_own[naive]))
    lost, lost_naive = (right - r["tool_calls"]["right"]["value"] for r in (best, at_own[naive]))
    return (
        f"At K={own}, {best['recipe']!r} ({best['bits_per_weight']:.2f} bits per weight) and {naive!r}: "
        f"KL {1000 * kl:.1f} and {1000 * kl_naive:.1f} 10⁻³ nats, {_share(kl, kl_naive)}; "
        f"tool calls lost {100 * lost:.1f} and {100 * lost_naive:.1f} points of {100 * right:.1f}, "
        f"{_share(lost, lost_naive)}."
    )


def _row(cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _shown(estimate: dict[str, float | None], factor: float, digits: int) -> str:
    value, error = estimate["value"], estimate["standard_error"]
    assert value is not None
    shown = f"{factor * value:.{digits}f}"
    return shown if error is None else f"{shown} ± {factor * error:.{digits}f}"


def _share(lost: float, by_naive: float) -> str:
    return f"a ratio of {lost / by_naive:.2f}" if by_naive > 0 else "where the naive one loses nothing"
