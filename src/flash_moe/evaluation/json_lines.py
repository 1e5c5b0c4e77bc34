"""Reads files with one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import ArgumentError


@dataclass(frozen=True)
class Line:
    """One object and its location. Look-ups check the form of values.

    Attributes:
        where: file and line, for error messages.
    """

    where: str
    values: dict[str, Any]

    def objects(self, key: str) -> list[dict[str, Any]] | None:
        """Returns a list of objects, or None if the key is missing or null.

        Raises:
            ArgumentError: the value has another type.
        """
        value = self.values.get(key)
        if value is None or (isinstance(value, list) and all(isinstance(entry, dict) for entry in value)):
            return value
        raise self.error(key, "a list of objects")

    def flag(self, key: str) -> bool | None:
        """Returns True, False, or None if the key is missing or null.

        Raises:
            ArgumentError: the value has another type.
        """
        value = self.values.get(key)
        if value is None or isinstance(value, bool):
            return value
        raise self.error(key, "true or false")

    def messages(self) -> list[dict[str, Any]]:
        """Returns the chat messages, at least one.

        Raises:
            ArgumentError: there are none.
        """
        if not (messages := self.objects("messages")):
            raise self.error("messages", 'a list such as [{"role": "user", "content": "Hi"}]')
        return messages

    def error(self, key: str, expected: str) -> ArgumentError:
        """Returns an error about the value of a key."""
        found = json.dumps(self.values[key]) if key in self.values else "missing"
        return ArgumentError(f"{self.where}: {key!r} is {found:.80}, expected {expected}; mend the line")


def read_lines(file: Path, limit: int | None = None) -> Iterator[Line]:
    """Yields the first ``limit`` objects of a file, and skips empty lines.

    Raises:
        ArgumentError: the file is not UTF-8 text, or a line is not a JSON object. OSError: the file cannot be read.
    """
    lines = ((i, line) for i, line in enumerate(read_text(file).split("\n"), start=1) if line.strip())
    for number, line in islice(lines, limit):
        where = f"{file}, line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ArgumentError(f"{where} is not valid JSON ({error}); expected one object a line") from error
        if not isinstance(values, dict):
            raise ArgumentError(f"{where} holds a JSON {type(values).__name__}, expected an object")
        yield Line(where, values)


def read_text(file: Path) -> str:
    """Returns the content of a UTF-8 file.

    Raises:
        ArgumentError: it is no UTF-8 text.
        OSError: it cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{file} is not UTF-8 text ({error}); convert it") from error
