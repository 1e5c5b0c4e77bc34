"""One way to break a kernel, and the check that it is caught."""

import re
from dataclasses import dataclass

import emulator
import mlx.core as mx
import pytest
from matvec import HEADER, Case, run

# texts of the intact kernels in matvec.py
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
STORE = "if (lane == 0) out[row0 + r] = static_cast<T>(total);"
STAGE = "staged[i] = float(x[i]);"
LOAD_STAGED = "float4 v = x4[j];"
SUM = "const float total = simd_sum(sums[r]);"
SCALE = "scales[row * (IN / 64) + block / 2]"
WEIGHT = "w4[row * (IN / 32) + block]"
BEGIN = "constexpr uint ROWS = 4;"  # in front of which a declaration can go
WHOLE = "float q = float((packed >> (4 * i)) & 0xF);"


@dataclass(frozen=True)
class Broken:
    """One way to break a kernel.

    Attributes:
        id: Of the test.
        source: The intact kernel.
        old: The text that is replaced, in `source` or else in `HEADER`.
        new: The text that replaces it.
        cause: A regular expression for the message; None when only the numbers show the fault.
        line: A text on the line that the message must name; by default the changed line; "" for none.
    """

    id: str
    source: str
    old: str
    new: str
    cause: str | None
    line: str | None = None

    def texts(self) -> dict[str, str]:
        """The broken texts by the names that messages give them."""
        assert (self.old in self.source) != (self.old in HEADER)
        files = {"matvec.metal": self.source, "matvec.header": HEADER}
        return {name: text.replace(self.old, self.new, 1) for name, text in files.items()}

    def place(self) -> str:
        """`file:line` of the fault."""
        for name, text in self.texts().items():
            intact = HEADER if name.endswith("header") else self.source
            sought, searched, skip = (
                (self.line, text, 0) if self.line else (self.old, intact, self.new.startswith("\n"))
            )
            if sought in searched:
                return f"{name}:{searched[: searched.index(sought)].count(chr(10)) + 1 + skip}"
        raise AssertionError(f"{self.line or self.old!r} is in no text")

    def check(self) -> None:
        """Fail unless the fault is caught, with its cause and its line."""
        texts = self.texts()
        case = Case.random(64, 2048, mx.bfloat16)
        try:
            out = run(case, texts["matvec.metal"], texts["matvec.header"], mode="check", order="random")
        except emulator.MetalError as error:
            message = str(error)
        else:
            assert self.cause is None, "no error"
            assert case.error(out) > 1
            return
        assert self.cause, message
        assert re.search(self.cause, message), message
        if self.line != "":
            assert self.place() in message


def cases(*groups: list[Broken]) -> pytest.MarkDecorator:
    """Parametrises a test with the kernels of all groups."""
    every = [broken for group in groups for broken in group]
    return pytest.mark.parametrize("broken", every, ids=[broken.id.replace(" ", "_") for broken in every])
