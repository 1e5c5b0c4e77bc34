"""The public face: a drop-in for `mx.fast.metal_kernel`."""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import mlx.core as mx

from . import arrays
from .build import build
from .clang import MODES
from .errors import MetalError
from .launch import ORDERS, Argument, launch
from .source import Source, split, trace

_mlx_metal_kernel = mx.fast.metal_kernel  # tests may put the emulator in its place


@dataclass(frozen=True)
class Options:
    """How kernels run.

    Attributes:
        mode: "fast"; "nocontract", which fuses no multiply-add that is not written as one; or "check", which finds
            races, accesses out of bounds and reads of memory that nothing wrote.
        order: Which threads and threadgroups go first: "forward", "reverse" or "random".
        seed: Of the random order.
        timeout: CPU seconds before a kernel counts as hanging.
    """

    mode: str = "fast"
    order: str = "forward"
    seed: int = 1
    timeout: int = 60

    def __post_init__(self) -> None:
        for name, known in (("mode", MODES), ("order", ORDERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, found {getattr(self, name)!r}")


_NAMES = {field.name for field in fields(Options)}
_defaults: contextvars.ContextVar[Options] = contextvars.ContextVar("defaults", default=Options())  # noqa: B039 frozen


@contextlib.contextmanager
def options(**changes: Any) -> Iterator[None]:
    """Change the options of every kernel that runs inside, also of kernels that were made outside.

    Args:
        **changes: Fields of `Options`.
    """
    token = _defaults.set(replace(_defaults.get(), **changes))
    try:
        yield
    finally:
        _defaults.reset(token)


class MetalKernel:
    """What `metal_kernel` returns: callable like the kernels of MLX."""

    def __init__(self, name: str, changes: dict[str, Any], **definition: Any):
        unknown = set(changes) - _NAMES
        if unknown:
            raise TypeError(f"metal_kernel takes {', '.join(sorted(_NAMES))} besides MLX's arguments, found {unknown}")
        self.name = name
        self._changes = changes
        self._definition = definition
        self._kernel = _mlx_metal_kernel(name=name, **definition)

    def source(self, inputs: Sequence[mx.array], **call: Any) -> Source:
        """What MLX generates for this call."""

        def run(*traced: mx.array) -> list[mx.array]:
            return self._kernel(inputs=list(traced), verbose=True, stream=mx.gpu, **call)

        text = trace(run, list(inputs))
        return split(text, self.name, self._definition["header"], self._definition["source"])

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
        **changes: Any,
    ) -> list[mx.array]:
        """Run the kernel now, on the CPU; the arguments are those of MLX, and `changes` are fields of `Options`.

        Outputs hold NaN (0xFF bytes) until the kernel writes them, unless `init_value` is given.

        Raises:
            MetalError: When the kernel does not compile, breaks a rule of Metal or misbehaves.
        """
        how = replace(_defaults.get(), **{**self._changes, **changes})
        inputs = [value if isinstance(value, mx.array) else mx.array(value) for value in inputs]
        mx.eval(inputs)
        shapes = [tuple(shape) for shape in output_shapes]
        source = self.source(
            inputs,
            template=list(template or []),
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=shapes,
            output_dtypes=list(output_dtypes),
        )
        if verbose:
            print(source.header + source.signature + source.body + source.tail)
        try:
            library = build(source, how.mode)
            data = launch(
                library,
                self._arguments(source, inputs, shapes, output_dtypes, init_value),
                tuple(grid),
                tuple(threadgroup),
                check=how.mode == "check",
                order=how.order,
                seed=how.seed,
                timeout=how.timeout,
                files=source.files,
            )
        except MetalError as error:
            raise MetalError(f"kernel {self.name!r} ({how.mode}, {how.order} order):\n{error}") from None
        names = self._definition["output_names"]
        return [arrays.to_array(data[n], s, d) for n, s, d in zip(names, shapes, output_dtypes, strict=True)]

    def _arguments(
        self,
        source: Source,
        inputs: list[mx.array],
        shapes: list[tuple[int, ...]],
        dtypes: Sequence[mx.Dtype],
        init_value: float | None,
    ) -> list[Argument]:
        """The kernel's buffers in the order of their indices."""
        given: dict[str, Argument] = {}
        for name, array in zip(self._definition["input_names"], inputs, strict=True):
            buffers = arrays.input_buffers(name, array, self._definition["ensure_row_contiguous"])
            given.update({key: Argument(key, data) for key, data in buffers.items()})
        for name, shape, dtype in zip(self._definition["output_names"], shapes, dtypes, strict=True):
            data = arrays.output_buffer(shape, dtype, init_value)
            given[name] = Argument(name, data, writable=True, initialised=init_value is not None)
        buffers = [p for p in source.parameters if p.index is not None]
        return [given[p.name] for p in sorted(buffers, key=lambda p: p.index)]


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    **changes: Any,
) -> MetalKernel:
    """As `mx.fast.metal_kernel`, for the emulator.

    Args:
        name: The kernel's name; messages call its source `name.metal`.
        input_names: Of the inputs, as in the source.
        output_names: Of the outputs.
        source: The body of the kernel.
        header: Text in front of the kernel: includes and helper functions.
        ensure_row_contiguous: Whether inputs are copied into row-contiguous ones.
        atomic_outputs: Whether outputs are declared atomic.
        **changes: Fields of `Options`, for every call of this kernel.
    """
    return MetalKernel(
        name,
        changes,
        input_names=list(input_names),
        output_names=list(output_names),
        source=source,
        header=header,
        ensure_row_contiguous=ensure_row_contiguous,
        atomic_outputs=atomic_outputs,
    )
