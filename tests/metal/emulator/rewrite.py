"""The few places where Metal is not C++ with attributes. Every rewrite keeps the line numbers."""

import re
from collections.abc import Iterable

SCALARS = "bool|char|uchar|short|ushort|int|uint|long|ulong|half|bfloat|float"
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_DIMENSIONS = r"\s*(?:\[[^\];]*\]\s*)*"
_VARIABLE = re.compile(
    r"((?<=[;{}])\s*|^[ \t]*#[^\n]*\n\s*)((?:alignas\(\w+\)\s*)?)"  # after a statement or a directive
    rf"threadgroup(\s+[^;*&(){{}}=]*?\w{_DIMENSIONS};)",
    re.M,
)
_OBJECT = r"(?:alignas\(\w+\)\s*)?EMU_THREADGROUP_VARIABLE threadgroup\s+"
_STRUCT = re.compile(r"\bstruct\s+(?:alignas\(\w+\)\s*)?(\w+)\s*[{:]")
_CONSTRUCTOR = re.compile(rf"(?<!operator )\b(?:metal::)?(vec<[^<>;(){{}}]+>|(?:{SCALARS})[234])\s*\(")
_ALIAS = re.compile(rf"\busing\s+(\w+)\s*=\s*(?:metal::)?(?:vec<|(?:{SCALARS})[234]\b)")
_TYPEDEF = re.compile(rf"\btypedef\s+(?:metal::)?(?:vec<[^<>;]+>|(?:{SCALARS})[234])\s+(\w+)\s*;")
_HOST_NAME = re.compile(r"template\s*\[\[\s*host_name\([^)]*\)\s*\]\]\s*\[\[\s*kernel\s*\]\]")
_ARRAY_PARAMETER = re.compile(
    r"\b((?:constant|device|threadgroup|thread)\s[\w\s:]*?)\b(\w+)\s*\[\s*\w*\s*\](?=\s*[,)])"
)
_METHOD = re.compile(r"\)(\s*const)?\s*\bthread\b(?=\s*[:{;])")
_FUNCTION_CONSTANT = re.compile(
    r"constant\s+(?:constexpr\s+)?(\w+)\s+(\w+)\s*\[\[\s*function_constant\(\s*\w+\s*\)\s*\]\]\s*;"
)


def strip_comments(text: str) -> str:
    """`text` with every comment replaced by spaces."""
    return _COMMENT.sub(lambda comment: re.sub(r"[^\n]", " ", comment[0]), text)


def vector_aliases(text: str) -> set[str]:
    """The names that `text` gives to vector types."""
    text = strip_comments(text)
    return {*_ALIAS.findall(text), *_TYPEDEF.findall(text)}


def struct_names(text: str) -> set[str]:
    """The names of the structs that `text` defines."""
    return set(_STRUCT.findall(strip_comments(text)))


def rewrite(text: str, aliases: Iterable[str] = (), structs: Iterable[str] = ()) -> str:
    """Metal source as C++ that clang takes together with the shim in `include/`.

    Args:
        text: A part of the source.
        aliases: Names of vector types besides Metal's own, which the whole source defines.
        structs: Names of structs, which the whole source defines.
    """
    text = strip_comments(text)
    # the look-behind needs something in front of a declaration that opens the text
    text = _VARIABLE.sub(r"\1\2EMU_THREADGROUP_VARIABLE threadgroup\3", ";\n" + text)[2:]
    classes = "|".join(["atomic_[a-z]+", r"atomic\s*<[^;<>]*>", r"packed_\w+", *sorted(structs)])
    text = re.sub(
        rf"{_OBJECT}(?:metal::)?({classes})\s+(\w+)({_DIMENSIONS});",
        r"EMU_THREADGROUP_OBJECT(\1, \2, \3);",
        text,
    )
    text = _HOST_NAME.sub("template", text)
    text = re.sub(r"\[\[\s*threadgroup\(\w+\)\s*\]\]", "", text)
    # C++ casts between vectors reinterpret bits, Metal's constructors convert values
    text = _CONSTRUCTOR.sub(r"metal::emu_make<\1>(", text)
    for alias in sorted(aliases):
        text = re.sub(rf"(?<!operator )\b{alias}\s*\(", f"metal::emu_make<{alias}>(", text)
    text = _ARRAY_PARAMETER.sub(r"\1* \2", text)
    text = _METHOD.sub(r")\1", text)  # only methods on private objects exist here
    # MLX gives custom kernels no function constants; those in its own headers become zero
    return _FUNCTION_CONSTANT.sub(r"static constexpr constant \1 \2 = \1(0);", text)
