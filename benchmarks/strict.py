"""What holding replies to their formats changes, on a small float checkpoint such as that of tools/demo_model.

    python benchmarks/strict.py MASTER FOLDER [--cells "RECIPE:K" ...] [--cases 500] [--schemas 100]

Every cell is a recipe of benchmarks/quality.py at one K. Its replies to the tool-call prompts, decoded greedily, are scored
free and held to the tools' schemas: calls that parse, that also fit their JSON schema as jsonschema judges it, and that are
right. The same for JSON: facts to be written in the form of schemas of ten kinds. FOLDER keeps recipes and results; the same
command continues what was interrupted and prints the tables of what is there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
from quality import CALLS, NAIVE, RECIPES, make, write_calibration  # first: finds flash_moe's tools

from flash_moe import Model, ToolCallError, parse_tool_calls
from flash_moe.evaluation import greedy, read_tool_call_cases
from flash_moe.evaluation.tool_calls import Reply, ToolCallCase, same_calls

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


def score_calls(cases: Sequence[ToolCallCase], generate: Callable[[ToolCallCase], Reply]) -> dict[str, int]:
    """Counts replies; those that were cut count as not parsed where their call is not complete."""
    counts = dict.fromkeys(("cases", "parse", "fit", "right", "cut", "uncut that fit"), 0)
    for case in cases:
        reply = generate(case)
        cut = reply.finish_reason == "length"
        counts["cases"] += 1
        counts["cut"] += cut
        try:
            calls, _ = parse_tool_calls(reply.raw_text, case.tools)
        except ToolCallError:
            continue
        counts["parse"] += 1
        counts["fit"] += fits(calls, case)
        counts["uncut that fit"] += fits(calls, case) and not cut
        counts["right"] += same_calls(calls, case.calls)
    return counts


def score_json(model: Model, count: int, strict: bool) -> dict[str, int]:
    counts = dict.fromkeys(("cases", "parse", "fit", "cut", "uncut that fit"), 0)
    for number in range(count):
        prompt, schema = schema_case(number)
        reply = model.generate(
            prompt, response_format=schema if strict else None, max_tokens=MAX_JSON_TOKENS, temperature=0,
            enable_thinking=False,
        )  # fmt: skip
        counts["cases"] += 1
        counts["cut"] += reply.finish_reason == "length"
        try:
            value = json.loads(reply.text)
        except ValueError:
            continue
        counts["parse"] += 1
        counts["fit"] += valid(value, schema)
        counts["uncut that fit"] += valid(value, schema) and reply.finish_reason == "stop"
    return counts


def measure(recipe: str, place: Path, k: int, cases: int, schemas: int) -> dict[str, Any]:
    """One cell."""
    start = time.monotonic()
    result: dict[str, Any] = {"recipe": recipe, "k": k}
    with Model.load(place, experts_per_token=k, expert_io="resident") as model:
        prompts = read_tool_call_cases(CALLS, cases) if cases else []
        for name, strict in (("free", False), ("strict", True)):
            result[name] = {
                "calls": score_calls(prompts, greedy(model, MAX_TOKENS, False, strict)),
                "json": score_json(model, schemas, strict),
            }
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
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--schemas", type=int, default=100)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    file = options.folder / "strict.jsonl"
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    tokens = write_calibration(options.master, options.folder / "calibration.jsonl")

    def prepared(name: str) -> Path:
        if (source := RECIPES[name].source) is None:
            return options.master
        place: Path = options.folder / name.replace(",", "").replace(" ", "-")
        make(name, prepared(source), place, tokens)
        return place

    for cell in options.cells:
        recipe, _, k = cell.rpartition(":")
        if not any(r["recipe"] == recipe and r["k"] == int(k) for r in results):
            results.append(measure(recipe, prepared(recipe), int(k), options.cases, options.schemas))
            with file.open("a") as stream:
                stream.write(json.dumps(results[-1]) + "\n")
            print(results[-1], file=sys.stderr, flush=True)
    print(table(results, "calls", ("parse", "fit", "right", "cut", "uncut that fit")))
    print()
    print(table(results, "json", ("parse", "fit", "cut", "uncut that fit")))


if __name__ == "__main__":
    main()
