"""The demo model's training data on its way to the GPU: shards, batches, and where a run continues."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed: training the demo model is for developers")
pytest.importorskip("transformers", reason="transformers is not installed: training the demo model is for developers")

from demo_model import batches
from demo_runs import TOKENS, write_shard


def test_batches_hold_every_conversation_once_with_shifted_targets(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, 0, conversations=200, longest=1024)
    conversations = batches.Conversations.load([shard])
    chosen = batches.plan(conversations, TOKENS, np.random.default_rng(0))
    assert sorted(np.concatenate(chosen)) == list(range(200))
    for rows in chosen:
        batch = batches.assemble(conversations, rows, TOKENS)
        assert batch.ids.size == TOKENS
        for i, ids, targets, kinds in zip(rows, *batch, strict=False):
            start, end = conversations.offsets[i : i + 2]
            n = end - start
            assert np.array_equal(ids[:n], conversations.ids[start:end])
            assert np.array_equal(targets[: n - 1], ids[1:n])
            assert np.array_equal(kinds[: n - 1], 1 + conversations.mask[start + 1 : end])
            assert not kinds[n - 1 :].any()


def test_stream_continues_anywhere_and_visits_all_shards(tmp_path: Path) -> None:
    for number in range(3):
        write_shard(tmp_path, number)
    stream = batches.ShardStream(tmp_path, TOKENS, seed=5, pool=2)
    walk = stream.batches(batches.Position())
    seen = [next(walk) for _ in range(12)]
    for cut in (2, 5):
        again = stream.batches(seen[cut][1])
        for batch, position in seen[cut + 1 :]:
            repeated, same = next(again)
            assert same == position
            assert all(np.array_equal(a, b) for a, b in zip(batch, repeated, strict=True))
    assert {path.name for path in stream._paths(0, None) + stream._paths(1, None)} == {
        f"shard-0000{i}.npz" for i in range(3)
    }


def test_late_and_half_written_shards_are_replaced_by_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write_shard(tmp_path, 0)
    (tmp_path / "shard-00001.npz").write_bytes((tmp_path / "shard-00000.npz").read_bytes()[:500])
    stream = batches.ShardStream(tmp_path, TOKENS, seed=0, shards=3, pool=2, patience=0.3)
    next(stream.batches(batches.Position()))
    said = caplog.text
    assert "waiting for" in said and "shard-00001.npz did not come" in said and "shard-00000.npz instead" in said


def test_wrong_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no shard"):
        batches.ShardStream(tmp_path, TOKENS, seed=0)
    long = batches.Conversations.load([write_shard(tmp_path, 0, longest=3000)])
    with pytest.raises(ValueError, match="at most 1024"):
        batches.plan(long, TOKENS, np.random.default_rng(0))
    with pytest.raises(ValueError, match="multiple of 1024"):
        batches.plan(long, 1000, np.random.default_rng(0))
