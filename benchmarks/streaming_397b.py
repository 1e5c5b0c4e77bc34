"""Streaming on a GPU with the layer sizes of Qwen3.5-397B-A17B: how fast experts come out of the page cache.

    python benchmarks/streaming_397b.py FOLDER --json FILE [--stages make speeds reference cache prefill plan bank]
    python benchmarks/streaming_397b.py FOLDER --json FILE --tiny          # the same with a small model, on any machine

FOLDER is a scratch folder on one file system; models are made there, with random weights (`made_397b.py`), and stay. At
full size it takes 30 GB of disk, as much page cache, and up to 90 GB of the GPU's memory. Every stage prints its
rows as soon as they are known; one that fails is reported and the next begins.

    make       the models; that with few experts is left to `bank`
    speeds     copies and reads by themselves: on the device, out of the page cache, from the host to the device
    reference  mlx-lm with fewer layers and experts, resident: tokens, and a prompt. MLX's fused delta rule is a second
               row, for mlx-lm has a kernel of its own only for Metal and loops over the tokens elsewhere
    cache      tokens whose experts are all in the page cache, and what the parts of a token take
    prefill    a prompt, through the page cache
    plan       `flash-moe plan` beside `flash-moe bench`
    bank       tokens whose experts are all in the slots, and those of a model with so few that layers are whole

Times are wall times. "Waiting for reads" is the time inside a store's fetch, with all that CUDA does there to move pages of
managed memory; "the rest" is a token without it. Pieces are timed alone, in one launch; together they take less than
the rest by what the host costs. A floor is the bytes that a piece must read as stored, divided by a device copy's bytes per
second. "Per layer" leaves the output head out, which mlx-lm's fewer layers would have to carry otherwise.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import mlx.core as mx  # noqa: E402
from report_397b import Report  # noqa: E402
from stages_397b import STAGES, Benchmark  # noqa: E402

TINY_SIZES: dict[str, Any] = {
    "layers": 4, "experts": 32, "few_experts": 8, "reference_layers": 4, "prefill_layers": 4, "plan_layers": 4, "tokens": 6,
    "prompt": 64, "plan_prompt": 48, "copy_mb": 16,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--json", type=Path, help="lines are appended")
    parser.add_argument("--tiny", action="store_true", help="a small model; the sizes below get other defaults")
    for name, size, meaning in (
        ("k", 4, "experts per token"),
        ("layers", 60, "of the model"),
        ("experts", 512, "of a layer"),
        ("few-experts", 64, "of a layer where all of them are to be in memory"),
        ("distinct", 2, "files of experts; the other layers are links to them"),
        ("tokens", 24, "that are decoded"),
        ("prompt", 2048, "tokens of the prompt"),
        ("reference-layers", 8, "of mlx-lm's model"),
        ("prefill-layers", 12, "of the model that runs the prompt"),
        ("plan-layers", 8, "of the model that is planned, with few experts"),
        ("plan-prompt", 512, "tokens of its prompt"),
        ("most-gb", 100, "of memory that MLX may hold"),
        ("copy-mb", 1024, "of a device copy"),
    ):
        parser.add_argument(f"--{name}", type=int, default=size, help=f"{meaning} (%(default)s)")
    parser.add_argument("--reference-k", type=int, nargs="+", help="of mlx-lm's runs (that of --k)")
    if "--tiny" in sys.argv:
        parser.set_defaults(**TINY_SIZES)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    mx.random.seed(0)
    machine = mx.device_info().get("device_name") or platform.machine()
    print(f"{datetime.date.today()}, {machine}, {os.cpu_count()} cores, mlx {mx.__version__}; {' '.join(sys.argv[1:])}")
    benchmark, failed = Benchmark(arguments, Report(arguments.json)), []
    for name in arguments.stages:
        start = time.perf_counter()
        benchmark.report.say(f"stage {name}")
        try:
            STAGES[name](benchmark)
        except Exception:  # one stage that fails must not hide the others
            traceback.print_exc()
            failed.append(name)
        mx.clear_cache()
        benchmark.report.say(f"stage {name} took {time.perf_counter() - start:.0f} s")
    if failed:
        sys.exit(f"these stages failed, see above: {', '.join(failed)}")


if __name__ == "__main__":
    main()
