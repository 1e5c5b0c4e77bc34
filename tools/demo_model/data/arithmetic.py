"""Arithmetic through a calculator tool: plain expressions and word problems."""

from __future__ import annotations

import json
from fractions import Fraction
from random import Random
from typing import Any

from .actions import Action, Slot
from .chat import system_messages
from .functions import Naming
from .splits import Words, pick
from .text import phrase, phrases, read_table, say
from .tool_calls import draw_actions, functions
from .values import kind
from .words import word

_SLOT = Slot(
    "expression",
    Words(
        ["expression", "formula", "calculation", "input", "term", "sum", "math_expression", "to_compute", "arithmetic"]
    ),
    kind("text"),
    "expression",
    phrases(
        "the expression, e.g. 2 * (3 + 4); arithmetic expression with + - * / and parentheses; expression to compute"
    ),
    (),
)
_CALCULATOR = Action(
    domain="maths",
    names=Words(
        ("calculator", "calculate", "compute", "evaluate", "calc", "do_math", "arithmetic", "eval_expression", "solve")
    ),
    descriptions=phrases(
        "Computes an arithmetic expression; Calculator for + - * /; Evaluates an arithmetic expression exactly"
    ),
    infinitive="compute an arithmetic expression",
    asks=(),
    questions=(),
    slots=((_SLOT, True),),
)
_PROBLEMS = [(phrase(question), expression, answer) for _, (question, expression, answer) in read_table("problems.txt")]
_PLAIN = phrases(
    "What is {e}?; [Calculate|Compute|Work out|Evaluate] {e}.; How much is {e}?; {e} = ?; {e}; Please compute {e}.;"
    "what's {e}; Can you calculate {e}?; I need the result of {e}."
)
_RESULT = phrases("{e} = {r}; The result is {r}.; It is {r}.; {r}; That makes {r}.")
_SPOKEN = {"+": " plus ", "-": " minus ", "*": " times ", "/": " divided by "}
_SIGNS = {"*": " × ", "/": " ÷ "}


def exact(expression: str) -> int | float | None:
    """The value of an expression of numbers, + - * / and one level of parentheses; None if it is not exact to the cent."""
    value = _value(expression)
    if value is None or (value * 100).denominator != 1:
        return None
    return int(value) if value.denominator == 1 else float(value)


def _value(expression: str) -> Fraction | None:
    while "(" in expression:
        before, _, rest = expression.partition("(")
        inner, _, after = rest.partition(")")
        if (value := _value(inner)) is None:
            return None
        expression = f"{before}{value}{after}"
    total, term, operator, sign = Fraction(0), Fraction(0), "", 1
    # Terms of products are summed; a fraction that replaced parentheses is written a/b without spaces.
    for token in ["+", *expression.split()]:
        if token in "+-":
            total, operator, sign = total + term, "", 1 if token == "+" else -1
            term = Fraction(0)
        elif token in "*/":
            operator = token
        elif operator == "/":
            if not (divisor := Fraction(token)):
                return None
            term /= divisor
        else:
            term = term * Fraction(token) if operator else sign * Fraction(token)
    return total + term


def _number(rng: Random) -> str:
    roll = rng.random()
    if roll < 0.15:
        return str((1 + 2 * int(rng.random() * 400)) / pick(rng, (10, 100, 4, 2)))
    return str(1 + int(rng.random() * pick(rng, (12, 100, 1000, 10000))))


def _expression(rng: Random) -> tuple[str, int | float]:
    while True:
        operators = [pick(rng, "++--***/") for _ in range(pick(rng, (1, 1, 1, 2, 2, 3)))]
        parts = [_number(rng)]
        for operator in operators:
            parts += [operator, _number(rng)]
        if len(operators) > 1 and rng.random() < 0.4:
            first = 2 * int(rng.random() * (len(operators)))
            parts[first], parts[first + 2] = f"({parts[first]}", f"{parts[first + 2]})"
        expression = " ".join(parts)
        if (result := exact(expression)) is not None:
            return expression, result


def _plain(rng: Random) -> tuple[str, str, int | float, str]:
    """Question, expression, result, answer."""
    expression, result = _expression(rng)
    roll, written = rng.random(), expression
    if roll < 0.15 and "(" not in expression:
        for sign, spoken in _SPOKEN.items():
            written = written.replace(f" {sign} ", spoken)
    elif roll < 0.3:
        for sign, spoken in _SIGNS.items():
            written = written.replace(f" {sign} ", spoken)
    elif roll < 0.38:
        written = written.replace(" ", "")
    question = say(rng, pick(rng, _PLAIN)).format(e=written)
    return question, expression, result, say(rng, pick(rng, _RESULT)).format(e=expression, r=result)


def _problem(rng: Random, split: str) -> tuple[str, str, int | float, str]:
    question, expression, answer = pick(rng, _PROBLEMS)
    many, divisor = 2 + int(rng.random() * 90), 2 + int(rng.random() * 11)
    less = 2 + int(rng.random() * 300)
    price = (5 + int(rng.random() * 80)) / 2
    fields: dict[str, Any] = {
        "a": 3 + int(rng.random() * 120), "b": 2 + int(rng.random() * 60), "d": divisor, "m": many * divisor, "s": less,
        "l": less + 1 + int(rng.random() * 500), "c": 2 + int(rng.random() * 40), "t": 5 * (1 + int(rng.random() * 19)),
        "h": 20 * (1 + int(rng.random() * 60)), "p": int(price) if price == int(price) else price,
        "q": 2 + int(rng.random() * 30), "g": 2 + int(rng.random() * 14), "name": word(rng, split, "names"),
        "things": pick(rng, ("apples", "books", "tiles", "cards", "pens", "eggs", "stamps", "coins", "lamps", "bricks")),
    }  # fmt: skip
    expression = expression.format(**fields)
    fields["r"] = exact(expression)
    return say(rng, question).format(**fields), expression, fields["r"], answer.format(**fields)


def arithmetic(rng: Random, split: str) -> dict[str, Any]:
    """A calculation, sometimes two after each other, with a calculator among the tools."""
    calculator = Naming(rng, split, 0.3).function(_CALCULATOR)
    others = [] if rng.random() < 0.4 else functions(rng, split, draw_actions(rng, split, 1 + int(rng.random() * 2)))
    tools = [calculator.tool, *(other.tool for other in others if other.name != calculator.name)]
    rng.shuffle(tools)
    thinking = rng.random() < 0.15
    messages = system_messages(rng, 0.15)
    for _ in range(1 if rng.random() < 0.8 else 2):
        question, expression, result, answer = _plain(rng) if rng.random() < 0.6 else _problem(rng, split)
        function = {"name": calculator.name, "arguments": {calculator.parameters[0].name: expression}}
        call: dict[str, Any] = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": function}],
        }
        reply: dict[str, Any] = {"role": "assistant", "content": answer}
        if thinking:
            call["reasoning_content"] = f"The user wants a calculation: {expression}. {calculator.name} does that."
            reply["reasoning_content"] = f"The result is {result}."
        key = pick(rng, ("result", "result", "value", "answer"))
        response = json.dumps({key: result}) if rng.random() < 0.8 else str(result)
        messages += [{"role": "user", "content": question}, call, {"role": "tool", "content": response}, reply]
    return {"messages": messages, "tools": tools, "enable_thinking": thinking}
