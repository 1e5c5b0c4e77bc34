"""Functions as tools: schemas of signatures and docstrings, and calls with what models write."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import functools
import json
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from flash_moe import ArgumentError, parse_tool_calls
from flash_moe.text.function_tools import FunctionTool, tool_schemas


def google(city: str, days: int = 1, unit: Literal["C", "F"] = "C") -> dict[str, Any]:
    """Returns the weather.

    Looks far ahead.

    Args:
        city: where,
            and no other place.
        days (int): how many.

    Returns:
        A dict.
    """
    return {"city": city, "days": days, "unit": unit}


def numpy_style(points: list[tuple[float, float]], *, note: str | None = None) -> int:
    """Counts points.

    Parameters
    ----------
    points : list
        The points.
    note : str, optional
        Anything.
    """
    return len(points)


class City(BaseModel):
    name: str
    founded: datetime.date


class Size(enum.Enum):
    small = "s"
    large = "l"


def of_models(
    city: City, size: Size = Size.small, amount: Annotated[int, Field(ge=1, description="how many")] = 1
) -> City:
    assert isinstance(city, City) and isinstance(size, Size)
    return city


def test_google_style() -> None:
    function = FunctionTool(google).schema["function"]
    assert function == {
        "name": "google",
        "description": "Returns the weather.\n\nLooks far ahead.",
        "parameters": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "city": {"type": "string", "description": "where,\nand no other place."},
                "days": {"type": "integer", "default": 1, "description": "how many."},
                "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
            },
            "required": ["city"],
        },
    }


def test_numpy_style_and_models() -> None:
    parameters = FunctionTool(numpy_style).schema["function"]["parameters"]
    assert parameters["properties"]["points"]["description"] == "The points."
    assert parameters["properties"]["note"]["anyOf"] == [{"type": "string"}, {"type": "null"}]
    parameters = FunctionTool(of_models).schema["function"]["parameters"]
    assert parameters["properties"]["amount"]["minimum"] == 1
    assert parameters["properties"]["amount"]["description"] == "how many"
    assert parameters["$defs"]["City"]["properties"]["founded"]["format"] == "date"


def test_arguments_become_what_the_annotations_say() -> None:
    assert json.loads(FunctionTool(google).call({"city": "Oslo"})) == {"city": "Oslo", "days": 1, "unit": "C"}
    city = {"name": "Oslo", "founded": "1048-01-01"}
    assert json.loads(FunctionTool(of_models).call({"city": city, "size": "l"})) == city


def names_of_pydantic(schema: str, model_config: int, _x: int = 0, self_: int = 0, copy: int = 1) -> str:
    return f"{schema} {model_config} {_x} {copy}"


class Counter:
    """Counts."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, by: int) -> int:
        """Adds."""
        self.count += by
        return self.count

    def __call__(self, by: int) -> int:
        return self.add(by)


def test_odd_functions() -> None:
    assert FunctionTool(names_of_pydantic).call({"schema": "a", "model_config": 2, "_x": 3}) == "a 2 3 1"
    counter = Counter()
    assert FunctionTool(counter.add).call({"by": 2}) == "2"
    assert FunctionTool(counter).call({"by": 2}) == "4"
    assert FunctionTool(counter).name == "Counter"
    assert FunctionTool(functools.wraps(google)(lambda **given: given["city"])).schema["function"]["name"] == "google"
    assert FunctionTool(lambda: None).call({}) == "null"
    assert FunctionTool(lambda x: x).call({"x": [1]}) == "[1]"


@dataclasses.dataclass
class Point:
    x: float


@pytest.mark.parametrize(
    ("result", "text"),
    [("as is", "as is"), (None, "null"), (Point(1.5), '{"x":1.5}'), ({"b"}, '["b"]'), ("ö", "ö"), ({"ö": 1}, '{"ö":1}'),
     (datetime.date(2024, 1, 2), '"2024-01-02"')],
)  # fmt: skip
def test_results_become_text(result: Any, text: str) -> None:
    assert FunctionTool(lambda: result).call({}) == text


@pytest.mark.parametrize(
    "arguments", [{}, {"city": 1}, {"city": "a", "days": "x"}, {"city": "a", "zzz": 1}, {"city": "a", "unit": "K"}]
)
def test_arguments_that_do_not_fit_are_an_error(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="google"):
        FunctionTool(google).call(arguments)


def test_a_result_that_json_cannot_hold_is_an_error() -> None:
    with pytest.raises(ValueError, match="object"):
        FunctionTool(lambda: object()).call({})


async def waits() -> None: ...


def starred(*args: int) -> None: ...


def unknown(x: NotDefined) -> None: ...  # noqa: F821


def thread(x: FunctionTool) -> None: ...


@pytest.mark.parametrize(
    "tool",
    [waits, starred, unknown, thread, 5, "name", City, None],
    ids=lambda tool: getattr(tool, "__name__", str(tool)),
)
def test_what_cannot_be_a_tool(tool: Any) -> None:
    with pytest.raises(ArgumentError):
        tool_schemas([tool])
    for tools in ("name", google, {}):
        with pytest.raises(ArgumentError, match="expected a list"):
            tool_schemas(tools)  # type: ignore[arg-type]


def test_the_parser_reads_calls_by_these_schemas() -> None:
    values = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in (("city", "Oslo"), ("days", 3)))
    text = f"<tool_call>\n<function=google>\n{values}</function>\n</tool_call>"
    schema = {"name": "other"}
    calls, _ = parse_tool_calls(text, tool_schemas([google, schema]))
    assert calls == [{"name": "google", "arguments": {"city": "Oslo", "days": 3}}]


def test_two_tools_of_one_name_are_an_error() -> None:
    with pytest.raises(ArgumentError, match="two tools are called 'f'"):
        tool_schemas([{"name": "g"}, {"name": "f"}, {"type": "function", "function": {"name": "f"}}])
