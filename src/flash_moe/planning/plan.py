"""The plan of a model on a machine: whether it fits, what it reads, how fast it will be."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..bench.system import available_memory, machine_name, total_memory
from ..checkpoint.files import Checkpoint
from ..checkpoint.hub import resolve
from ..checkpoint.records import RecordTable
from ..checkpoint.remote import headers_only
from ..errors import ArgumentError, HubError
from ..experts.choosing import choose
from ..experts.opening import ExpertIO
from ..model import resolve_dtype, resolve_experts_per_token
from .costs import Costs
from .estimate import Seconds, decode_seconds, held_share, prefill_seconds
from .hit_rate import SKEW, distinct, hit_rate, popularity
from .machines import Machine
from .measure import measure
from .needs import Needs, needs

MARGIN_SHARE, MARGIN_LEAST = 0.1, 2 << 30  # of memory that is the system's, at the least
STATES = ("cold", "expected", "warm")


@dataclass(frozen=True)
class Memory:
    """Where the bytes of a machine's memory go.

    Attributes:
        total: of the machine.
        kept: by the system and other programs, and room for activations.
        resident, cache, slots: weights; keys, values and states at the context; the bank that experts are read into.
        left: for the page cache to keep experts in; below 0 where the model does not fit.
        largest_context: tokens that leave the page cache nothing, or the model's own limit; 0 where nothing fits.
    """

    total: int
    kept: int
    resident: int
    cache: int
    slots: int
    left: int
    largest_context: int

    @property
    def fits(self) -> bool:
        return self.left >= 0


@dataclass(frozen=True)
class Plan:
    """What to expect.

    Attributes:
        measured: costs were measured on this machine, not reckoned from a chip's figures.
        hits: expected share of expert bytes that are in memory, while decoding and for a prompt.
        held: share that is in the store's own slots.
        decode, prefill: seconds of a token and of the prompt, if no expert is in memory ("cold"), if all are ("warm"),
            and as memory allows ("expected"); None where the disk's speed is not known.
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
    hits: float
    prompt_hits: float
    held: float
    decode: dict[str, Seconds | None]
    prefill: dict[str, Seconds | None]

    def to_dict(self) -> dict[str, Any]:
        """JSON-like; bytes and seconds."""

        def terms(found: dict[str, Seconds | None]) -> dict[str, Any]:
            return {
                state: None if s is None else dataclasses.asdict(s) | {"total": s.total} for state, s in found.items()
            }

        n, c = self.needs, self.costs
        return {
            "model": self.model,
            "machine": self.machine,
            "measured": self.measured,
            "expert_io": self.expert_io,
            "packed": self.packed,
            "experts_per_token": n.experts_per_token,
            "model_experts_per_token": n.config.num_experts_per_tok,
            "memory": dataclasses.asdict(self.memory) | {"fits": self.memory.fits},
            "expert_bytes": n.experts,
            "record_bytes": n.record,
            "expert_bytes_per_token": n.bytes_per_token,
            "context": self.context,
            "prompt": self.prompt,
            "skew": self.skew,
            "hit_rate": self.hits,
            "prompt_hit_rate": self.prompt_hits,
            "slot_hit_rate": self.held,
            "decode": terms(self.decode),
            "prefill": terms(self.prefill),
            "costs": {
                "bandwidth": c.bandwidth,
                "flops": c.flops,
                "reads": None if c.reads is None else {k: _finite(v) for k, v in dataclasses.asdict(c.reads).items()},
            },
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
    revision: str | None = None,
) -> Plan:
    """Plans a checkpoint: a folder, or a repository on the hub, of which only headers are read.

    Args:
        experts_per_token: K, as :meth:`flash_moe.Model.load` takes it.
        prompt: tokens of a prompt; tokens are decoded after it.
        context: tokens that memory must have room for.
        machine: where it will run; None measures this one.
        skew: of the experts' popularity, see :mod:`flash_moe.planning.hit_rate`.

    Raises:
        ConfigError, CheckpointError: there is no checkpoint that can be run.
        HubError: the repository could not be read.
        ArgumentError: an argument is out of range.
    """
    with _opened(model, revision) as (checkpoint, here):
        config = checkpoint.config
        if not (0 < prompt <= config.max_position_embeddings and 0 < context <= config.max_position_embeddings):
            raise ArgumentError(
                f"a prompt of {prompt} tokens and a context of {context}, expected 1 to "
                f"{config.max_position_embeddings}, the model's context"
            )
        if not 0 <= skew <= 4:
            raise ArgumentError(f"skew is {skew}, expected 0 (all experts alike) to 4")
        k = resolve_experts_per_token(experts_per_token, config)
        table = RecordTable.of(checkpoint)
        io = _expert_io(expert_io, table, k, machine, here)
        dtype = resolve_dtype(_stored_dtype(checkpoint) if machine else None, checkpoint)
        need = needs(checkpoint, table, k, dtype.size, io)
        if machine is None:
            costs = measure(checkpoint, table, need, dtype, io, here=here)
        else:
            costs = machine.costs(need, mapped=io == "mapped")
    memory = _memory(need, context, machine)
    probabilities = popularity(config.num_experts, k, skew)
    held = 1.0 if io == "resident" else held_share(need, probabilities)
    hits = 1.0 if io == "resident" else max(held, _hits(need, memory, probabilities))
    prompt_hits = 1.0 if io == "resident" else _prompt_hits(need, memory, prompt, probabilities)
    shares = {"cold": (0.0, 0.0, 0.0), "expected": (hits, held, prompt_hits), "warm": (1.0, held, 1.0)}
    decode: dict[str, Seconds | None] = {}
    prefill: dict[str, Seconds | None] = {}
    for state, (share, of_slots, of_prompt) in shares.items():
        if io == "resident" and state == "cold":
            share = of_slots = of_prompt = 1.0
        known = costs.reads is not None
        decode[state] = decode_seconds(need, costs, prompt, share, of_slots) if known or share == 1 else None
        prefill[state] = (
            prefill_seconds(need, costs, prompt, of_prompt, probabilities) if known or of_prompt == 1 else None
        )
    name = machine_name() if machine is None else machine.name
    return Plan(
        model, name, machine is None, io, table.packed, need, costs, memory, context, prompt, skew, hits,
        prompt_hits, held, decode, prefill,
    )  # fmt: skip


