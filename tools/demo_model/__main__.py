"""Makes the demo model: data, training, export and score, by one command.

    PYTHONPATH=tools python -m demo_model OUT

What OUT holds already is not made again, so the same command continues what was interrupted:

- OUT/tokenizer, OUT/held-out, OUT/shards: data, made by a process of its own while training compiles and runs;
- OUT/run: checkpoint.pt and log.jsonl;
- OUT/export: the weights of the last checkpoint, at any time a complete Hugging Face checkpoint;
- OUT/score.json: how many of the held-out prompts get exactly the right tool calls;
- OUT/log.txt: everything that happened; OUT/compiled: what torch.compile made, of use to the next run on such a GPU.

All options of `python -m demo_model.train` may follow. If a run was cut off, its export is enough to finish it on
another machine in a few minutes: the learning rate then falls from the start (--seed 1 gives data not seen before).

    PYTHONPATH=tools python -m demo_model OUT2 --continue-from OUT/export --minutes 3 --seed 1
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from . import prepare, sample, train
from .export import TOKENIZER_FILES
from .log import LOGGER, configure

PROMPTS = Path(__file__).parents[2] / "models" / "eval" / "tool_calls.jsonl"
LONGEST_ANSWER = 128  # tokens


def arguments(words: list[str] | None = None) -> tuple[argparse.Namespace, argparse.Namespace]:
    """Options of this command, and those of training."""
    parser = argparse.ArgumentParser(
        "demo_model", description=__doc__.splitlines()[0], epilog="Further options are those of demo_model.train.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("out", type=Path)
    prepare.add_arguments(parser)
    parser.add_argument("--compiled", type=Path, help="folder of torch.compile's results (default: OUT/compiled)")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="of the score")
    parser.add_argument("--limit", type=int, help="maximum number of prompts")
    options, rest = parser.parse_known_args(words)
    out = options.out
    files = {
        "data": prepare.shards(out),
        "out": out / "run",
        "eval-data": prepare.held_out(out),
        "shards": options.shards,
        "tokenizer": prepare.tokenizer_folder(out),
        "export": out / "export",
    }
    return options, train.arguments([*(f"--{name}={value}" for name, value in files.items()), *rest])


def adopt_tokenizer(source: Path, folder: Path) -> None:
    """Copies the tokenizer that the weights ``source`` were trained with, unless ``folder`` is there.

    Raises:
        FileNotFoundError: it is not where an export or the run of a checkpoint.pt has it.
    """
    if folder.exists():
        return
    theirs = source if source.is_dir() else prepare.tokenizer_folder(source.resolve().parents[1])
    new = folder.with_name("tokenizer.new")
    new.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if not (theirs / name).exists():
            raise FileNotFoundError(f"{theirs / name} is missing; weights need the tokenizer they were trained with")
        shutil.copyfile(theirs / name, new / name)
    new.rename(folder)


def train_and_export(options: argparse.Namespace, training: argparse.Namespace) -> bool:
    """Whether training is over and ``training.export`` has its result; False if SIGTERM asked to stop."""
    trainer = train.Trainer(training)
    if trainer.finished:
        LOGGER.info("training was finished before")
        if not newer(training.export / "config.json", trainer.path):
            trainer.export()
        return True
    data = prepare.Preparation(
        options.out, training.seed, options.shards, options.conversations, options.processes
    )  # fmt: skip
    with data:
        trainer.compile()
        data.wait_for(training.eval_data)
        trainer.run()
    return not trainer.stopping


def score(options: argparse.Namespace, training: argparse.Namespace) -> None:
    """Writes the share of right tool calls, with the model's own K, to score.json."""
    start = time.monotonic()
    cases = sample.load_cases(options.prompts, options.limit)
    answerer = sample.Answerer(training.export, training.export, training.device)
    k = answerer.network.config.num_experts_per_tok
    good = len(cases) - len(sample.wrong(cases, answerer.answers(cases, LONGEST_ANSWER, k)))
    found = {"experts_per_token": k, "prompts": len(cases), "right": good, "share": good / len(cases)}
    partial = options.out / "score.json.partial"
    partial.write_text(json.dumps(found) + "\n")
    partial.replace(options.out / "score.json")
    seconds = time.monotonic() - start
    LOGGER.info(f"tool calls: {good} of {len(cases)} right, {good / len(cases):.1%}, K={k} ({seconds:.0f} s)")


def newer(target: Path, source: Path) -> bool:
    """Whether ``target`` is there and was written after ``source``."""
    return target.exists() and target.stat().st_mtime >= source.stat().st_mtime


def run(options: argparse.Namespace, training: argparse.Namespace) -> None:
    if training.continue_from:
        adopt_tokenizer(training.continue_from, training.tokenizer)
    if not train_and_export(options, training):
        raise SystemExit("interrupted; the same command continues")
    if newer(options.out / "score.json", training.export / "config.json"):
        LOGGER.info(f"scored before: {(options.out / 'score.json').read_text().strip()}")
    else:
        score(options, training)


def main(words: list[str] | None = None) -> None:
    options, training = arguments(words)
    configure(options.out / "log.txt")
    disable_progress_bar()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((options.compiled or options.out / "compiled").resolve()))
    try:
        run(options, training)
    except Exception as error:
        LOGGER.info(f"FAILED: {type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    main()
