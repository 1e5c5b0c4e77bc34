"""Kernels prove themselves before a model uses them; the emulator is the device, in a process of its own as on a GPU."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import typer
from emulator import build
from random_checkpoint import text_config, write_checkpoint

from flash_moe import Model, loading
from flash_moe.cli import selftest
from flash_moe.ops import dispatch, kernel_sources
from flash_moe.ops.dispatch import Case
from flash_moe.ops.kernel import Kernel
from flash_moe.packing.convert import convert
from flash_moe.proofs import prover
from flash_moe.proofs.process import CASE_SECONDS, COMPILERS, NoAnswer, Worker, judged
from flash_moe.proofs.prover import prove
from flash_moe.proofs.trial import Verdict

MAIN = (
    f"import json, sys; sys.path[:] = [{str(Path(__file__).parent)!r}, *json.loads(sys.argv[1])]; import emulated_child"
)
RIGHT: Case = ("add_rms_norm", 100, "float32")
OTHER: Case = ("router", 16, 4, 1, 0, "float32")
TOKENS = [80, 72, 101]

pytestmark = pytest.mark.emulator


@pytest.fixture(autouse=True)
def nothing_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache folder, no accepted kernels, and processes that run the emulator."""
    monkeypatch.setenv("FLASH_MOE_EMULATOR_CACHE", str(build.cache_folder()))  # stays where it is
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(dispatch, "_accepted", set())
    monkeypatch.setattr(loading, "prove", partial(prove, judge=partial(judged, main=MAIN)))
    monkeypatch.setitem(prover.SECONDS, "metal", 120.0)  # the emulator compiles slowly
    monkeypatch.setitem(CASE_SECONDS, "metal", 60.0)
    monkeypatch.setattr(mx, "compile", lambda function: function)
    prover.environment_key.cache_clear()
    yield
    prover.environment_key.cache_clear()


def asked(cases: list[Case], answers: list[Case]) -> Callable[..., Iterator[tuple[Case, Verdict]]]:
    def judge(missing: list[Case], deadline: float) -> Iterator[tuple[Case, Verdict]]:
        cases.extend(missing)
        for case in missing:
            if case in answers:
                yield case, Verdict(True, True)

    return judge


def test_verdicts_are_remembered() -> None:
    first, second = [], []
    prove([RIGHT, OTHER], judge=asked(first, [RIGHT, OTHER]))
    dispatch._accepted.clear()
    verdicts = prove([RIGHT, OTHER], judge=asked(second, []))
    assert first == [RIGHT, OTHER]
    assert second == []
    assert all(verdict.used for verdict in verdicts.values())
    assert dispatch._accepted == {RIGHT, OTHER}


def test_what_time_was_too_short_for_is_tried_with_the_next_model() -> None:
    cases: list[Case] = []
    assert OTHER not in prove([RIGHT, OTHER], judge=asked([], [RIGHT]))
    assert dispatch._accepted == {RIGHT}
    prove([RIGHT, OTHER], judge=asked(cases, [OTHER]))
    assert cases == [OTHER]


