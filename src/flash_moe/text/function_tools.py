"""Python functions as tools: makes their schemas and calls them with a model's arguments, through pydantic."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, get_type_hints

from ..checks import shown
from ..errors import ArgumentError

Tool: TypeAlias = Mapping[str, Any] | Callable[..., Any]
"""A JSON schema in OpenAI's form, or a function with annotations and a docstring."""


class FunctionTool:
    """A function that a model may call.

    The schema has the parameters of the function, with the types of its annotations. A parameter without annotation
    accepts any JSON value. Descriptions come from the docstring (Google, NumPy or Sphinx style) or from
    ``Annotated[int, Field(...)]``.

    Args:
        function: any callable that takes arguments by name, except a coroutine function.

    Attributes:
        schema: the JSON schema in OpenAI's form.

    Raises:
        ArgumentError: the function takes ``*args``, or pydantic does not know a type.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        if inspect.iscoroutinefunction(function):
            raise ArgumentError(f"{self.name} is a coroutine function, expected a plain one; wrap it in asyncio.run")
        self._model, self.schema = self._described()

    def call(self, arguments: Mapping[str, Any]) -> str:
        """Calls the function and returns its result as text: a string unchanged, everything else as JSON.

        Raises:
            Exception: the arguments do not fit the schema, the result cannot be written as JSON, or the function raised
                it.
        """
        from pydantic import TypeAdapter

        found = self._model.model_validate(dict(arguments))
        names = {field.alias or name: name for name, field in self._model.model_fields.items()}
        result = self._function(**{key: getattr(found, name) for key, name in names.items()})
        return result if isinstance(result, str) else TypeAdapter(Any).dump_json(result).decode()

    def _described(self) -> tuple[Any, dict[str, Any]]:
        from docstring_parser import parse
        from pydantic import ConfigDict, Field, create_model
        from pydantic.errors import PydanticUserError
        from pydantic.json_schema import GenerateJsonSchema

        class Untitled(GenerateJsonSchema):
            """Generates schemas without titles, which only repeat the names."""

            def field_title_should_be_set(self, schema: Any) -> bool:
                return False

        docs = parse(inspect.getdoc(self._function) or "")
        described = {parameter.arg_name: parameter.description for parameter in docs.params}
        fields: dict[str, Any] = {}
        try:
            types = get_type_hints(_annotated(self._function), include_extras=True)
            for number, (key, parameter) in enumerate(inspect.signature(self._function).parameters.items()):
                if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                    raise ArgumentError(f"{self.name} takes {parameter}, expected parameters that can be given by name")
                default = ... if parameter.default is parameter.empty else parameter.default
                # Under another name, because pydantic reserves some names ("schema", "_x", "model_config").
                extra: dict[str, Any] = {"description": described[key]} if described.get(key) else {}
                field = Field(default, alias=key, **extra)
                fields[f"p{number}"] = (types.get(key, Any), field)
            model = create_model(
                self.name, __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=False), **fields
            )
            parameters = model.model_json_schema(schema_generator=Untitled)
        except (PydanticUserError, NameError, TypeError, ValueError) as error:
            if isinstance(error, ArgumentError):
                raise
            raise ArgumentError(
                f"the function {self.name} cannot be made a tool ({str(error).splitlines()[0]}); annotate its parameters "
                "with types that pydantic knows, or pass a JSON schema"
            ) from error
        parameters.pop("title", None)
        parameters.setdefault("properties", {})
        function = {"name": self.name, "parameters": parameters}
        text = "\n\n".join(filter(None, (docs.short_description, docs.long_description)))
        if text:
            function = {"name": self.name, "description": text, "parameters": parameters}
        return model, {"type": "function", "function": function}


def tool_schemas(tools: Iterable[Tool] | None) -> list[Mapping[str, Any]] | None:
    """Returns the JSON schemas of tools; None for None.

    Raises:
        ArgumentError: a tool is neither a schema nor a function that can be described, or two have the same name.
    """
    if tools is None:
        return None
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Iterable):
        raise ArgumentError(f"tools is {shown(tools)}, expected a list of functions or JSON schemas")
    schemas = [tool if isinstance(tool, Mapping) else function_tool(tool).schema for tool in tools]
    names = [function.get("name") for tool in schemas if isinstance(function := tool.get("function", tool), Mapping)]
    if twice := [name for name in names if isinstance(name, str) and names.count(name) > 1]:
        raise ArgumentError(f"two tools are called {twice[0]!r:.80}, expected different names; rename one")
    return schemas


def function_tool(function: Any) -> FunctionTool:
    """Returns a function as a tool. Raises ArgumentError for anything else."""
    if not callable(function) or isinstance(function, type):
        raise ArgumentError(f"a tool is {shown(function)}, expected a function or a JSON schema")
    return FunctionTool(function)


def failure(error: BaseException | str) -> str:
    """Returns the result of a failed call, as it is sent to the model."""
    message = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return json.dumps({"error": message[:2000]}, ensure_ascii=False)


def _annotated(function: Any) -> Any:
    """Returns the object with the annotations: the function, the function in a partial, or ``__call__``."""
    if hasattr(function, "func"):
        return function.func
    return function if hasattr(function, "__annotations__") or inspect.ismethod(function) else type(function).__call__
