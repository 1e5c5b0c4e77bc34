"""Trains the demo model. `python -m demo_model` calls this, with data before and scores after.

    PYTHONPATH=tools python -m demo_model.train --data SHARDS --out RUN --shards 400 --eval-data held-out.npz \
        --tokenizer TOKENIZER --export EXPORT

The run ends after --minutes of training whatever the speed is: the learning rate follows the time. It may be
interrupted at any time; the same command continues from RUN/checkpoint.pt. Shards may still be written while it trains
(batches.py). With every checkpoint the weights also go to EXPORT, as a Hugging Face checkpoint.

A run that was cut off before its learning rate fell is finished elsewhere from its weights alone:

    ... --continue-from EXPORT --minutes 3

starts with fresh optimizers, a short warm-up, and a learning rate that falls from then on (--decay 1).
"""

from __future__ import annotations

import argparse
import math
import random
import signal
import time
import traceback
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import checkpoint, export, model, optimizers
from .batches import ASSISTANT, CONTEXT, LONGEST, PADDING, Batch, ShardStream, evaluation_batches
from .checkpoint import Progress
from .exporter import Exporter
from .log import Log, configure
from .metrics import evaluate, load_summary, to_device
from .network import Network
from .prefetch import Prefetch

FEWER = (2, 4, 6)  # experts per token of the steps that --fewer-experts chooses
HOPELESS = 20  # steps in a row without finite gradients


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of shard-*.npz")
    add("--out", type=Path, required=True, help="folder for checkpoint.pt and log.jsonl")
    add("--eval-data", type=Path, help="a shard of held-out conversations")
    add("--shards", type=int, help="how many shards there will be (default: those there are)")
    add("--pool", type=int, default=8, help="shards that are sorted by length together")
    add("--patience", type=float, default=60, help="seconds to wait for a late shard before others take its place")
    add("--continue-from", type=Path, help="start with the weights of an exported folder or a checkpoint.pt")
    add("--export", type=Path, help="folder for a Hugging Face checkpoint, renewed with every checkpoint.pt")
    add("--tokenizer", type=Path, help="folder of the tokenizer; --export needs it")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=18, help="length of the run")
    length.add_argument("--steps", type=int, help="length of the run in steps: exactly repeatable")
    add("--tokens", type=int, default=107520, help="places of a batch, a multiple of 1,024 with many divisors")
    add("--lr", type=float, default=4e-3, help="of Muon, for the large matrices")
    add("--adam-lr", type=float, default=4e-3, help="of AdamW, for the rest")
    add("--weight-decay", type=float, default=0.1)
    add("--warmup", type=int, help="steps (default: 100; 30 with --continue-from)")
    add(
        "--decay",
        type=float,
        help="last share of the run, in which the rate falls to zero (default: 0.4, or 1 likewise)",
    )
    add("--context-weight", type=float, default=0.1, help="loss weight of tokens that are not the assistant's")
    add("--balance", type=float, default=0.01, help="weight of the load-balance loss")
    add("--fewer-experts", type=float, default=0.0, help="share of steps with 2, 4 or 6 experts per token")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--no-compile", action="store_true")
    add("--checkpoint-minutes", type=float, default=2)
    add("--eval-minutes", type=float, default=2)
    add("--eval-batches", type=int, default=10)
    add("--log-seconds", type=float, default=10)
    options = parser.parse_args(words)
    if options.export and not options.tokenizer:
        parser.error("--export needs --tokenizer: the folder whose files go with the weights")
    if options.warmup is None:
        options.warmup = 30 if options.continue_from else 100
    if options.decay is None:
        options.decay = 1.0 if options.continue_from else 0.4
    return options


