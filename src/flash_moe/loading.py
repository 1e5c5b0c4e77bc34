"""The steps of `Model.load`: checks arguments, opens checkpoints and tests kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx

from .checks import integer, resolve_experts_per_token
from .dtypes import NAMES
from .errors import ArgumentError, MemoryLimitError
from .experts.banks import can_lie_by_part
from .experts.choosing import Copying, Reading, Work
from .experts.opening import ExpertIO, held_bytes, open_store
from .experts.store import ExpertStore
from .limits import group_limit, machine_memory, resident_bytes
from .machines.joining import Member
from .machines.sums import Sums
from .models import ModelFiles, open_model
from .models.adapted.adapted_files import AdaptedFiles
from .nn.expert_work import ExpertWork
from .nn.network import Dimensions, Network
from .nn.streaming_options import PLAIN, StreamingOptions
from .nn.wired import keep_wired
from .ops.dispatch import kernels as allowed_kernels
from .ops.dispatch import kernels_wanted, on_gpu, use_kernel
from .ops.kernel import back_end
from .progress import Progress, ProgressOption, following
from .proofs.prover import prove
from .record import RecordLayout
from .share import WHOLE

_WORK = 64 << 20  # bytes: activations and caches of a short prompt
_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


@dataclass(frozen=True)
class Opened:
    """The open parts of a model.

    Attributes:
        experts_per_token: the K that the model runs with.
    """

    folder: Path
    config: Dimensions
    network: Network
    store: ExpertStore
    experts_per_token: int


def resolve_dtype(name: str | None, checkpoint: ModelFiles | AdaptedFiles) -> mx.Dtype:
    """Returns the dtype of activations, see :meth:`Model.load`. Raises ArgumentError for an unknown name."""
    return given_dtype(name) or _named(checkpoint.stored_dtype)


def given_dtype(name: str | None) -> mx.Dtype | None:
    """Returns the dtype of activations; None on a GPU without a name, where the checkpoint decides."""
    if name is None:
        return mx.float32 if mx.default_device() == mx.cpu else None
    return _named(name)


def open_adapted(
    folder: Path,
    experts_per_token: int | None,
    expert_io: ExpertIO,
    expert_cache: int,
    dtype: str | None,
    progress: ProgressOption,
    member: Member | None,
    **refused: Any,
) -> Opened:
    """Opens a model that runs on mlx-lm's network. The arguments are those of :meth:`Model.load`.

    Args:
        member: the place of this process in a group of machines.
        refused: options that mlx-lm's network does not have.

    Raises:
        ArgumentError: one of the refused options was given, or an argument is out of range.
    """
    for name, value in refused.items():
        if value:
            raise ArgumentError(
                f"{name} is {value}, but this model runs on mlx-lm's network, which has no such option; leave it out"
            )
    compute = given_dtype(dtype)
    with following(progress) as told:

        def read(done: int, total: int) -> None:
            if told is not None:
                told(Progress("experts", done, total, "bytes"))

        files = AdaptedFiles.open(folder, experts_per_token, compute)
        k, share, sums = files.experts_per_token, WHOLE, None
        if member is not None:
            sums = member.sums(files.records(None).share, files.sum_widths)
            share = sums.share
            member.agree(share, _facts(files.identity(), k, dtype or "its own", "mlx-lm"))
        check_memory(files.resident_bytes, held_bytes(files.records(share), expert_io, k, expert_cache))
        adapted = files.load(expert_io, expert_cache, read, share)
        network: Any = adapted
        if member is not None and sums is not None:
            adapted.join(sums)
            try:
                network = member.enter(adapted, sums, adapted.store)
            except BaseException:
                adapted.store.close()
                raise
        return Opened(folder, files.dimensions, network, adapted.store, k)


def open_own(
    folder: Path,
    experts_per_token: int | None,
    expert_io: ExpertIO,
    expert_cache: int,
    dtype: str | None,
    progress: ProgressOption,
    member: Member | None,
    streaming: StreamingOptions,
    kernels: bool | None,
    threads: int | None,
) -> Opened:
    """Opens a model that runs on this library's own network. The arguments are those of :func:`open_adapted`."""
    checkpoint = open_model(folder)
    known = checkpoint.dimensions
    k = resolve_experts_per_token(experts_per_token, known.num_experts_per_tok)
    threads = None if threads is None else integer("threads", threads, 1)
    compute = resolve_dtype(dtype, checkpoint)
    table, sums = checkpoint.records(WHOLE if member is None else None), None
    if member is not None:
        sums = member.sums(table.share, checkpoint.sum_widths)
        table = table.of_share(sums.share)
        cpu = checkpoint.uses_cpu_kernels(table.layouts, k, compute, kernels)
        arithmetic = "CPU kernels" if cpu else str(mx.default_device().type)
        member.agree(sums.share, _facts(checkpoint.identity(table.layouts), k, str(compute), arithmetic))
    with following(progress) as told:

        def report(stage: str, unit: str, total: int) -> Callable[[int], None] | None:
            return None if told is None else lambda done: told(Progress(stage, done, total, unit))

        proofs = None if told is None else lambda done, total: told(Progress("kernels", done, total, "kernels"))
        by_part, work = prove_kernels(checkpoint, table.layouts, k, compute, streaming, proofs, kernels, sums)
        held = held_bytes(table, expert_io, k, expert_cache)
        check_memory(sum(info.nbytes for info in checkpoint.resident.values()), held)
        read = report("experts", "bytes", table.nbytes)
        store = open_store(table, expert_io, k, expert_cache, read, by_part=by_part, work=work)
        try:
            layers = report("layers", "layers", known.num_hidden_layers)
            if not (store.holds_everything or store.keeps_experts):  # else MLX would wire the bank instead
                weights = sum(checkpoint.held_bytes(compute.size).values())
                joining = 2 * weights // known.num_hidden_layers  # a layer's matrices, before and after
                keep_wired(store, weights + joining + mx.get_active_memory())
            network: Any = checkpoint.load_network(store, k, compute, layers, kernels, streaming, threads, sums)
            if member is not None and sums is not None:
                network = member.enter(network, sums, store)
        except BaseException:
            store.close()
            raise
    return Opened(folder, known, network, store, k)


