"""The separate process that tries kernels, so that a crash or a hang does not affect the user's program.

:class:`Worker` starts the process, sends it cases, and ends it if it does not answer. The process runs :func:`main`,
which reads one case per line from its standard input, as JSON, compares and compiles it, and answers with one line. If
it reads null instead, it times the case that has waited longest, and answers with the verdict.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from functools import partial
from typing import Any, TextIO

import mlx.core as mx

from ..mlx_cache import clear_cache
from ..ops.dispatch import Case
from ..ops.kernel import back_end
from .trial import Verdict

START_SECONDS = 30.0  # seconds for a process to load MLX and start the GPU, with a cold disk
CASE_SECONDS = {
    "metal": 8.0,
    "cuda": 90.0,
}  # seconds to compile, run and time the kernels of a case, including those of MLX
# Processes that compile in parallel, before each times its kernels in turn. NVRTC uses one core and takes seconds per
# kernel and process; Apple's compiler takes a fraction of a second.
COMPILERS = {"metal": 1, "cuda": 8}
_MAIN = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from flash_moe.proofs.process import main; main()"


class NoAnswer(Exception):
    """The process ended or was ended, with the reason."""


class Worker:
    """A process that tries kernels.

    Args:
        main: the program to run. Its first argument is the module path of this process.

    Raises:
        NoAnswer: the process cannot be started.
    """

    def __init__(self, main: str = _MAIN) -> None:
        if not sys.executable:
            raise NoAnswer("there is no Python interpreter to start")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._rest = b""
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", main, json.dumps(sys.path)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
                env=os.environ | {"MLX_ENABLE_TF32": "0"},  # so that references are computed in float32
            )  # fmt: skip
        except OSError as error:
            self._errors.close()
            raise NoAnswer(f"it cannot be started: {error}") from error
        try:
            self._line(START_SECONDS)
        except BaseException:
            self.close()
            raise

    def judge(self, case: Case, seconds: float) -> Verdict:
        """Returns the verdict of the process on a case. Arguments and errors are those of :meth:`prepare`."""
        self.prepare(case, seconds)
        return self.time(seconds)

    def prepare(self, case: Case, seconds: float) -> None:
        """Makes the process compare a case with its reference and compile the functions to time.

        Raises:
            NoAnswer: the process crashed or did not answer in this time. It has ended.
        """
        self._ask(case, seconds)

    def time(self, seconds: float) -> Verdict:
        """Times the case that was prepared first, and returns its verdict. Raises NoAnswer as :meth:`prepare` does."""
        answer: dict[str, Any] = json.loads(self._ask(None, seconds))
        return Verdict(**answer)

    def _ask(self, what: Case | None, seconds: float) -> bytes:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the cause appears during the wait for its answer
        return self._line(seconds)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            assert file is not None
            with suppress(BrokenPipeError):
                file.close()

    def _line(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        end, out = time.monotonic() + seconds, self._process.stdout.fileno()
        while b"\n" not in self._rest:
            if not select.select([out], [], [], max(0.0, end - time.monotonic()))[0]:
                self.close()
                raise NoAnswer(f"no answer within {seconds:.0f} s")
            if not (data := os.read(out, 1 << 16)):
                code = self._process.wait()
                raise NoAnswer(f"its process ended with code {code}: {self._last_words()}")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _last_words(self, most: int = 300) -> str:
        self._errors.seek(0)
        text = " ".join(self._errors.read().decode(errors="replace").split())
        return text[-most:] or "it said nothing"


def judged(cases: Sequence[Case], main: str = _MAIN, deadline: float = float("inf")) -> Iterator[tuple[Case, Verdict]]:
    """Yields each case and its verdict. If a kernel ends the process, a new process tries the next ones.

    If compiling takes long, several processes compile in parallel, and time their kernels one after the other. Cases
    that fail there, for instance because memory was too small for all processes, are tried again alone.

    Args:
        deadline: time of :func:`time.monotonic` after which no further case is tried.

    Raises:
        NoAnswer: no process can be started.
    """
    seconds, left = CASE_SECONDS[back_end() or "metal"], list(cases)
    for case, verdict in _judged_together(cases, main, deadline, seconds):
        left.remove(case)
        yield case, verdict
    worker: Worker | None = None
    try:
        for case in left:
            if time.monotonic() > deadline:
                return
            worker = worker or Worker(main)
            try:
                yield case, worker.judge(case, seconds)
            except NoAnswer as error:
                worker.close()
                worker = None
                yield case, Verdict(False, False, str(error), ended=1)
    finally:
        if worker is not None:
            worker.close()


def _judged_together(
    cases: Sequence[Case], main: str, deadline: float, seconds: float
) -> Iterator[tuple[Case, Verdict]]:
    """Yields the verdicts on correct kernels from several processes; no verdicts if one process is enough."""
    count = min(COMPILERS[back_end() or "metal"], os.cpu_count() or 1, len(cases))
    if count < 2:
        return
    # Products compile fastest, so they come last, and the processes end at about the same time.
    waiting, now = iter(sorted(cases, key=lambda case: case[0] == "quantized_matvec")), time.monotonic()
    end = now + (deadline - now) / 2  # one deadline for all threads
    workers: dict[Worker, list[Case]] = {}

    def prepare_some(_: int) -> None:
        with suppress(NoAnswer):  # a separate trial will find the reason
            worker = Worker(main)
            prepared = workers[worker] = []
            try:
                for case in waiting:
                    if (rest := end - time.monotonic()) <= 0:
                        break
                    worker.prepare(case, min(rest, seconds))
                    prepared.append(case)
            except NoAnswer:
                prepared.clear()
                raise

    try:
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(prepare_some, range(count)))
        for worker, prepared in workers.items():
            with suppress(NoAnswer):
                for case in prepared:
                    verdict = worker.time(seconds)
                    if verdict.right:
                        yield case, verdict
    finally:
        for worker in workers:
            worker.close()


def main() -> None:
    """Answers cases until the end of the input."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # keeps output of compilers out of the answers
    from .trial import prepare
    from .trials import trial_of

    mx.random.seed(int.from_bytes(os.urandom(4), "little"))
    mx.eval(mx.ones(1) + 1)  # starts the GPU
    _say(answers, "ready")
    prepared: deque[Callable[[], Verdict]] = deque()
    for line in sys.stdin:
        case = json.loads(line)
        try:
            if case is not None:
                prepared.append(prepare(trial_of(case)))
            else:
                verdict = prepared.popleft()()
        except Exception as error:  # any error of the compiler or the GPU
            verdict = Verdict(False, False, f"{type(error).__name__}: {_first_lines(str(error))}")
            if case is not None:
                prepared.append(partial(copy, verdict))
        _say(answers, "prepared" if case is not None else json.dumps(dataclasses.asdict(verdict)))
        clear_cache()


def _say(answers: TextIO, line: str) -> None:
    answers.write(line + "\n")
    answers.flush()


def _first_lines(message: str, most: int = 300) -> str:
    return " ".join(message.split())[:most]