class Trainer:
    """One training run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        gpu = self.device.type == "cuda"
        options.out.mkdir(parents=True, exist_ok=True)
        self.path = options.out / "checkpoint.pt"
        self.log = Log(options.out / "log.jsonl")
        torch.set_float32_matmul_precision("high" if gpu else "highest")
        self.model = model.create(model.config(), options.seed).to(self.device)
        self.optimizers = optimizers.create(self.model, options.lr, options.adam_lr, options.weight_decay)
        self.network = Network(
            self.model, torch.bfloat16 if gpu else torch.float32, compiled=gpu and not options.no_compile
        )
        self.progress = Progress()
        if self.path.exists():
            self.progress = checkpoint.restore(self.path, self.model, self.optimizers)
            self.log.line(f"continuing {self.path}: step {self.progress.step}, {self.progress.elapsed:.0f} s")
        elif options.continue_from:
            checkpoint.assign(options.continue_from, self.model, export.load(options.continue_from).state_dict())
            self.log.line(f"starting with the weights of {options.continue_from}")
        self.stream = ShardStream(
            options.data, options.tokens, options.seed, options.shards, options.pool, options.patience
        )
        self.exporter = Exporter(options.export, options.tokenizer) if options.export else None
        weights = {PADDING: 0.0, CONTEXT: options.context_weight, ASSISTANT: 1.0}
        self.weights = torch.tensor([weights[kind] for kind in sorted(weights)], device=self.device)
        self.skipped = 0
        self.stopping = False

    @cached_property
    def held_out(self) -> list[Batch]:
        """Batches for evaluation; read late, since the file may still be in the making when the run begins."""
        options = self.options
        return evaluation_batches(options.eval_data, options.tokens, options.eval_batches) if options.eval_data else []

    def compile(self) -> None:
        """Lets torch.compile see a batch of random tokens, while the data is not there yet; changes no weight."""
        if not self.network.compiled:
            return
        start = time.monotonic()
        shape = self.options.tokens // LONGEST, LONGEST
        rng = np.random.default_rng(0)
        ids, targets = rng.integers(0, self.model.config.vocab_size, (2, *shape))
        self._gradients(Batch(ids, targets, np.full(shape, ASSISTANT, np.uint8)))
        self.log.line(f"compiled in {time.monotonic() - start:.0f} s")

    def run(self) -> None:
        """Trains until the end or SIGTERM.

        Raises:
            FloatingPointError: gradients are not finite any more.
        """
        handler = signal.signal(signal.SIGTERM, self._stop)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.log.line(f"{parameters:,} parameters, batches of {self.options.tokens:,} tokens, {self.device}")
        start = time.monotonic() - self.progress.elapsed
        reported = saved = evaluated = self.progress.elapsed
        tokens_then = self.progress.tokens
        try:
            for batch, position in Prefetch(self.stream.batches(self.progress.position), lambda: self.stopping):
                if self.finished:
                    break
                loss, norm, shares, rate = self.step(batch)
                progress = self.progress
                progress.step += 1
                progress.tokens += int((batch.kinds != PADDING).sum())
                progress.position = position
                now = progress.elapsed = time.monotonic() - start
                if now - reported >= self.options.log_seconds or progress.step == 1:
                    self._report(loss, norm, rate, (progress.tokens - tokens_then) / max(now - reported, 1e-9), shares)
                    reported, tokens_then = now, progress.tokens
                if now - evaluated >= 60 * self.options.eval_minutes:
                    self._evaluate()
                    evaluated = now
                if now - saved >= 60 * self.options.checkpoint_minutes:
                    self._save()
                    saved = now
        finally:
            signal.signal(signal.SIGTERM, handler)
        checkpoint.save(self.path, self.model, self.optimizers, self.progress)
        self.export()
        self._evaluate()
        self.log.line("stopped; the same command continues" if self.stopping else "finished")

    def export(self) -> None:
        """Brings the exported folder up to date, if there is to be one."""
        if self.exporter:
            self._start_export()
            self.exporter.finish()

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        return self.share_done() >= 1

    def share_done(self) -> float:
        """How much of the run is over, 0 to 1."""
        if self.options.steps is not None:
            return min(1.0, self.progress.step / self.options.steps)
        return min(1.0, self.progress.elapsed / (60 * self.options.minutes))

    def step(self, batch: Batch) -> tuple[float, float, Tensor, float]:
        """One update: loss in nats, gradient norm, the experts' shares [layers, E], share of the peak learning rate."""
        rate = optimizers.rate_share(self.progress.step, self.share_done(), self.options.warmup, self.options.decay)
        optimizers.set_rate(self.optimizers, rate)
        loss, shares = self._gradients(batch)
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0))
        if math.isfinite(norm):
            self.skipped = 0
            for optimizer in self.optimizers:
                optimizer.step()
        else:
            self.skipped += 1
            self.log.line(f"step {self.progress.step}: gradient norm is {norm}; step skipped")
            if self.skipped >= HOPELESS:
                raise FloatingPointError(f"{HOPELESS} steps in a row without finite gradients; lower --lr")
        return float(loss), norm, shares, rate

    def _gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sets the gradients; returns the loss [] and the experts' shares [layers, E]."""
        try:
            return self._backward(batch)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if not self.network.compiled:
                raise
            traceback.print_exc()
            self.log.line(f"NOT COMPILED ({type(error).__name__}, see above): continuing without torch.compile, slower")
            self.network.compile(False)
            return self._backward(batch)

    def _backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        ids, targets, kinds = to_device(batch, self.device)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        scores = self.network.scores(ids, targets, kinds != PADDING, self._top_k())
        weights = self.weights[kinds.flatten().int()]
        loss = (scores.loss * weights).sum() / weights.sum()
        (loss + self.options.balance * scores.balance).backward()
        return loss.detach(), scores.shares

    def _top_k(self) -> int | None:
        draw = random.Random(f"{self.options.seed} {self.progress.step}")
        return draw.choice(FEWER) if draw.random() < self.options.fewer_experts else None

    def _report(self, loss: float, norm: float, rate: float, speed: float, shares: Tensor) -> None:
        p = self.progress
        memory = f" {torch.cuda.max_memory_allocated() / 1e9:.0f} GB" if self.device.type == "cuda" else ""
        lr = rate * self.options.lr
        self.log.line(
            f"step {p.step} {p.elapsed:.0f} s {p.tokens / 1e6:.1f} Mtok {speed / 1e3:.0f}k tok/s "
            f"loss {loss:.4f} lr {lr:.2e} norm {norm:.2f}{memory} load {load_summary(shares)}",
            step=p.step,
            elapsed=round(p.elapsed, 1),
            tokens=p.tokens,
            tokens_per_second=round(speed),
            loss=loss,
            lr=lr,
            norm=norm,
        )

    def _evaluate(self) -> None:
        if not self.held_out:
            return
        found = evaluate(self.network, self.held_out, self.device)
        p = self.progress
        self.log.line(
            f"held out: loss {found['loss']:.4f} accuracy {found['accuracy']:.4f} context {found['context_loss']:.4f}",
            step=p.step,
            elapsed=round(p.elapsed, 1),
            held_out=found,
        )

    def _save(self) -> None:
        checkpoint.save(self.path, self.model, self.optimizers, self.progress)
        self._start_export()

    def _start_export(self) -> None:
        if self.exporter:
            self.exporter.start(self.model, f"step {self.progress.step}")

    def _stop(self, *_: object) -> None:
        self.stopping = True


def main(words: list[str] | None = None) -> None:
    configure()
    trainer = Trainer(arguments(words))
    trainer.compile()
    trainer.run()


if __name__ == "__main__":
    main()