def _facts(identity: str, experts_per_token: int, dtype: str, arithmetic: str) -> dict[str, Any]:
    """Returns the settings that must be equal on all machines of a group."""
    return {
        "model": identity,
        "experts_per_token": experts_per_token,
        "dtype": dtype.rpartition(".")[2],
        "arithmetic": arithmetic.rpartition(".")[2],
        "flash_moe": import_module(__package__).__version__,
        "mlx": mx.__version__,  # type: ignore[attr-defined]
    }


def _named(name: str) -> mx.Dtype:
    if name not in _DTYPES:
        raise ArgumentError(f"dtype is {name!r}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def prove_kernels(
    checkpoint: ModelFiles,
    layouts: Mapping[int, RecordLayout],
    experts_per_token: int,
    dtype: mx.Dtype,
    streaming: StreamingOptions = PLAIN,
    progress: Callable[[int, int], None] | None = None,
    kernels: bool | None = None,
    sums: Sums | None = None,
) -> tuple[bool, Work]:
    """Tests all GPU kernels that a network could use, unless the user has switched kernels on or off.

    Args:
        layouts: the record layouts, by layer.
        progress: function that is called with the number of kernels tested so far and the total number.
        kernels: the user's choice; see :func:`~flash_moe.ops.dispatch.kernels`.
        sums: as the network will get it.

    Returns:
        Whether banks store their parts separately (true on a GPU if the experts of a token do not run as kernels), and
            the operations of a token on its experts.

    Raises:
        CheckpointError: a weight is missing or malformed, or does not match the other weights.
    """
    with allowed_kernels(kernels):
        if not on_gpu():
            on_cpu = checkpoint.uses_cpu_kernels(layouts, experts_per_token, dtype, kernels)
            return False, Reading() if on_cpu else Copying()
        cases = checkpoint.kernel_cases(layouts, experts_per_token, dtype, streaming, sums)
        if kernels_wanted() is None:
            prove(cases, progress)
        proven = any(op == "experts" and use_kernel(op, *sizes) for op, *sizes in cases)
    by_part = not proven and can_lie_by_part(list(layouts.values()), NAMES[dtype])
    return by_part, ExpertWork(layouts, dtype, kernels=proven)


def check_memory(weights: int, experts: int) -> None:
    """Checks that this process may use the memory that a model needs at least.

    With CUDA, the memory of the machine is not a limit, because weights may be in the memory of the GPU.

    Args:
        weights: bytes of the resident weights; experts: bytes of the experts that are held in memory.

    Raises:
        MemoryLimitError: the machine has less memory, or the control group of this process (Linux) allows less, so the
            system would end the process.
    """
    need = resident_bytes() + weights + experts + _WORK
    limits = [(group_limit(), "the control group of this process allows")]
    if back_end() != "cuda":
        limits.append((machine_memory(), "this machine has"))
    for limit, whose in limits:
        if limit is not None and need > limit:
            raise MemoryLimitError(
                f"the model needs at least {need / 1e6:,.0f} MB ({weights / 1e6:,.0f} of resident weights, "
                f"{experts / 1e6:,.0f} of experts, the rest for the program), but {whose} {limit / 1e6:,.0f}; "
                "use a smaller expert_cache, fewer experts_per_token or another expert_io"
            )
