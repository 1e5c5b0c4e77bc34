"""What everyday tools return, and what the assistant says about it."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from .everyday import everyday
from .intents import FIELD, PlainTool, named
from .splits import pick
from .text import capital, listing, phrases, say

_DONE = phrases("Done: {d}.; {D}.; All right, {d}.; Okay, {d}.; {D} now.; All set: {d}.")
_FOUND = phrases("Here is what I found: {r}.; {R}.; The answer: {r}.; It says: {r}.")
_OK = ('{"ok": true}', '{"status": "ok"}', "ok", "done", '"ok"', "Done.", '{"success": true}', "null", "true")
_FAILED = phrases("That did not work: {e}.; Sorry, that failed: {e}.; The tool says: {e}.")


def _written(rng: Random, values: dict[str, Any]) -> str:
    """Values as JSON, with spaces or as pydantic writes them, without."""
    return json.dumps(values, ensure_ascii=False, separators=None if rng.random() < 0.5 else (",", ":"))


def plain_result(rng: Random, tool: PlainTool, words: dict[str, str]) -> tuple[str, str]:
    """What a tool returns, as text, and the answer; ``words`` are the user's for the tool's slots."""
    intent, roll = tool.intent, rng.random()
    if roll < 0.05:
        error = pick(
            rng, ("not found", "timeout", "permission denied", "no connection", "not available", "try again later")
        )
        return pick(rng, (f'{{"error": "{error}"}}', f"error: {error}")), say(rng, pick(rng, _FAILED)).format(e=error)
    if not intent.results:
        content = pick(rng, _OK)
        done = named(intent.done, tool.noun)
        return content, say(rng, pick(rng, _DONE)).format(d=done, D=capital(done))
    values = {name: everyday(kind)(rng, True).value for name, kind in intent.results}
    if roll < 0.6 and all(key in words or key in values for key, _ in FIELD.findall(intent.answer)):
        return _written(rng, values), capital(intent.answer.format(**(words | values)))
    found = listing([f"{name}: {value}" for name, value in values.items()]).replace(" and ", ", ")
    if roll < 0.75:
        return _written(rng, values), say(rng, pick(rng, _FOUND)).format(r=found, R=capital(found))
    text = ", ".join(str(value) for value in values.values())
    return text, say(rng, pick(rng, _FOUND)).format(r=text, R=capital(text))
