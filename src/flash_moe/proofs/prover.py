"""Decides which kernels of a model are used on this machine: tests them once and stores the verdicts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..ops import kernel_sources
from ..ops.dispatch import Case, accept
from ..ops.kernel import back_end
from ..user_cache import recall, remember
from .process import NoAnswer, judged
from .trial import Verdict

logger = logging.getLogger(__name__)

# Seconds after which no further kernel is tried; the next load tries the rest. With CUDA, MLX also compiles its own
# kernels here, a second each, which would otherwise delay the first tokens.
SECONDS = {"metal": 10.0, "cuda": 240.0}
_TRIES = 2  # trials of a kernel that ends its process
_FILE, _VERSION, _ENVIRONMENTS = "kernels.json", 1, 8

Judge = Callable[..., Iterable[tuple[Case, Verdict]]]


def prove(
    cases: Iterable[Case], progress: Callable[[int, int], None] | None = None, judge: Judge = judged
) -> dict[Case, Verdict]:
    """Tries every case without a stored verdict, and enables the kernels that are correct and faster.

    Failures cost only speed: a kernel without a verdict is not used.

    Args:
        progress: function that is called with the number of decided cases and the total number.
        judge: replaces the process that tries kernels.

    Returns:
        All verdicts, including the stored ones.
    """
    wanted, environment = list(cases), environment_key()
    remembered = {_key(case): verdict for case, verdict in _entries(recall(_FILE, _VERSION).get(environment))}
    known = {case: remembered[_key(case)] for case in wanted if _key(case) in remembered}
    verdicts = {case: verdict for case, verdict in known.items() if not 0 < verdict.ended < _TRIES}
    missing = [case for case in wanted if case not in verdicts]
    seconds = SECONDS[back_end() or "metal"]
    found: dict[Case, Verdict] = {}
    try:
        for case, verdict in judge(missing, deadline=time.monotonic() + seconds) if missing else ():
            if verdict.ended and case in known:
                verdict = dataclasses.replace(verdict, ended=known[case].ended + 1)
            found[case] = verdict
            if not verdict.used:
                level = logging.INFO if verdict.right else logging.WARNING
                logger.log(level, "the kernel of %s is not used here: %s", name_of(case), verdict.reason)
            if progress is not None:
                progress(len(verdicts) + len(found), len(wanted))
    except NoAnswer as error:
        logger.warning("no kernel could be tried on this machine, so MLX's ops are used: %s", error)
    if len(found) < len(missing):
        logger.info("%d kernels have not been tried in %.0f s; MLX's ops are used", len(missing) - len(found), seconds)
    if found:
        new = {_key(case): dataclasses.asdict(verdict) for case, verdict in found.items()}
        remember(
            _FILE, _VERSION, environment, lambda known: (known if isinstance(known, dict) else {}) | new, _ENVIRONMENTS
        )
    verdicts |= found
    accept(case for case, verdict in verdicts.items() if verdict.used)
    return verdicts


def name_of(case: Case) -> str:
    """Describes a case for people: the op and its sizes."""
    op, *sizes = case
    return f"{op} ({', '.join(str(size) for size in sizes if not str(size).startswith('{'))})"


@cache
def environment_key() -> str:
    """Returns the key of stored verdicts: device, system build, MLX version and the sources of the kernels."""
    device = mx.device_info(mx.default_device())
    digest = hashlib.sha256()
    for file in sorted([*kernel_sources.folder().iterdir(), *Path(kernel_sources.__file__).parent.glob("*.py")]):
        digest.update(file.name.encode() + file.read_bytes())
    system = f"{platform.system()} {os.uname().release} {os.uname().version}"
    names = [str(device.get(name, "")) for name in ("device_name", "architecture")]
    return f"{' '.join(names)}, {system}, mlx {version('mlx')}, kernels {digest.hexdigest()[:16]}"


def _key(case: Case) -> str:
    return json.dumps(case)


def _entries(stored: Any) -> Iterable[tuple[Case, Verdict]]:
    """Returns the verdicts of an entry of the file, without damaged ones."""
    for key, fields in stored.items() if isinstance(stored, dict) else ():
        try:
            yield tuple(json.loads(key)), Verdict(**fields)
        except (TypeError, ValueError):
            logger.debug("%s holds a verdict that cannot be read: %r", _FILE, key)