@pytest.mark.parametrize("what", ["kernel source", "system", "damaged file"])
def test_a_changed_machine_tries_anew(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prove([RIGHT], judge=asked([], [RIGHT]))
    if what == "kernel source":
        folder = copied_kernels(tmp_path, "add_rms_norm.metal", "metal", "metal")
        (folder / "add_rms_norm.metal").write_text("// changed")
        monkeypatch.setattr(kernel_sources, "folder", lambda: folder)
    elif what == "system":
        monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Darwin", "", "26.1", "xnu-2", "arm64")))
    else:
        (tmp_path / "cache" / "flash_moe" / "kernels.json").write_text('{"format": 1, "entries": [')
    prover.environment_key.cache_clear()
    cases: list[Case] = []
    prove([RIGHT], judge=asked(cases, [RIGHT]))
    assert cases == [RIGHT]


@pytest.mark.parametrize("fault, reason", [("crash", "driver's last words"), ("hang", "no answer within 1 s")])
def test_a_kernel_that_ends_or_stops_the_process_is_off_and_the_others_are_tried(
    fault: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_FAULT", f"router:{fault}")
    monkeypatch.setitem(CASE_SECONDS, "metal", 1.0)
    verdicts = {}
    for case, verdict in judged([OTHER, RIGHT], main=MAIN):
        verdicts[case] = verdict
        monkeypatch.setitem(CASE_SECONDS, "metal", 30.0)  # the emulator compiles slowly
    assert not verdicts[OTHER].right
    assert reason in verdicts[OTHER].reason
    assert verdicts[RIGHT].used


# Notes what it is asked, and when. Beside others, "crash" ends the process and "wrong" is wrong.
SEVERAL = """
import json, os, sys, time
notes = open(os.environ["TEST_NOTES"], "a", buffering=1)
print("ready", flush=True)
prepared = []
for line in sys.stdin:
    case = json.loads(line)
    if case is not None:
        prepared.append(case[0])
        notes.write(f"prepare {case[0]} {os.getpid()}\\n")
        time.sleep(0.05)
        beside = len({line.split()[2] for line in open(os.environ["TEST_NOTES"]).read().splitlines()}) < 3
        if beside and case[0] == "crash":
            sys.exit(3)
        print("prepared", flush=True)
    else:
        name = prepared.pop(0)
        notes.write(f"time {name} {os.getpid()}\\n")
        right = not (beside and name == "wrong")
        print(json.dumps({"right": right, "used": right}), flush=True)
"""


def test_processes_prepare_side_by_side_and_are_timed_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COMPILERS, "metal", 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("TEST_NOTES", str(tmp_path / "notes"))
    cases: list[Case] = [("a", 1), ("b", 1), ("c", 1)]
    verdicts = dict(judged(cases, main=SEVERAL))
    assert verdicts.keys() == set(cases)
    assert all(verdict.used for verdict in verdicts.values())
    notes = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    assert [what for what, *_ in notes] == ["prepare"] * 3 + ["time"] * 3
    assert len({process for *_, process in notes}) == 2


@pytest.mark.parametrize("fault", ["crash", "wrong"])
def test_what_goes_wrong_beside_others_is_tried_alone(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COMPILERS, "metal", 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("TEST_NOTES", str(tmp_path / "notes"))
    cases: list[Case] = [(fault, 1), ("a", 1), ("b", 1)]
    verdicts = dict(judged(cases, main=SEVERAL))
    assert verdicts.keys() == set(cases)
    assert all(verdict.used for verdict in verdicts.values())
    notes = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    assert len([name for _, name, _ in notes if name == fault]) == (3 if fault == "crash" else 4)


def test_a_kernel_that_ended_its_process_is_tried_once_more() -> None:
    tried: list[Case] = []

    def judge(missing: list[Case], deadline: float) -> Iterator[tuple[Case, Verdict]]:
        for case in missing:
            tried.append(case)
            yield case, Verdict(False, False, "no answer", ended=1)

    for _ in range(4):
        assert not prove([RIGHT], judge=judge)[RIGHT].used
    assert tried == [RIGHT] * 2
    assert not dispatch._accepted


def test_a_process_that_cannot_start_costs_only_the_kernels(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(NoAnswer, match=r"ended with code 1: .*no_such_module"):
        Worker("import no_such_module")
    assert prove([RIGHT], judge=partial(judged, main="import no_such_module")) == {}
    assert "no kernel could be tried" in caplog.text
    assert not dispatch._accepted


def copied_kernels(tmp_path: Path, name: str, old: str, new: str) -> Path:
    """The kernels' sources with one change."""
    folder = tmp_path / "kernels"
    if not folder.exists():
        shutil.copytree(kernel_sources.folder(), folder)
    text = (folder / name).read_text(encoding="utf-8")
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("proofs")
    text = text_config(num_hidden_layers=2, full_attention_interval=2, num_experts=8, head_dim=32)
    convert(write_checkpoint(folder / "float", text), folder / "packed", bits=4, group_size=32)
    return folder / "packed"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the kernels that have been launched in this process."""
    names: set[str] = set()
    launch = Kernel.__call__

    def noted(self: Kernel, *arguments: object, **options: object) -> object:
        names.add(self.name)
        return launch(self, *arguments, **options)

    monkeypatch.setattr(Kernel, "__call__", noted)
    return names


def logits(folder: Path, kernels: bool | None, expert_io: str = "slots") -> np.ndarray:
    with Model.load(folder, experts_per_token=None, dtype="float32", kernels=kernels, expert_io=expert_io) as model:
        cache = model._decoder.new_cache()
        rows = [model._decoder.logits(model._decoder(mx.array([token]), cache))[0] for token in TOKENS]
        return np.array(mx.stack(rows))


ALL = {
    "quantized_matvec", "expert_gate_up", "expert_down", "delta_net_step", "router", "add_rms_norm", "qk_norm_rope",
    "decode_attention", "decode_attention_combine",
}  # fmt: skip


def test_a_model_uses_the_kernels_that_proved_themselves(
    checkpoint: Path, launched: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    plain = logits(checkpoint, False)
    assert launched == set()
    with caplog.at_level(logging.INFO, "flash_moe.proofs"):
        np.testing.assert_allclose(logits(checkpoint, None), plain, atol=1e-4)
    assert launched == ALL
    assert "not used" not in caplog.text


BROKEN = {
    "it does not compile": ("router.metal", "metal::", "metal::no_such_", "router"),
    "a factor is missing": ("expert_down.metal", "fma(weights[", "fma(0.5f * weights[", "expert_gate_up"),
}


@pytest.mark.parametrize("how", [pytest.param("it does not compile", marks=pytest.mark.slow), "a factor is missing"])
def test_a_broken_kernel_is_rejected_and_the_tokens_stay_right(
    how: str, checkpoint: Path, tmp_path: Path, launched: set[str], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    file, old, new, gone = BROKEN[how]
    folder = copied_kernels(tmp_path, file, old, new)
    monkeypatch.setenv("TEST_KERNELS", str(folder))
    plain = logits(checkpoint, False)
    with caplog.at_level(logging.INFO, "flash_moe.proofs"):
        np.testing.assert_allclose(logits(checkpoint, None), plain, atol=1e-4)
    assert gone not in launched
    assert launched >= {"quantized_matvec", "delta_net_step", "add_rms_norm"}
    rejected = [record for record in caplog.records if "is not used here" in record.message]
    assert {record.levelname for record in rejected} == {"WARNING"}
    assert len(rejected) == (2 if gone == "router" else 1)  # with the shared expert's gate and without


def test_a_kernel_that_lies_only_at_some_shapes_is_caught_at_the_models(
    checkpoint: Path, tmp_path: Path, launched: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = max(json.loads((checkpoint / "config.json").read_text())["text_config"]["vocab_size"], 1)
    folder = copied_kernels(tmp_path, "quantized_matvec.metal", "(lane == 0 &&", f"(lane == 0 && OUT < {wide} &&")
    monkeypatch.setenv("TEST_KERNELS", str(folder))
    plain = logits(checkpoint, False)
    np.testing.assert_allclose(logits(checkpoint, None), plain, atol=1e-4)
    cases = {case for case in dispatch._accepted if case[0] == "quantized_matvec"}
    assert cases
    assert all(int(case[3]) < wide for case in cases)


def test_the_variable_decides(checkpoint: Path, launched: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "prove", lambda *_: pytest.fail("nothing is to be proven"))
    monkeypatch.setenv("FLASH_MOE_KERNELS", "off")
    logits(checkpoint, True)
    assert launched == set()
    monkeypatch.setenv("FLASH_MOE_KERNELS", "on")
    logits(checkpoint, None)
    assert launched == ALL
    monkeypatch.setenv("FLASH_MOE_KERNELS", "perhaps")
    with pytest.raises(ValueError, match="'perhaps', expected on, off or auto"):
        logits(checkpoint, None)


def test_the_selftest_prints_every_trial(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flash_moe.proofs.process.judged", partial(judged, main=MAIN))
    monkeypatch.setattr("flash_moe.proofs.standard.standard_cases", lambda: [RIGHT, OTHER])
    selftest.command()
    out = capsys.readouterr().out
    assert out.count("2.00x ok") == 2
    assert "2 cases: 0 wrong, 0 right but no faster than MLX, 2 used" in out
    monkeypatch.setenv("TEST_FAULT", "router:crash")
    with pytest.raises(typer.Exit):
        selftest.command(str(checkpoint))
    out = capsys.readouterr().out
    assert "FAIL: its process ended with code -11: a driver's last words" in out
    assert "2 wrong" in out  # the router with and without the shared expert's gate