@contextmanager
def _opened(model: str, revision: str | None) -> Iterator[tuple[Checkpoint, bool]]:
    """The checkpoint, and whether its weights are on this machine."""
    try:
        folder = resolve(model, revision=revision, local_files_only=True)
    except HubError:
        with headers_only(model, revision=revision) as headers:
            yield Checkpoint.open(headers), False
        return
    yield Checkpoint.open(Path(folder)), True


def _expert_io(wanted: ExpertIO, table: RecordTable, k: int, machine: Machine | None, here: bool) -> ExpertIO:
    """What ``"auto"`` will be: measured where the weights are here, mapped for packed checkpoints on Metal."""
    if wanted != "auto":
        return wanted
    if machine is None and here and table.packed:
        return choose(table, k)
    metal = machine is not None or mx.metal.is_available()
    return "mapped" if table.packed and metal else "slots"


def _stored_dtype(checkpoint: Checkpoint) -> str:
    stored = checkpoint.resident["norm.weight"].dtype if "norm.weight" in checkpoint.resident else "BF16"
    return {"F32": "float32", "F16": "float16"}.get(stored, "bfloat16")


def _memory(need: Needs, context: int, machine: Machine | None) -> Memory:
    total = total_memory() if machine is None else machine.memory
    kept = max(round(MARGIN_SHARE * total), MARGIN_LEAST)
    if machine is None:
        kept = max(kept, total - available_memory())
    room = total - kept - need.resident - need.slots - need.state
    limit = need.config.max_position_embeddings
    largest = min(limit, room // need.kv_per_token) if need.kv_per_token else limit
    cache = need.state + context * need.kv_per_token
    left = total - kept - need.resident - need.slots - cache
    return Memory(total, kept, need.resident, cache, need.slots, left, max(0, largest) if room >= 0 else 0)


def _hits(need: Needs, memory: Memory, probabilities: Any) -> float:
    if not need.record:
        return 1.0
    return hit_rate(probabilities, max(0, memory.left) / need.record / need.expert_layers)


def _prompt_hits(need: Needs, memory: Memory, prompt: int, probabilities: Any) -> float:
    """A prompt goes through the layers one after the other; what does not fit as a whole is forgotten before its turn."""
    touched = distinct(probabilities, prompt) * need.expert_layers * need.record
    return 1.0 if memory.left >= need.experts else 0.0 if memory.left < touched else memory.left / need.experts


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if value < 1e30 else None
