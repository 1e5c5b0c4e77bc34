"""Plans a model on a machine: whether it fits, its bytes per token, and its speed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..bench.system import available_memory, machine_name
from ..checkpoint.records import RecordTable
from ..checkpoint.remote import Download, local_or_headers
from ..errors import ArgumentError
from ..experts.choosing import choose
from ..experts.opening import ExpertIO
from ..limits import memory_limit
from ..loading import prove_kernels, resolve_dtype
from ..models import AdaptedFiles, ModelFiles, open_checkpoint
from .chips import Machine
from .costs import ALONE, Costs, Group
from .estimate import Seconds, decode_seconds, held_share, prefill_seconds
from .hit_rate import SKEW, distinct, popularity
from .measure import measure
from .needs import Memory, Needs, decode_hits, needs, prompt_hits, share_memory

STATES = ("cold", "expected", "warm")  # no experts in memory; the expected share; all experts


class Shares(NamedTuple):
    """Shares of the expert bytes of a token in memory and in the store, and of a prompt in memory."""

    decode: float
    held: float
    prompt: float


@dataclass(frozen=True)
class Plan:
    """The predicted memory, bytes and times of a model on a machine.

    Attributes:
        measured: whether costs were measured on this machine, as opposed to predicted from a chip's specifications.
        shares: shares of expert bytes in memory, in each of the :data:`STATES`.
        decode, prefill: seconds of a token and of the prompt in each state; None if the speed of the disk is unknown.
        download: size of the download, if the checkpoint is not on this machine.
        group: machines that run the model together. The memory is that of each machine.
    """

    model: str
    machine: str
    measured: bool
    expert_io: str
    packed: bool
    needs: Needs
    costs: Costs
    memory: Memory
    context: int
    prompt: int
    skew: float
    shares: dict[str, Shares]
    decode: dict[str, Seconds | None]
    prefill: dict[str, Seconds | None]
    download: Download | None
    group: Group = ALONE

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON data, in bytes and seconds."""

        def terms(found: dict[str, Seconds | None]) -> dict[str, Any]:
            return {
                state: None if s is None else dataclasses.asdict(s) | {"total": s.total} for state, s in found.items()
            }

        n, c = self.needs, self.costs
        return {
            "model": self.model,
            "machine": self.machine,
            "machines": dataclasses.asdict(self.group),
            "measured": self.measured,
            "expert_io": self.expert_io,
            "packed": self.packed,
            "experts_per_token": n.experts_per_token,
            "model_experts_per_token": n.dimensions.num_experts_per_tok,
            "memory": dataclasses.asdict(self.memory) | {"fits": self.memory.fits},
            "expert_bytes": n.experts,
            "record_bytes": n.record,
            "expert_bytes_per_token": n.bytes_per_token,
            "context": self.context,
            "prompt": self.prompt,
            "skew": self.skew,
            "in_memory": {state: share._asdict() for state, share in self.shares.items()},
            "decode": terms(self.decode),
            "prefill": terms(self.prefill),
            "costs": {
                "bandwidth": c.bandwidth,
                "flops": c.flops,
                "reads": None if c.reads is None else {k: _finite(v) for k, v in dataclasses.asdict(c.reads).items()},
            },
            "download": None if self.download is None else dataclasses.asdict(self.download),
        }


