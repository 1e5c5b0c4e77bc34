"""The one command that makes the demo model: interrupted, continued, finished elsewhere."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: training the demo model is for developers")
pytest.importorskip("transformers", reason="transformers is not installed: training the demo model is for developers")

from demo_model import __main__ as command  # noqa: E402
from demo_model import export, exporter, metrics, model, prepare, tokenizer, train  # noqa: E402
from demo_model.log import LOGGER  # noqa: E402
from demo_runs import TOKENS, options, tiny, write_shard  # noqa: E402
from random_checkpoint import write_tokenizer  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.set_num_threads(1)
    monkeypatch.setattr(command, "LONGEST_ANSWER", 4)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "unused")
    architecture = tiny(vocab_size=4096)
    monkeypatch.setattr(train.model, "config", lambda: architecture)
    yield
    for handler in LOGGER.handlers[:]:
        LOGGER.removeHandler(handler)
        handler.close()


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.write(tokenizer.train(conversations=200), folder)
    return folder


def words(out: Path, *more: str) -> list[str]:
    data = ["--shards", "2", "--conversations", "60", "--processes", "1", "--limit", "2", "--pool", "1"]
    return [str(out), *data, "--tokens", str(TOKENS), "--device", "cpu", "--eval-batches", "1", *more]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two sets of weights are equal in bfloat16."""
    return all(torch.equal(one[name].bfloat16(), other[name].bfloat16()) for name in {**one, **other})


@pytest.mark.slow
def test_the_command_continues_after_every_interruption(
    tmp_path: Path, small_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command.adopt_tokenizer(small_tokenizer, out / "tokenizer")
    step = train.Trainer.step

    def interrupted(self: train.Trainer, batch: Any) -> Any:
        if self.progress.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(self, batch)

    monkeypatch.setattr(train.Trainer, "step", interrupted)
    with pytest.raises(SystemExit, match="the same command continues"):
        command.main(words(out, "--steps", "4"))
    saved = torch.load(out / "run" / "checkpoint.pt", weights_only=True)
    assert saved["progress"]["step"] == 2
    assert same(export.load(out / "export").state_dict(), saved["model"])
    assert not (out / "score.json").exists()

    monkeypatch.setattr(train.Trainer, "step", step)
    command.main(words(out, "--steps", "4"))
    assert torch.load(out / "run" / "checkpoint.pt", weights_only=True)["progress"]["step"] == 4
    found = json.loads((out / "score.json").read_text())
    assert (found["experts_per_token"], found["prompts"]) == (10, 2)

    made = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "log.txt"}
    command.main(words(out, "--steps", "4"))
    assert made == {path: path.stat().st_mtime_ns for path in made}

    (out / "export").rename(tmp_path / "elsewhere")
    command.main(words(out, "--steps", "4"))
    assert same(export.load(out / "export").state_dict(), export.load(tmp_path / "elsewhere").state_dict())
    log = (out / "log.txt").read_text()
    for said in ("2 of 2 shards", "stopped", "continuing", "exported step 4", "held out: loss", "finished before"):
        assert said in log

    other = tmp_path / "other"
    command.main(words(other, "--continue-from", str(tmp_path / "elsewhere"), "--steps", "2", "--seed", "1"))
    assert (other / "score.json").exists()
    assert f"starting with the weights of {tmp_path / 'elsewhere'}" in (other / "log.txt").read_text()
    assert (other / "tokenizer" / "tokenizer.json").read_bytes() == (out / "export" / "tokenizer.json").read_bytes()
    shards = [(folder / "shards" / "shard-00000.npz").read_bytes() for folder in (out, other)]
    assert shards[0] != shards[1]


@pytest.mark.slow
def test_weights_alone_are_enough_to_cool_down(tmp_path: Path, small_tokenizer: Path) -> None:
    (tmp_path / "data").mkdir()
    for number in range(2):
        write_shard(tmp_path / "data", number)
    exporting = ["--export", str(tmp_path / "export"), "--tokenizer", str(small_tokenizer)]
    cut = train.Trainer(options(tmp_path, "--out", str(tmp_path / "cut"), "--steps", "6", "--decay", "0", *exporting))
    cut.run()

    fixed = ["--continue-from", str(tmp_path / "export"), "--steps", "6"]
    cooled = train.Trainer(options(tmp_path, "--out", str(tmp_path / "cooled"), *fixed))
    assert cooled.options.decay == 1 and train.arguments([*fixed, "--data", "d", "--out", "o"]).warmup == 30
    assert same(cooled.model.state_dict(), cut.model.state_dict())
    assert not any(optimizer.state for optimizer in cooled.optimizers)
    before = metrics.evaluate(cooled.network, cooled.held_out, cooled.device)["loss"]
    cooled.run()
    lines = [json.loads(line) for line in (tmp_path / "cooled" / "log.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates[0] < rates[1] and rates[1:] == sorted(rates[1:], reverse=True) and rates[-1] < 0.2 * max(rates)
    assert metrics.evaluate(cooled.network, cooled.held_out, cooled.device)["loss"] < before - 0.1


def test_the_tokenizer_comes_with_the_weights(tmp_path: Path, small_tokenizer: Path) -> None:
    run = tmp_path / "out" / "run"
    command.adopt_tokenizer(small_tokenizer, tmp_path / "out" / "tokenizer")
    command.adopt_tokenizer(run / "checkpoint.pt", tmp_path / "other" / "tokenizer")
    ours, theirs = (tmp_path / out / "tokenizer" / "tokenizer.json" for out in ("out", "other"))
    assert ours.read_bytes() == theirs.read_bytes()
    with pytest.raises(FileNotFoundError, match="the tokenizer they were trained with"):
        command.adopt_tokenizer(tmp_path, tmp_path / "third" / "tokenizer")


def test_an_export_replaces_the_one_before_and_its_error_is_raised(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer")
    keeper = exporter.Exporter(tmp_path / "export", tmp_path / "tokenizer")
    models = [model.create(model.config(), seed) for seed in range(2)]
    for one in models:
        expected = {name: value.clone() for name, value in one.state_dict().items()}
        keeper.start(one, "a model")
        with torch.no_grad():
            one.model.norm.weight.fill_(7)  # training goes on
        keeper.finish()
        assert same(export.load(keeper.folder).state_dict(), expected)
    assert same(export.load(tmp_path / "export.old").state_dict(), model.create(model.config(), 0).state_dict())
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    keeper.start(models[0], "a model without a tokenizer")
    with pytest.raises(FileNotFoundError, match=r"lacks tokenizer\.json"):
        keeper.finish()
    assert same(export.load(keeper.folder).state_dict(), model.create(model.config(), 1).state_dict())


@pytest.mark.filterwarnings("ignore")
def test_an_incomplete_export_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer")
    export.export(model.create(model.config(), 0), tmp_path / "export", tmp_path / "tokenizer")
    (weights,) = (tmp_path / "export").glob("*.safetensors")
    kept = load_file(weights)
    del kept["model.norm.weight"]
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, model\.norm\.weight first"):
        export.load(tmp_path / "export")


def test_data_that_cannot_be_made_ends_the_command(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "tokenizer").mkdir()
    data = prepare.Preparation(tmp_path, seed=0, count=1, conversations=1, processes=1)
    with data, pytest.raises(RuntimeError, match="ended with 1 before it wrote"):
        data.wait_for(prepare.held_out(tmp_path))
    assert "data was not complete" in caplog.text


def test_an_export_needs_a_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.arguments(["--data", "d", "--out", "o", "--export", "e"])
    assert "--export needs --tokenizer" in capsys.readouterr().err
