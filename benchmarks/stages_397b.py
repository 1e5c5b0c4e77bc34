"""The stages of `streaming_397b.py`, which says what they measure."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from made_397b import make_model
from pieces_397b import (
    device_copy,
    device_read,
    experts_alone,
    fetch_everything,
    head_alone,
    layers_alone,
    page_cache_read,
    reads_alone,
    replay,
    resident_bytes,
    warm_contents,
)
from random_checkpoint import text_config
from reference_397b import reference
from report_397b import Report
from sparse_checkpoint import FULL_SIZE

from flash_moe import Model
from flash_moe.bench.phases import bench, sample_prompt
from flash_moe.config import FULL_ATTENTION, LINEAR_ATTENTION
from flash_moe.experts.host_memory import keep_on_host
from flash_moe.experts.mapped_file import MappedFile
from flash_moe.models import open_model
from flash_moe.nn.prefetch_switch import PrefetchSwitch
from flash_moe.planning.plan import plan

TINY: dict[str, Any] = text_config(
    hidden_size=512, moe_intermediate_size=512, shared_expert_intermediate_size=512, vocab_size=512
)


class Prefetching(PrefetchSwitch):
    """Always on."""

    on = True


class Benchmark:
    """The stages, and what later ones need of earlier ones."""

    def __init__(self, arguments: argparse.Namespace, report: Report) -> None:
        self.a, self.report, self.k = arguments, report, arguments.k
        self.text: dict[str, Any] = TINY if arguments.tiny else FULL_SIZE
        self.found: dict[str, float] = {}
        self.tokens = np.random.default_rng(0).integers(0, self.text["vocab_size"], arguments.tokens).tolist()

    # ---- models

    def model_folder(self, name: str) -> Path:
        a = self.a
        layers, experts, distinct = {
            "whole": (a.layers, a.experts, a.distinct),
            "few": (a.layers, a.few_experts, 1),
            "short": (a.prefill_layers, a.experts, a.distinct),
            "plan": (a.plan_layers, a.few_experts, a.plan_layers),
        }[name]
        start, new = time.perf_counter(), not (a.folder / name).exists()
        folder = make_model(a.folder, name, self._text(layers, experts), distinct)
        if new:
            seconds = time.perf_counter() - start
            self.report.row(
                "make", model=name, layers=layers, experts=experts, distinct_files=min(distinct, layers), s=seconds
            )
        return folder

    def _text(self, layers: int, experts: int) -> dict[str, Any]:
        return self.text | {"num_hidden_layers": layers, "num_experts": experts}

    @contextmanager
    def _loaded(self, name: str, **options: Any) -> Iterator[Model]:
        """A model, and an end to all the memory it held; a bank is copied once where the host first looks at it."""
        gc.collect()  # models refer to themselves
        mx.clear_cache()
        folder, start = self.model_folder(name), time.perf_counter()
        resident = sum(info.nbytes for info in open_model(folder).resident.values())
        needed = mx.get_active_memory() + resident + 2 * options.get("expert_cache", 0)
        if needed > self.a.most_gb * 1e9:
            raise MemoryError(
                f"{needed / 1e9:.0f} GB would be held, expected at most {self.a.most_gb}; take fewer tokens"
            )
        model = Model.load(folder, **({"experts_per_token": self.k, "expert_io": "slots"} | options))
        seconds, held = time.perf_counter() - start, mx.get_active_memory() / 1e9
        self.report.say(f"loaded {name} {options} in {seconds:.1f} s, MLX holds {held:.1f} GB")
        with model:
            yield model

    def make(self) -> None:
        for name in ("whole", "short", "plan"):
            self.model_folder(name)

    # ---- stages

    def speeds(self) -> None:
        nbytes = self.a.copy_mb << 20
        self.found["copy"] = device_copy(nbytes)
        self.report.row("speeds", what="device copy, read and written", GB_per_s=self.found["copy"] / 1e9)
        path = open_model(self.model_folder("whole")).records().files[0]
        warm_contents(path.parent)
        plain = np.ones(nbytes, np.uint8)  # ones: memory that was touched already
        file = MappedFile(path)
        for threads in (4, 8, 16):
            speed = page_cache_read(file, plain, threads)
            self.found["page cache"] = max(speed, self.found.get("page cache", 0.0))
            self.report.row("speeds", what=f"page cache to plain memory, {threads} threads", GB_per_s=speed / 1e9)
        mx.eval(mx.zeros((4,), dtype=mx.uint32) + 1)  # kernels are compiled at first use
        size = min(nbytes, file.size) // (1 << 20) * (1 << 20)
        for advised in (False, True) if mx.cuda.is_available() else (False,):
            bank = mx.zeros((nbytes // 4,), dtype=mx.uint32)
            mx.eval(bank)
            memory, where = np.array(bank, copy=False).view(np.uint8), "managed memory"
            if advised:
                where += " advised to stay on the host"
                if not keep_on_host(memory):
                    raise RuntimeError("CUDA did not take the advice, see the warning above")
            for number in range(2):
                speed = page_cache_read(file, memory, 8)
                again = "after the device has read it" if number else "for the first time"
                self.report.row("speeds", what=f"page cache to {where}, {again}", GB_per_s=speed / 1e9)
                speed = device_read(bank[: size // 4])
                self.report.row("speeds", what=f"{where} to the device, after that", GB_per_s=speed / 1e9)
            del memory, bank
        file.close()

    def reference(self) -> None:
        text = self._text(self.a.reference_layers, self.a.few_experts)
        for row in reference(text, self.a.reference_k or [self.k], self.a.prompt, self.report.say):
            self.found[f"{row['of']} {row['K']}"] = row["ms_per_layer"]
            self.report.row("mlx-lm, resident", **row)

    def cache(self) -> None:
        warm_contents(self.model_folder("whole"))
        with self._loaded("whole") as model:
            self.report.say("compiling")
            replay(model, self.tokens[:2])
            self._row("page cache", "slots", model)
            total, _ = self._row("page cache", "slots", model)
            waiting, fetched = self.found["waiting"], self.found["requested"]
            try:
                self._pieces(model, total, waiting, fetched)
            except Exception:  # a piece that fails must not hide the other stores
                traceback.print_exc()
        del model
        with self._loaded("whole", prefetch=True) as model:
            prefetcher = model._decoder.prefetcher
            prefetcher.switch = Prefetching()
            for _ in range(2):
                self._row("page cache", "slots, prefetch", model)
            counters = prefetcher.counters
            self.report.row("prefetch", needed=counters.needed, predicted=counters.found / counters.needed)
        del model, prefetcher
        with self._loaded("whole", expert_io="mapped") as model:
            for _ in range(2):
                self._row("page cache", "mapped", model, self.tokens[: len(self.tokens) // 3])

    def _pieces(self, model: Model, total: float, waiting: float, fetched: float) -> None:
        layers, copy = self.a.layers, self.found.get("copy") or device_copy(self.a.copy_mb << 20)
        floors: dict[str, float] = {name: nbytes / copy for name, nbytes in resident_bytes(model).items()}
        floors["experts"] += fetched / copy
        delta, attention = (layers_alone(model, kind)[0] for kind in (LINEAR_ATTENTION, FULL_ATTENTION))
        experts = layers * experts_alone(model, 16)
        head = head_alone(model._decoder.logits, model.config.hidden_size, model._decoder.dtype, 16)
        self.found["head"] = head
        floor = self.found["floor of a token"] = sum(floors.values())
        rows = {
            "a token": (total, floor),
            "waiting for reads": (waiting, fetched / self.found["page cache"] if "page cache" in self.found else None),
            "the rest": (total - waiting, floor),
            "delta-net layers alone": (delta, floors["delta-net layers"]),
            "attention layers alone": (attention, floors["attention layers"]),
            "experts alone": (experts, floors["experts"]),
            "head alone": (head, floors["head"]),
        }
        for name, (seconds, its_floor) in rows.items():
            self._piece(name, seconds, its_floor)

    def _piece(self, name: str, seconds: float, floor: float | None) -> None:
        self.report.row(
            "where a token's time goes", piece=name, ms=_ms(seconds), ms_per_layer=_ms(seconds, self.a.layers),
            floor_ms=_ms(floor), times_the_floor=_ratio(seconds, floor),
        )  # fmt: skip

    def prefill(self) -> None:
        warm_contents(self.model_folder("short"))
        prompt = np.random.default_rng(1).integers(0, self.text["vocab_size"], self.a.prompt).tolist()
        with self._loaded("short") as model:
            self.report.say("compiling")
            model.generate(prompt[: self.a.prompt // 8], max_tokens=1, temperature=0)
            for _ in range(2):
                before = dataclasses.replace(model.expert_store.stats)
                model.forget()
                stats = model.generate(prompt, max_tokens=1, temperature=0).stats
                spent, layers = model.expert_store.stats.since(before), self.a.prefill_layers
                reads = reads_alone(model) * spent.bytes_loaded
                theirs = [self.found.get(f"{kind} {self.k}") for kind in ("prompt", "prompt, fused delta rule")]
                mine = 1e3 * stats.prompt_seconds / layers
                self.report.row(
                    "prefill", store="slots", tokens=len(prompt), layers=layers, s=stats.prompt_seconds,
                    tok_per_s_of_all_layers=len(prompt) / (stats.prompt_seconds * self.a.layers / layers),
                    ms_per_layer=mine, GB_read=spent.bytes_loaded / 1e9, waiting_for_reads_s=spent.fetch_seconds,
                    reads_alone_s=reads, reads_alone_GB_per_s=spent.bytes_loaded / reads / 1e9,
                    rate_of_mlx_lm=_ratio(theirs[0], mine), rate_of_mlx_lm_fused=_ratio(theirs[1], mine),
                )  # fmt: skip

    def plan(self) -> None:
        folder = self.model_folder("plan")
        for expert_io in ("slots", "mapped"):
            self.report.say(f"plan, {expert_io}")
            planned = plan(str(folder), experts_per_token=self.k, prompt=self.a.plan_prompt, expert_io=expert_io)
            self.report.say(f"bench, {expert_io}")
            with self._loaded("plan", expert_io=expert_io) as model:
                found = bench(model, sample_prompt(model, self.a.plan_prompt), 16)
            del model
            for phase in found.phases:
                state = "cold" if phase.cold else "warm"
                foreseen = (planned.decode if phase.name == "decode" else planned.prefill)[state]
                measured = phase.token_seconds * (1 if phase.name == "decode" else self.a.plan_prompt)
                expected = None if foreseen is None else foreseen.total
                self.report.row(
                    "plan and bench", store=expert_io, phase=f"{phase.name} {state}", plan_ms=_ms(expected),
                    bench_ms=_ms(measured), ratio=None if expected is None else expected / measured,
                    in_memory_beforehand_MB=None if phase.leftover_bytes is None else phase.leftover_bytes / 1e6,
                )  # fmt: skip

    def bank(self) -> None:
        stride = open_model(self.model_folder("whole")).records().max_stride
        for name in ("few", "whole"):
            count = self.a.few_experts if name == "few" else len(self.tokens) * self.k
            nbytes = stride * self.a.layers * count
            warm_contents(self.model_folder(name))
            with self._loaded(name, expert_cache=nbytes) as model:
                if name == "few":
                    fetch_everything(model)  # after which each layer is whole
                self._row("bank", f"first pass, {model.config.num_experts} experts", model)
                for number in range(2):  # the device moves pages of the bank at their first use
                    seconds, brought = self._row("bank", f"pass {number + 2}, all in slots", model)
                if brought:
                    raise RuntimeError(f"{brought} bytes were read in a pass whose experts should all be in slots")
            del model
        self._piece("a token whose experts are in slots", seconds, self.found.get("floor of a token"))

    def _row(self, table: str, name: str, model: Model, tokens: Sequence[int] = ()) -> tuple[float, int]:
        """Decodes tokens (all, unless given) and reports: median seconds of one, and bytes that were not in the store."""
        tokens, before = tokens or self.tokens, dataclasses.replace(model.expert_store.stats)
        seconds = float(np.median(replay(model, tokens)))
        spent, count = model.expert_store.stats.since(before), len(tokens)
        if "head" not in self.found:
            dtype = model._decoder.dtype
            self.found["head"] = head_alone(model._decoder.logits, model.config.hidden_size, dtype, 16)
        per_layer = 1e3 * (seconds - self.found["head"]) / self.a.layers
        self.found |= {"waiting": spent.fetch_seconds / count, "requested": spent.bytes_requested / count}
        self.report.row(
            table, what=name, K=self.k, tok_per_s=1 / seconds, ms=1e3 * seconds, ms_per_layer=per_layer,
            of_mlx_lm_per_layer=_ratio(per_layer, self.found.get(f"token {self.k}")),
            in_the_store=1 - spent.bytes_loaded / spent.bytes_requested, missing_GB=spent.bytes_missing / 1e9,
            waiting_for_reads_ms=1e3 * spent.fetch_seconds / count,
        )  # fmt: skip
        return seconds, spent.bytes_loaded


def _ms(seconds: float | None, parts: int = 1) -> float | None:
    return None if seconds is None else 1e3 * seconds / parts


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


STAGES: dict[str, Callable[[Benchmark], None]] = {
    name: getattr(Benchmark, name) for name in ("make", "speeds", "reference", "cache", "prefill", "plan", "bank")
}