def plan(
    model: str,
    *,
    experts_per_token: int | None,
    prompt: int = 1024,
    context: int = 4096,
    expert_io: ExpertIO = "auto",
    machine: Machine | None = None,
    skew: float = SKEW,
    group: Group = ALONE,
    revision: str | None = None,
) -> Plan:
    """Plans a checkpoint in a folder or on the hub. It reads only headers from the hub.

    Args:
        experts_per_token: K, as in :meth:`flash_moe.Model.load`.
        prompt: number of tokens of the prompt.
        context: number of tokens that memory must have room for.
        machine: the machine to predict for; None measures this machine.
        skew: skew of the popularity of experts, see :mod:`flash_moe.planning.hit_rate`.
        group: identical machines that run the model together.

    Raises:
        ConfigError, CheckpointError: there is no checkpoint that the library can run.
        HubError: the repository could not be read.
        ArgumentError: an argument is out of range.
    """
    with local_or_headers(model, revision=revision) as (folder, download):
        checkpoint, here = open_checkpoint(folder), download is None
        known = checkpoint.dimensions
        if not (0 < prompt <= known.max_position_embeddings and 0 < context <= known.max_position_embeddings):
            raise ArgumentError(
                f"a prompt of {prompt} tokens and a context of {context}, expected 1 to "
                f"{known.max_position_embeddings}, the model's context"
            )
        if not 0 <= skew <= 4:
            raise ArgumentError(f"skew is {skew}, expected 0 (all experts alike) to 4")
        k = checkpoint.experts_for(experts_per_token)
        table = checkpoint.records()
        dtype = resolve_dtype(checkpoint.stored_dtype if machine else None, checkpoint)
        io = _expert_io(expert_io, checkpoint, table, k, dtype, machine, here)
        need = needs(checkpoint, table, k, dtype.size, io)
        slots = need.slots // group.machines if io == "resident" else need.slots
        own = dataclasses.replace(need, experts=need.experts // group.machines, slots=slots)  # of each machine
        if machine is None:
            costs = measure(checkpoint, table, need, dtype, io, here=here)
        else:
            costs = machine.costs(need, mapped=io == "mapped")
    if machine is None:
        memory = share_memory(own, context, memory_limit(), memory_limit() - available_memory())
    else:
        memory = share_memory(own, context, machine.memory)
    probabilities = popularity(known.num_experts, k, skew)
    touched = distinct(probabilities, prompt) * need.expert_layers * need.record
    keeps = memory.left >= touched / group.machines
    shares = _shares(own, memory, probabilities, touched / group.machines, group, resident=io == "resident")
    decode: dict[str, Seconds | None] = dict.fromkeys(STATES)
    prefill: dict[str, Seconds | None] = dict.fromkeys(STATES)
    for state, share in shares.items():
        if costs.reads is not None or share.decode == 1:
            decode[state] = decode_seconds(need, costs, prompt, share.decode, share.held, group)
        if costs.reads is not None or share.prompt == 1:
            prefill[state] = prefill_seconds(
                need, costs, prompt, share.prompt, probabilities, keeps=keeps, memory=memory.total, group=group
            )
    name = machine_name() if machine is None else machine.name
    return Plan(
        model, name, machine is None, io, table.packed, own, costs, memory, context, prompt, skew, shares,
        decode, prefill, download, group,
    )  # fmt: skip


def _shares(
    need: Needs, memory: Memory, probabilities: np.ndarray, touched: float, group: Group, *, resident: bool
) -> dict[str, Shares]:
    """Returns the shares in each state; a resident store has only one state. n machines hold n times as many experts."""
    if resident:
        return dict.fromkeys(STATES, Shares(1.0, 1.0, 1.0))
    n = group.machines
    held = held_share(dataclasses.replace(need, slots=n * need.slots), probabilities)
    decode = max(held, decode_hits(need, n * memory.left, probabilities))
    expected = Shares(decode, held, prompt_hits(need, memory.left, touched))
    return dict(zip(STATES, (Shares(0.0, 0.0, 0.0), expected, Shares(1.0, held, 1.0)), strict=True))


def _expert_io(
    wanted: ExpertIO,
    checkpoint: ModelFiles | AdaptedFiles,
    table: RecordTable,
    k: int,
    dtype: mx.Dtype,
    machine: Machine | None,
    here: bool,
) -> ExpertIO:
    """Resolves ``"auto"``: measured if the weights are on this machine, else mapped for packed checkpoints on Metal."""
    if wanted != "auto":
        return wanted
    if machine is None and here and table.packed:
        if isinstance(checkpoint, AdaptedFiles):
            return choose(table, k)
        by_part, work = prove_kernels(checkpoint, table.layouts, k, dtype)
        return choose(table, k, work=work, by_part=by_part)
    metal = machine is not None or mx.metal.is_available()
    return "mapped" if table.packed and metal else "slots"


def _finite(value: float) -> float | None:
    """Returns a number, or None for infinity, which JSON cannot represent."""
    return value if value < 1e30 else None
