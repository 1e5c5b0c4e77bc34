"""What clang accepts in C++ and Metal does not, as far as clang's syntax tree shows it.

The tree holds every instantiated template, so a rule that depends on a type is applied to the real types.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import clang
from .rewrite import strip_comments

_NODE = re.compile(r"(?P<indent>[|` -]*)(?P<kind>[A-Z]\w+) (?P<address>0x[0-9a-f]+) (?P<text>.*)")
_PLACE = re.compile(r"\bline:(?P<line>\d+):\d+|\bcol:\d+|(?P<file>[^\s<>,:']+):(?P<file_line>\d+):\d+")
_BFLOAT = r"'(?:[^']*:')?(?:bfloat16_t|bfloat|__bf16)(?: __attribute__\(\(ext_vector_type\(\d\)\)\))?'"
_TO_BFLOAT = re.compile(_BFLOAT + r" <(FloatingCast|IntegralToFloating)>")
_BFLOAT_TARGET = re.compile(_BFLOAT + r"(?::'__bf16')? lvalue '")
_VECTOR_BITCAST = re.compile(r"'[^'*]*\bext_vector_type[^'*]*'[^'*]*<BitCast>")
_VARIABLE = re.compile(r".*?\b(?P<name>\w+) '(?P<type>[^']*)'(?P<rest>.*)")
_SPACE = re.compile(r"__(global|local|constant)\b")
_CONSTANT_SPACE = re.compile(r"__(local|constant)\b")


@dataclass(frozen=True)
class _Node:
    depth: int  # 0: at file scope
    kind: str
    address: str
    text: str
    file: str  # "" in what MLX generated
    line: int


def _nodes(dump: str, files: dict[str, str]) -> Iterator[_Node]:
    file, line = "", 0
    for text in dump.splitlines():
        node = _NODE.match(text)
        if not node:
            continue
        mine = "", 0
        # a dump names the file and the line only where they change
        for place in _PLACE.finditer(node["text"].split(" '", 1)[0]):
            if place["file"]:
                file, line = place["file"], int(place["file_line"])
            elif place["line"]:
                line = int(place["line"])
            if file in files:
                mine = file, line
        yield _Node(len(node["indent"]) // 2 - 1, node["kind"], node["address"], node["text"], *mine)


def _cast(node: _Node) -> str | None:
    if node.kind == "ImplicitCastExpr" and "part_of_explicit_cast" not in node.text and _TO_BFLOAT.search(node.text):
        return "implicit conversion to bfloat; expected an explicit one, as in T(x) or static_cast<T>(x)"
    if (
        node.kind == "CompoundAssignOperator"
        and "ComputeResultTy='float'" in node.text
        and _BFLOAT_TARGET.search(node.text)
    ):
        return "compound assignment makes a bfloat of a float; expected x = T(float(x) + y)"
    if "<AddressSpaceConversion>" in node.text:
        return "cast between address spaces"
    if node.kind != "ImplicitCastExpr" and node.kind.endswith("CastExpr") and _VECTOR_BITCAST.search(node.text):
        return "this cast would reinterpret the bits of a vector; expected vec<T, N>(x), or as_type<T>(x) for the bits"
    return None


def _variable(node: _Node) -> str | None:
    found = _VARIABLE.fullmatch(node.text) if node.kind == "VarDecl" else None
    if (
        found
        and (node.depth == 0 or re.search(r"\bstatic\b", found["rest"]))
        and not _CONSTANT_SPACE.search(found["type"])
    ):
        return f"{found['name']!r} is at program scope or static; expected it in the constant address space"
    return None


def _pointer(node: _Node, line: str) -> str | None:
    found = _VARIABLE.fullmatch(node.text) if node.kind in ("VarDecl", "ParmVarDecl", "FieldDecl") else None
    if not found or "(" in found["type"] or not re.search(r"[*&]", found["type"]) or _SPACE.search(found["type"]):
        return None
    # `thread` is an empty macro, so the tree does not know it: look at the text in front of the name
    for use in re.finditer(rf"\b{found['name']}\b", line):
        before = re.split(r"[;{}(,]", re.sub(r"<[^<>;]*>", "", line[: use.start()]))[-1]
        if re.search(r"[*&]\s*(const\s*)?$", before) and not re.search(r"\b(thread|auto)\b", before):
            kind = found["type"]
            return f"{found['name']!r} of type {kind!r} has no address space; expected `thread` or another one"
    return None


def lint_ast(unit: Path, files: dict[str, str], flags: list[str]) -> list[str]:
    """Compile `unit` for its syntax tree and return its problems, as `file:line: message` lines.

    Args:
        unit: The translation unit.
        files: The author's texts, by the names that `#line` gives them in `unit`.
        flags: For clang, with the prelude.

    Raises:
        MetalError: When clang rejects the unit.
    """
    dump = clang.run([*flags, "-fsyntax-only", "-fno-color-diagnostics", "-Xclang", "-ast-dump", str(unit)])
    lines = {name: strip_comments(text).splitlines() for name, text in files.items()}
    problems: dict[tuple[str, int, str], None] = {}  # a template's problem appears once per instance
    functions: list[_Node] = []
    for node in _nodes(dump, files):
        while functions and functions[-1].depth >= node.depth:
            functions.pop()
        if node.kind == "FunctionDecl":
            functions.append(node)
        if not node.file:
            continue
        text = lines[node.file][node.line - 1] if node.line <= len(lines[node.file]) else ""
        messages = [_cast(node), _variable(node), _pointer(node, text)]
        if node.kind == "LambdaExpr":
            messages.append("a lambda, which Metal before version 4 does not have")
        called = re.search(r"\bFunction (0x[0-9a-f]+)", node.text) if node.kind == "DeclRefExpr" else None
        if called and called[1] in [function.address for function in functions]:
            messages.append("recursion, which Metal does not have")
        problems.update({(node.file, node.line, message): None for message in messages if message})
    return [f"{file}:{line}: {message}" for file, line, message in sorted(problems)]
