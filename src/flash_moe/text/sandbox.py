"""The sandbox for chat templates: no access to Python, and limits on steps, output and size of values.

Templates are untrusted code from the hub. They have the same helper functions as in transformers
(`utils/chat_template_utils.py`), so that they render the same text.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

MAX_STEPS = 300_000  # loop iterations, calls, filters and operators, in addition to one per character of the messages
MAX_CHARACTERS = 16_000_000  # characters of the prompt in addition to those of the messages, and of a value
MAX_ITEMS = 1_000_000  # items of a value, including nested ones
MAX_SECONDS = 30.0  # seconds of computing
_WIDTH = re.compile(r"\d{6}|\*")
_PADDING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice"})


class Budget:
    """The remaining budget of a rendering. Exceeding it raises TemplateError."""

    def __init__(self, held: int) -> None:
        self._steps, self._characters = MAX_STEPS + held, MAX_CHARACTERS + 4 * held
        self._deadline = time.thread_time() + MAX_SECONDS

    def step(self, count: int = 1) -> None:
        self._steps -= count
        if self._steps < 0 or time.thread_time() > self._deadline:
            raise TemplateError(
                f"it takes more than {MAX_STEPS:,} steps beyond those for the messages, or {MAX_SECONDS:.0f} seconds"
            )

    def write(self, characters: int) -> None:
        self._characters -= characters
        if self._characters < 0:
            raise TemplateError(f"it writes more than {MAX_CHARACTERS:,} characters beyond those of the messages")


_budget: ContextVar[Budget] = ContextVar("flash_moe_template_budget")


def render(template: Template, variables: Mapping[str, Any]) -> str:
    """Renders a template that :func:`environment` compiled.

    Raises:
        Exception: any error of the template, and TemplateError if it exceeds its limits.
    """
    token = _budget.set(Budget(_characters(variables)))
    try:
        return template.render(variables)
    finally:
        _budget.reset(token)


@functools.cache
def environment() -> ImmutableSandboxedEnvironment:
    """Returns the sandbox in which every template is compiled."""
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
    sandbox.filters["tojson"] = _tojson
    sandbox.filters = {name: _bounded(name, function) for name, function in sandbox.filters.items()}
    sandbox.globals.update(raise_exception=_raise, strftime_now=_strftime_now, namespace=_PublicNamespace, range=_range)
    del sandbox.globals["lipsum"]
    return sandbox


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(optimized=False, finalize=_finalize, **options)

    def _generate(self, source: nodes.Template, *arguments: Any, **options: Any) -> str:
        return super()._generate(_Counted().visit(source), *arguments, **options)

    def call(__self, __context: Context, __obj: Any, *arguments: Any, **options: Any) -> Any:
        _budget.get().step()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            _check_call(getattr(__obj, "__name__", ""), owner, *arguments, *options.values())
        return super().call(__context, __obj, *arguments, **options)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if (wrapped := super().wrap_str_format(value)) is None:
            return None

        @functools.wraps(wrapped)
        def checked(*arguments: Any, **options: Any) -> str:
            values = [*arguments, *options.values()]
            for mapping in [value for value in values if isinstance(value, dict)]:  # the method format_map
                values += mapping.values()
            _check_call("format", value.__self__, *values)
            return wrapped(*arguments, **options)

        return checked

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _budget.get().step()
        if operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
            _check_size(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            _check_call("%", left, right)
        elif operator in ("*", "**"):
            for value, count in ((left, right), (right, left)):
                if isinstance(count, int) and isinstance(value, (str, list, tuple)):
                    _check_size(len(value) * count)
            if isinstance(left, int) and isinstance(right, int):
                bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
                _check_size(100 * bits)  # the cost of operations on integers grows faster than their length
        return super().call_binop(context, operator, left, right)

    # Functions that _Counted inserts into templates, under names that no template can use.

    def counted_step(self) -> bool:
        return True  # call() has counted this step

    def counted_write(self, characters: int) -> str:
        _budget.get().write(characters)
        return ""

    def counted_join(self, *values: Any) -> str:
        texts = [_text(value) for value in values]
        _check_size(sum(map(len, texts)))
        return "".join(texts)


class _Counted(NodeTransformer):
    """Compiles a template so that it counts its loop iterations and its output."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_own("counted_step"), lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(_own("counted_step"), node.test, lineno=node.lineno)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        if written := sum(len(child.data) for child in node.nodes if isinstance(child, nodes.TemplateData)):
            node.nodes.insert(0, _own("counted_write", nodes.Const(written)))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _own("counted_join", *node.nodes)


def _own(name: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)


@pass_context  # counts constants when they are written, not when the template is compiled
def _finalize(context: Context, value: Any) -> str:
    text = _text(value)
    _budget.get().write(len(text))
    return text


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple, dict)):
        _characters(value)
    return str(value)


def _characters(value: Any) -> int:
    """Returns the number of characters of a value; each item counts as one. Raises TemplateError for too many items."""
    count, rest, most = 0, [value], MAX_ITEMS
    while rest:
        item = rest.pop()
        count += len(item) if isinstance(item, str) else 1
        if isinstance(item, Mapping):
            rest += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple)):
            rest += item
        if not isinstance(item, str):
            most -= 1
        if most < 0:
            raise TemplateError(f"a value holds more than {MAX_ITEMS:,} items")
    return count


def _check_size(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise TemplateError(f"it makes a value of size {size:,}, expected at most {MAX_CHARACTERS:,}")


def _check_call(name: str, text: str, *arguments: Any) -> None:
    """Rejects text methods and filters whose result could be much longer than their input."""
    numbers = [value for value in arguments if isinstance(value, int)]
    if name in ("format", "format_map", "%"):
        if (match := _WIDTH.search(text)) or any(abs(number) > MAX_CHARACTERS for number in numbers):
            raise TemplateError(f"it formats with the width {match[0] if match else max(numbers)}, expected less")
    elif name in _PADDING:
        _check_size((1 + text.count("\n")) * max(numbers, default=0))
    elif name == "replace" and len(arguments) > 1 and all(isinstance(value, str) for value in arguments[:2]):
        old, new = arguments[:2]
        _check_size(len(text) + text.count(old) * len(new))
    elif name == "join" and arguments and isinstance(arguments[0], (list, tuple)):
        _check_size(len(text) * len(arguments[0]))


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a filter that counts as a step and limits the size of its result."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def bounded(*arguments: Any, **options: Any) -> Any:
        _budget.get().step()
        value, others = arguments[skipped], (*arguments[skipped + 1 :], *options.values())
        if name in ("tojson", "string", "pprint", "upper", "lower", "trim", "replace", "escape", "e", "urlize", "safe"):
            _text(value) if isinstance(value, (list, tuple, dict)) else None
        if name == "join":
            _check_call("join", str(others[0]) if others else "", value)
        elif name in _PADDING or name in ("format", "replace"):
            _check_call(name, value if isinstance(value, str) else "", *others)
        return function(*arguments, **options)

    return bounded


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's text for training. Here, the block only renders its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _PublicNamespace(Namespace):
    """A namespace that rejects attributes with a leading underscore, which could imitate Python internals."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _require_public(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)


def _require_public(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a namespace attribute may not start with an underscore, found {name!r}")


def _range(*arguments: int) -> range:
    numbers = range(*arguments)
    _budget.get().step(len(numbers))  # filters may iterate over it
    return numbers


def _raise(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which transformers does not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
