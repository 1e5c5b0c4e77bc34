"""The exact text that MLX would hand to Apple's compiler, taken from MLX itself.

Without a Metal device MLX cannot run a `metal_kernel`, but it can trace one for export, and when asked to be verbose
it prints the source that it generates.
"""

import functools
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from .errors import MetalError
from .rewrite import rewrite, struct_names, vector_aliases

_redirect = threading.Lock()  # standard output belongs to the whole process


@dataclass(frozen=True)
class Parameter:
    """One parameter of the generated function, `const device float* x [[buffer(0)]]` for example."""

    type: str  # without the * or &
    pointer: str  # "*", "&" or ""
    name: str
    attribute: str
    index: int | None  # of a buffer


@dataclass(frozen=True)
class Source:
    """A generated kernel in its parts; joined they are the text that MLX generated."""

    name: str
    header: str
    signature: str
    body: str
    tail: str
    parameters: tuple[Parameter, ...]
    function: str  # with its template arguments

    @property
    def files(self) -> dict[str, str]:
        """The author's texts, by the names that error messages give them."""
        return {f"{self.name}.header": self.header, f"{self.name}.metal": self.body}


def trace(call: Callable[..., list[mx.array]], inputs: list[mx.array]) -> str:
    """What MLX prints while it traces `call(*inputs)`, which must make one verbose `metal_kernel` call."""
    with _redirect, tempfile.TemporaryFile() as printed, tempfile.TemporaryDirectory() as folder:
        sys.stdout.flush()
        stdout = os.dup(1)
        os.dup2(printed.fileno(), 1)
        try:
            mx.export_function(str(Path(folder, "kernel.mlxfn")), call, *inputs)
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
        printed.seek(0)
        text = printed.read().decode()
    found = re.search(r"Generated source code for `[^`]*`:\n```\n(.*?)\n```\n", text, re.S)
    if not found:
        raise MetalError(f"MLX {mx.__version__} printed no generated source; expected >= 0.32.1, found output {text!r}")
    return found[1]


def split(text: str, name: str, header: str, body: str) -> Source:
    """Divide the generated `text` of the kernel `name` into its parts."""
    start = len(header)
    opening = re.compile(r"[^{]*?\[\[kernel\]\]\s*void\s+(\w+)\s*\(\n(.*?)\)\s*\{\n", re.S).match(text, start)
    if not text.startswith(header) or not opening or not text.startswith(body, opening.end()):
        raise MetalError(f"kernel {name!r}: MLX {mx.__version__} generates a source of a form not known here:\n{text}")
    tail = text[opening.end() + len(body) :]
    instance = re.search(r"\[\[kernel\]\] decltype\((.*)\) ", tail)
    return Source(
        name=name,
        header=header,
        signature=text[start : opening.end()],
        body=body,
        tail=tail,
        parameters=tuple(_parameter(p) for p in opening[2].split(",\n")),
        function=instance[1] if instance else opening[1],
    )


def _parameter(text: str) -> Parameter:
    found = re.fullmatch(r"\s*(.*?)([*&]?)\s*(\w+)\s*\[\[(\w+)(?:\((\d+)\))?\]\]\s*", text, re.S)
    if not found:
        raise MetalError(f"cannot read the generated kernel parameter {text!r}")
    kind, pointer, name, attribute, index = found.groups()
    return Parameter(kind, pointer, name, attribute, int(index) if index else None)


@functools.cache
def prelude() -> str:
    """What comes before every kernel: the shim, and the headers from MLX's own wheel, rewritten for clang."""
    folder = Path(mx.__file__).parent / "include" / "mlx" / "backend" / "metal" / "kernels"
    parts = [(folder / name).read_text() for name in ("bf16.h", "bf16_math.h")]
    parts.append("#include <emu/complex.h>")
    parts += [(folder / name).read_text() for name in ("defines.h", "utils.h")]
    preamble = "\n".join(rewrite(re.sub(r'#include "[^"]*"|#pragma once', "", part)) for part in parts)
    return f'#include <metal_stdlib>\n#line 1 "mlx_preamble"\n{preamble}\n'


def translation_unit(source: Source) -> str:
    """What follows the prelude: the kernel, and a plain function that calls it."""
    arguments = []
    for p in source.parameters:
        if p.attribute != "buffer":
            arguments.append(f"metal::emu_attribute<{p.type}>(thread_->{p.attribute})")
        else:
            pointer = f"({p.type}*)(uintptr_t)buffers[{p.index}]"
            arguments.append(f"*{pointer}" if p.pointer == "&" else pointer)
    author = source.header + source.body
    names = (vector_aliases(author), struct_names(author))
    sections = {
        f"{source.name}.header": rewrite(source.header, *names),
        f"{source.name}.signature": rewrite(source.signature),
        f"{source.name}.metal": rewrite(source.body, *names),
        f"{source.name}.tail": rewrite(source.tail),
        "entry": 'extern "C" void emu_kernel(void* const* buffers, const emu_thread* thread_) {\n'
        f"  {source.function}({', '.join(arguments)});\n}}\n",
    }
    return "\n".join(f'#line 1 "{name}"\n{text}' for name, text in sections.items())
