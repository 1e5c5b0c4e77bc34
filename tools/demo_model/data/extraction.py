"""Extraction: a few sentences and a list of fields, answered with nothing but a JSON object."""

from __future__ import annotations

import json
import re
from random import Random
from typing import Any

from .splits import belongs, pick
from .text import Phrase, listing, phrase, phrases, read_table, say
from .values import kind
from .words import pseudo_word

_FIELD = re.compile(r"\{(\w+):([^{}]+)\}")
_ASK = phrases(
    "[Extract|Return|Give me] {f} as JSON.; [Read|Get] {f} [from the text|from this] and answer in JSON.;"
    "[Fields|Keys]: {f}. JSON only.; Turn this into JSON with {f}.; Make a JSON object with {f}."
)
_BY_SCHEMA = phrases("Answer with JSON of this schema: {s}; Schema: {s}; JSON schema: {s}; Fill in this schema: {s}")
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_SUFFIXES = ("{}", "{}", "the_{}", "{}_value", "{}_field", "{}_text", "record_{}", "my_{}", "{}_1")


class _Part:
    """One sentence and the field it tells."""

    def __init__(self, source: str) -> None:
        match = _FIELD.search(source)
        assert match is not None, f"found no {{field:kind}} in {source!r}"
        self.field, self.kind = match[1], kind(match[2])
        self.sentence: Phrase = phrase(source.replace(match[0], "{v}"))


_RECORDS = [[_Part(column) for column in columns] for _, columns in read_table("records.txt")]


def _field_name(rng: Random, split: str, part: _Part) -> tuple[str, str]:
    """The name of a field in the answer, and a description where the name says nothing."""
    while rng.random() < 0.75:
        name = pick(rng, _SUFFIXES).format(part.field)
        if belongs(name, split):
            return name, ""
    return pseudo_word(rng, split), part.field.replace("_", " ")


def extraction(rng: Random, split: str) -> dict[str, Any]:
    """A text, the fields to find in it, and the JSON object; a field that the text does not tell is null."""
    record = pick(rng, _RECORDS)
    count = 2 + int(rng.random() * (len(record) - 1))
    parts = [record[0], *rng.sample(record[1:], count - 1)] if rng.random() < 0.85 else rng.sample(record, count)
    told = [part for part in record if part in parts or part is record[0] or rng.random() < 0.35]
    if len(parts) > 2 and rng.random() < 0.3:
        absent = pick(rng, parts)
        told = [part for part in told if part is not absent or part is record[0]]
    answer: dict[str, Any] = {}
    fields: dict[str, dict[str, Any]] = {}
    values = {}
    sentences = []
    for part in told:
        schema = part.kind.schema(rng, split)
        values[part.field], words = part.kind.value(rng, split, schema)
        sentences.append(say(rng, part.sentence).format(v=words) + ".")
    for part in parts:
        name, description = _field_name(rng, split, part)
        while name in fields:
            name, description = pseudo_word(rng, split), part.field.replace("_", " ")
        fields[name] = dict(part.kind.schema(rng, split))
        if description:
            fields[name]["description"] = description
        answer[name] = values.get(part.field)
    text = pick(rng, (" ", " ", "\n")).join(sentences)
    asked = _asked(rng, fields)
    if answer and any(value is None for value in answer.values()) and rng.random() < 0.5:
        asked += " Use null for what is missing."
    message = f"{asked}\n\n{text}" if rng.random() < 0.6 else f"{text}\n\n{asked}"
    thinking = rng.random() < 0.1
    reply: dict[str, Any] = {"role": "assistant", "content": _to_json(answer)}
    if thinking:
        reply["reasoning_content"] = f"The user wants JSON with {listing(list(fields))}."
    messages = [{"role": "user", "content": message}, reply]
    return {"messages": messages, "tools": None, "enable_thinking": thinking}


def _asked(rng: Random, fields: dict[str, dict[str, Any]]) -> str:
    if rng.random() < 0.4:
        schema = {"type": "object", "properties": fields}
        return say(rng, pick(rng, _BY_SCHEMA)).format(s=_to_json(schema))
    names = [
        name + (f" ({schema['description']})" if "description" in schema else "") for name, schema in fields.items()
    ]
    return say(rng, pick(rng, _ASK)).format(f=listing(names))
