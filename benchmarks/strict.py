"""What holding replies to their formats changes, on a small float checkpoint such as that of tools/demo_model.

    python benchmarks/strict.py MASTER FOLDER [--cells all | "RECIPE:K" ...] [--cases 500] [--schemas 100] [--processes 2]

Every cell is a recipe of benchmarks/quality.py at one K; ``all`` are those of docs/quality.md. Its replies to the tool-call
prompts, decoded greedily, are scored free and held to the tools' schemas: calls that parse, that also fit their JSON schema
as jsonschema judges it, and that are right. The same for JSON: facts to be written in the form of schemas of ten kinds.
FOLDER keeps recipes and results; the same command continues what was interrupted and prints the tables of what is there.

Free replies are decoded together. One whose every token its grammar allows is also the strict reply, since greedy decoding
draws first and asks then; only the others are decoded again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
from quality import CALLS, KS, NAIVE, RECIPES, make, write_calibration  # first: finds flash_moe's tools

from flash_moe import Model, ToolCallError, parse_tool_calls
from flash_moe.evaluation import read_tool_call_cases
from flash_moe.evaluation.tool_call_score import ToolCallCase, same_calls

MAX_TOKENS, MAX_JSON_TOKENS = 200, 300
NAMES = ("Kim", "Lena", "Oskar", "Tilda", "Mara")
CITIES = ("Oslo", "Tokyo", "Lima", "Cairo", "Quito")
STATES = ("open", "closed", "planned")
BASE = {"name": {"type": "string", "maxLength": 30}, "city": {"type": "string", "maxLength": 30}}


def schema_case(number: int) -> tuple[str, dict[str, Any]]:
    """A text with facts, and one of ten kinds of schemas for them."""
    rng = Random(number)
    name, city, state, day = rng.choice(NAMES), rng.choice(CITIES), rng.choice(STATES), rng.randint(1, 28)
    count, price = rng.randint(2, 90), rng.randint(100, 9999) / 100
    facts = f"{name} lives in {city}. The order of {count} plums costs {price}. It is {state}. The day is 2027-09-{day:02d}."
    order = {"count": {"type": "integer", "minimum": 1, "maximum": 99}, "price": {"type": "number", "minimum": 0}}
    when = {"day": {"type": "string", "format": "date"}, "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}}
    kinds: list[dict[str, Any]] = [
        BASE,
        order | {"state": {"enum": list(STATES)}},
        {"person": {"type": "object", "properties": BASE, "required": ["name", "city"]}, **order},
        {"words": {"type": "array", "items": BASE["city"], "minItems": 1, "maxItems": 4}},
        {"orders": {"type": "array", "maxItems": 3, "items": {"type": "object", "properties": order, "required": [*order]}}},
        when,
        {"city": {"anyOf": [BASE["city"], {"type": "null"}]}, "late": {"type": ["boolean", "null"]}},
        {"item": {"oneOf": [
            {"type": "object", "properties": {"kind": {"const": "fruit"}, **order}, "required": ["kind", "count"]},
            {"type": "object", "properties": {"kind": {"const": "person"}, **BASE}, "required": ["kind", "name"]},
        ]}},
        {"prices": {"type": "object", "additionalProperties": {"type": "number"}, "maxProperties": 3}},
        {"pair": {"type": "array", "prefixItems": [BASE["name"], order["count"]], "items": False, "minItems": 2}, **when},
    ]  # fmt: skip
    properties = kinds[number % len(kinds)]
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return f"{facts}\n\nFill in this schema: {json.dumps(schema, separators=(',', ':'))}", schema


def fits(calls: Sequence[dict[str, Any]], case: ToolCallCase) -> bool:
    """Whether every call names a function of the case and fits its schema."""
    schemas = {f["name"]: f.get("parameters", {}) for f in (tool.get("function", tool) for tool in case.tools or ())}
    return all(call["name"] in schemas and valid(call["arguments"], schemas[call["name"]]) for call in calls)


def valid(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value fits a schema that allows no other properties than it declares."""
    closed = {"additionalProperties": False, **schema}
    checker = jsonschema.Draft202012Validator(closed, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    return bool(checker.is_valid(value))


@dataclass(frozen=True)
class Written:
    """A reply: its tokens, text and whether it was cut."""

    tokens: Sequence[int]
    text: str
    cut: bool


def free_replies(model: Model, prompts: Sequence[list[int]], most: int) -> list[Written]:
    """Greedy replies, held to nothing; :attr:`Written.text` is all of their text."""
    if not prompts:
        return []
    found = model.generate(
        [list(prompt) for prompt in prompts], max_tokens=most, temperature=0, repetition_penalty=1, progress=False
    )
    return [Written(reply.tokens, reply.raw_text, reply.finish_reason == "length") for reply in found]


def allowed(model: Model, prompt: list[int], reply: Written, **wanted: Any) -> bool:
    """Whether the grammar of what is wanted allows every token of a reply, and what it forbids was not drawn."""
    enforcer = model._enforcer
    enforced = enforcer.enforce(wanted.get("tools"), "auto", wanted.get("strict_tools"), wanted.get("response_format"))
    constraint = enforcer.constraint(enforced, prompt)
    if constraint is None:  # no tools, so nothing to hold calls to
        return not set(reply.tokens) & set(enforced.forbidden)
    constraint.prepare()
    for token in reply.tokens:
        if token in enforced.forbidden or not constraint.allows(token):
            return False
        constraint.accept(token)
    return True


def strict_reply(model: Model, prompt: list[int], free: Written, most: int, **wanted: Any) -> Written:
    """The greedy reply that is held to what is wanted."""
    if allowed(model, prompt, free, **wanted):
        return free
    reply = model.generate(prompt, max_tokens=most, temperature=0, repetition_penalty=1, progress=False, **wanted)
    return Written(reply.tokens, reply.raw_text, reply.finish_reason == "length")


def score_calls(cases: Sequence[ToolCallCase], replies: Sequence[Written]) -> dict[str, int]:
    """Counts replies; those that were cut count as not parsed where their call is not complete."""
    counts = dict.fromkeys(("cases", "parse", "fit", "right", "cut", "uncut that fit"), 0)
    for case, reply in zip(cases, replies, strict=True):
        counts["cases"] += 1
        counts["cut"] += reply.cut
        try:
            calls, _ = parse_tool_calls(reply.text, case.tools)
        except ToolCallError:
            continue
        counts["parse"] += 1
        counts["fit"] += fits(calls, case)
        counts["uncut that fit"] += fits(calls, case) and not reply.cut
        counts["right"] += same_calls(calls, case.calls)
    return counts


def score_json(schemas: Sequence[dict[str, Any]], replies: Sequence[Written]) -> dict[str, int]:
    counts = dict.fromkeys(("cases", "parse", "fit", "cut", "uncut that fit"), 0)
    for schema, reply in zip(schemas, replies, strict=True):
        counts["cases"] += 1
        counts["cut"] += reply.cut
        try:
            value = json.loads(reply.text)
        except ValueError:
            continue
        counts["parse"] += 1
        counts["fit"] += valid(value, schema)
        counts["uncut that fit"] += valid(value, schema) and not reply.cut
    return counts


def measure(recipe: str, place: Path, k: int, cases: int, schemas: int) -> dict[str, Any]:
    """One cell."""
    start = time.monotonic()
    result: dict[str, Any] = {"recipe": recipe, "k": k, "free": {}, "strict": {}}
    with Model.load(place, experts_per_token=k, expert_io="resident") as model:
        called = read_tool_call_cases(CALLS, cases) if cases else []
        prompts = [model.encode(case.messages, tools=case.tools, enable_thinking=False) for case in called]
        free = free_replies(model, prompts, MAX_TOKENS)
        strict = [
            strict_reply(model, prompt, reply, MAX_TOKENS, tools=case.tools, strict_tools=True if case.tools else None)
            for prompt, reply, case in zip(prompts, free, called, strict=True)
        ]
        result["free"]["calls"], result["strict"]["calls"] = score_calls(called, free), score_calls(called, strict)
        asked = [schema_case(number) for number in range(schemas)]
        prompts = [model.encode(text, enable_thinking=False) for text, _ in asked]
        free = free_replies(model, prompts, MAX_JSON_TOKENS)
        strict = [
            strict_reply(model, prompt, reply, MAX_JSON_TOKENS, response_format=schema)
            for prompt, reply, (_, schema) in zip(prompts, free, asked, strict=True)
        ]
        wanted = [schema for _, schema in asked]
        result["free"]["json"], result["strict"]["json"] = score_json(wanted, free), score_json(wanted, strict)
    return result | {"seconds": time.monotonic() - start}


def table(results: Sequence[dict[str, Any]], task: str, columns: Sequence[str]) -> str:
    lines = [f"| experts | K | cases | {' | '.join(f'{column}, free → strict' for column in columns)} |",
             "|" + "---|" * (3 + len(columns))]  # fmt: skip
    for result in results:
        free, strict = result["free"][task], result["strict"][task]
        if free["cases"]:
            values = " | ".join(f"{free[column]} → {strict[column]}" for column in columns)
            lines.append(f"| {result['recipe']} | {result['k']} | {free['cases']} | {values} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("master", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--cells", nargs="+", default=["2 bits, naive, from float:2", f"{NAIVE}:2", "4 bits:2", "4 bits:4"]
    )
    parser.add_argument(
        "--cases", type=int, default=500, help="number of cases, from the beginning of the file in models/eval"
    )
    parser.add_argument("--schemas", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2, help="cells that run at a time")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    file = options.folder / "strict.jsonl"
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(r["recipe"], r["k"], r["free"]["calls"]["cases"], r["free"]["json"]["cases"]) for r in results}
    tokens = write_calibration(options.master, options.folder / "calibration.jsonl")

    def prepared(name: str) -> Path:
        if (source := RECIPES[name].source) is None:
            return options.master
        place: Path = options.folder / name.replace(",", "").replace(" ", "-")
        make(name, prepared(source), place, tokens)
        return place

    cells = [f"{name}:{k}" for name in RECIPES for k in KS] if options.cells == ["all"] else options.cells
    named = [(recipe, int(k)) for recipe, _, k in (cell.rpartition(":") for cell in cells)]
    tasks = [
        (recipe, prepared(recipe), k, options.cases, options.schemas)
        for recipe, k in named
        if (recipe, k, options.cases, options.schemas) not in done
    ]
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool, file.open("a") as stream:
        for future in as_completed([pool.submit(measure, *task) for task in tasks]):
            results.append(future.result())
            stream.write(json.dumps(results[-1]) + "\n")
            stream.flush()
            print(results[-1], file=sys.stderr, flush=True)
    results = [r for r in results if (r["recipe"], r["k"]) in named]
    results.sort(key=lambda r: named.index((r["recipe"], r["k"])))
    print(table(results, "calls", ("parse", "fit", "right", "cut", "uncut that fit")))
    print()
    print(table(results, "json", ("parse", "fit", "cut", "uncut that fit")))


if __name__ == "__main__":
    main()
