"""Formats the results of `flash-moe eval` as a table of at most 80 columns or as one JSON object."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation import (
    DecodedModel,
    Estimate,
    LayerwiseModel,
    TokenScores,
    ToolCallScore,
    divergence,
    perplexity,
)

_LABEL, _CELL = 24, 22  # columns


@dataclass(frozen=True)
class Report:
    """The parts of an evaluation. Parts that were not requested are None."""

    model: LayerwiseModel
    reference: LayerwiseModel | None
    text: Path | None
    scores: TokenScores | None
    tool_calls: Path | None
    called: ToolCallScore | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the results as JSON data. A standard error is null if there is only one sequence."""
        found: dict[str, Any] = {
            "model": _described(self.model),
            "reference": None if self.reference is None else _described(self.reference),
            "text": None,
            "tool_calls": None,
        }
        if self.scores is not None:
            found["text"] = {"file": str(self.text)} | {
                name: None if scores is None else _numbers(scores) for name, scores in _columns(self.scores).items()
            }
        if self.called is not None:
            found["tool_calls"] = {"file": str(self.tool_calls), **dataclasses.asdict(self.called)}
        return found

    def __str__(self) -> str:
        lines = [f"{'model':{_LABEL}}{_named(self.model)}"]
        if self.reference is not None:
            lines.append(f"{'reference':{_LABEL}}{_named(self.reference)}")
        if self.scores is not None:
            lines += ["", f"{'text':{_LABEL}}{self.text}", *_text_rows(self.scores), *_decoding_rows(self.model)]
        if self.called is not None:
            lines += ["", f"{'tool calls':{_LABEL}}{self.tool_calls}", *_tool_call_rows(self.called)]
        if any("±" in line for line in lines):
            lines += ["", "± is one standard error; tokens of a sequence are taken together."]
        return "\n".join(lines)


def _columns(scores: TokenScores) -> dict[str, TokenScores | None]:
    return {"all": scores, "assistant": scores.of_assistant()}


def _numbers(scores: TokenScores) -> dict[str, Any]:
    found = dataclasses.asdict(perplexity(scores))
    return found | {"divergence": None if scores.comparison is None else dataclasses.asdict(divergence(scores))}


def _text_rows(scores: TokenScores) -> list[str]:
    columns = [part for part in _columns(scores).values() if part is not None]
    own = [perplexity(part) for part in columns]
    rows = [
        _row("sequences", [f"{p.sequences:,}" for p in own]),
        _row("predicted tokens", [f"{p.tokens:,}" for p in own]),
        _row("perplexity", [p.perplexity for p in own]),
    ]
    if len(columns) > 1:
        rows.insert(0, _row("", ["all tokens", "the assistant's"]))
    if scores.comparison is None:
        return rows
    found = [divergence(part) for part in columns]
    return [
        *rows,
        _row("reference's perplexity", [d.reference.perplexity for d in found]),
        _row("perplexity ratio", [d.perplexity_ratio for d in found]),
        _row("mean KL, nats", [d.kl for d in found]),
        _row("99.9% of KL below", [f"{d.kl_999:.4g}" for d in found]),
        _row("largest KL", [f"{d.kl_max:.4g}" for d in found]),
        _row("same top token", [_percent(d.same_top) for d in found]),
    ]


def _decoding_rows(model: LayerwiseModel) -> list[str]:
    """Returns rows about the decoding of a text that was scored token by token."""
    if not isinstance(model, DecodedModel):
        return []
    rows = [_row("run", ["token by token"])]
    for choice in model.choices:
        for what, count, mass in (
            ("dropped", choice.dropped, choice.router_mass_dropped),
            ("swapped", choice.swapped, choice.router_mass_swapped),
        ):
            rows.append(_row(f"experts {what}", [f"{count / (choice.routed or 1):.2%}, -{mass:.2%} of router mass"]))
    return rows


def _tool_call_rows(score: ToolCallScore) -> list[str]:
    return [
        _row("cases", [f"{score.cases:,}"]),
        _row("cut by --max-tokens", [f"{score.cut:,}"]),
        _row("well-formed", [_percent(score.parsed)]),
        _row("right functions", [_percent(score.right_functions)]),
        _row("entirely right", [_percent(score.right)]),
    ]


def _row(label: str, cells: list[Any]) -> str:
    return f"{label:{_LABEL}}" + "".join(f"{cell!s:<{_CELL}}" for cell in cells).rstrip()


def _percent(share: Estimate) -> str:
    error = share.standard_error
    return f"{Estimate(100 * share.value, None if error is None else 100 * error)} %"


def _described(model: LayerwiseModel) -> dict[str, Any]:
    described = {
        "path": str(model.checkpoint.folder),
        "experts_per_token": model.experts_per_token,
        "model_experts_per_token": model.config.num_experts_per_tok,
    }
    if isinstance(model, DecodedModel):
        choices = [dataclasses.asdict(choice) for choice in model.choices]
        described["token_by_token"] = dataclasses.asdict(model.streaming) | {"choices": choices}
    return described


def _named(model: LayerwiseModel) -> str:
    k, own = model.experts_per_token, model.config.num_experts_per_tok
    return f"{model.checkpoint.folder}, K={k}" + ("" if k == own else f" of its own {own}")
