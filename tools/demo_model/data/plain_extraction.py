"""Facts in plain sentences, and the JSON object that they fill; asked for by fields, by a schema, or just "as JSON"."""

from __future__ import annotations

import json
import re
from random import Random
from typing import Any

from .everyday import everyday
from .splits import TRAIN, belongs, pick
from .text import a, listing, phrases, read_table, say

_FIELD = re.compile(r"\{(\w+):([^{}]+)\}")
_LISTED = phrases(
    "Extract {f} as JSON.; Return {f} as JSON.; {f} as JSON[.|, please.|]; Give me {f} in JSON.; JSON with {f}[.|, please.];"
    "[Find|Get] {f} and answer in JSON.; What [is|are] {f}? Answer in JSON.; Fill in {f}.; {F}?; I need {f} as JSON."
)
_NAMED = phrases(
    "Fill in the {t} as JSON.; [Turn this into|Make] JSON.; As JSON[.|, please.|]; The {t} as JSON.; Write {a} object in JSON.;"
    "Extract the {t}.; Give me the {t} as JSON.; Read the {t} from this text. JSON only.; {T}, in JSON."
)
_BY_SCHEMA = phrases(
    "Fill in this schema: {s}; Schema: {s}; Answer with JSON of this schema: {s}; Use this JSON schema: {s}; Return JSON for {s}"
)
_NULL = (" Use null for what is missing.", " Write null where you do not know.", " Null if unknown.")
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_TYPES = {"int": "integer", "num": "number"}


def plain_extraction(rng: Random, split: str) -> dict[str, Any]:
    """A text with facts, and the JSON object that the assistant writes; what the text does not tell is null."""
    _, (topic, first, *others) = pick(rng, _RECORDS)
    told = [first, *(one for one in others if rng.random() < 0.6)]
    values: dict[str, Any] = {}

    def words(match: re.Match[str]) -> str:
        said = everyday(match[2])(rng, rng.random() < 0.6)
        values[match[1]] = said.value
        return said.words

    text = " ".join([_FIELD.sub(words, one) for one in told])
    known = [field for field in values if belongs(field, TRAIN)] or list(values)
    fields = [field for field in known if rng.random() < 0.8] or known
    if rng.random() < 0.25:
        fields += [name for one in others if one not in told for name, _ in _FIELD.findall(one) if belongs(name, TRAIN)]
    roll = rng.random()
    if roll < 0.5:
        if rng.random() < 0.5:
            rng.shuffle(fields)
        named = listing([name.replace("_", " ") for name in fields])
        asked = say(rng, pick(rng, _LISTED)).format(f=named, F=named.capitalize())
    elif roll < 0.75:
        fields = known
        asked = say(rng, pick(rng, _NAMED)).format(t=topic, T=topic.capitalize(), a=a(topic))
    else:
        asked = say(rng, pick(rng, _BY_SCHEMA)).format(s=_to_json(_schema(rng, fields)))
    if any(name not in values for name in fields) and rng.random() < 0.5:
        asked += pick(rng, _NULL)
    gap = pick(rng, ("\n\n", "\n\n", "\n", " "))
    message = f"{text}{gap}{asked}" if rng.random() < 0.6 else f"{asked}{gap}{text}"
    reply = {"role": "assistant", "content": _to_json({name: values.get(name) for name in fields})}
    return {"messages": [{"role": "user", "content": message}, reply], "tools": None, "enable_thinking": False}


def _schema(rng: Random, fields: list[str]) -> dict[str, Any]:
    kinds = dict(pair for _, (_, *sentences) in _RECORDS for one in sentences for pair in _FIELD.findall(one))
    properties = {name: {"type": _TYPES.get(kinds[name].partition(":")[0], "string")} for name in fields}
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    return schema | ({"required": list(fields)} if rng.random() < 0.6 else {})


_RECORDS = list(read_table("sentences.txt"))
