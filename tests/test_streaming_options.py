"""Prefetching changes no bit; dropping and swapping change what they say; off is off."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flash_moe import ArgumentError, Model
from flash_moe.experts import opening
from flash_moe.experts.mapped_file import MappedFile, pages_of
from flash_moe.experts.read_queue import Reads
from flash_moe.experts.store import ExpertStore
from flash_moe.nn import decoder, decoder_layer
from flash_moe.nn.expert_choice import ExpertChoice
from flash_moe.nn.prefetch_switch import PrefetchSwitch
from flash_moe.ops import kernel
from flash_moe.ops.experts import experts_for_token

PROMPT = list(b"Memory is small and disks are large, so")
STORES = {
    "mapped": {"expert_io": "mapped"},
    "slots": {"expert_io": "slots"},
    "slots-cached": {"expert_io": "slots", "expert_cache": 20 * 16384},
    "resident": {"expert_io": "resident"},
}
every_store = pytest.mark.parametrize("store", STORES.values(), ids=STORES)


@pytest.fixture(autouse=True)
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """No page is ever in the page cache, reads are made by threads, and slots are few."""

    def residency(self: MappedFile, offset: int, nbytes: int) -> bytearray:
        return bytearray(len(pages_of(offset, nbytes)))

    monkeypatch.setattr(MappedFile, "residency", residency)
    monkeypatch.setattr(opening, "_GROUP_BYTES", 0)
    monkeypatch.setattr("flash_moe.experts.reader.INLINE", -1)


def load(folder: Path, k: int | None = 3, **options: object) -> Model:
    model = Model.load(folder, experts_per_token=k, **options)
    model.tokenizer.eos_token_ids = frozenset()
    return model


def hidden_states(model: Model, tokens: Sequence[int]) -> np.ndarray:
    """Token by token, [T, H]."""
    cache = model._decoder.new_cache()
    return np.concatenate([np.array(model._decoder(mx.array([token]), cache)) for token in tokens])


class Calls:
    """What a store was asked for, in order."""

    def __init__(self, store: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, int, set[int]]] = []
        for name in ("_arrive", "prefetch"):
            monkeypatch.setattr(store, name, self._logged(name, getattr(store, name)))

    def _logged(self, name: str, call):
        def logged(layer: int, experts: Sequence[int]):
            self.calls.append((name, layer, set(experts)))
            return call(layer, experts)

        return logged


class TestPrefetch:
    @every_store
    @pytest.mark.parametrize("form", ["packed_checkpoint", "quantized_checkpoint", "float_checkpoint"])
    def test_no_bit_changes(
        self, form: str, store: dict, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = request.getfixturevalue(form)
        with load(folder, **store) as model:
            expected = hidden_states(model, PROMPT)
        monkeypatch.setattr(PrefetchSwitch, "on", True)
        with load(folder, prefetch=True, **store) as model:
            np.testing.assert_array_equal(hidden_states(model, PROMPT), expected)
            assert model._decoder.prefetcher.counters.tokens == len(PROMPT)

    @every_store
    def test_a_generation_through_its_trial(self, packed_checkpoint: Path, store: dict) -> None:
        with load(packed_checkpoint, **store) as model:
            expected = model.generate(PROMPT, max_tokens=60, temperature=0)
            assert expected.stats.prefetch is None
        with load(packed_checkpoint, prefetch=True, **store) as model:
            found = model.generate(PROMPT, max_tokens=60, temperature=0)
        assert found.tokens == expected.tokens
        stats = found.stats.prefetch
        if store["expert_io"] == "resident":
            assert (stats.decision, stats.tokens, stats.recall, stats.trial) == ("nothing to load", 0, None, None)
        else:
            assert stats.decision in ("on", "off")
            assert stats.tokens >= 16
            assert stats.trial.seconds > 0 and stats.trial.seconds_without > 0
            assert stats.time_saved == pytest.approx(1 - stats.trial.seconds / stats.trial.seconds_without)

    @pytest.mark.parametrize("io", ["mapped", "slots"])
    def test_recall_is_what_the_store_saw(
        self, packed_checkpoint: Path, io: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(PrefetchSwitch, "on", True)
        with load(packed_checkpoint, prefetch=True, expert_io=io) as model:
            log, given_up = Calls(model._store, monkeypatch), list[Reads]()
            cancel = Reads.cancel
            monkeypatch.setattr(Reads, "cancel", lambda reads: cancel(reads) and not given_up.append(reads))
            stats = model.generate(PROMPT[:1], max_tokens=30, temperature=0).stats
            stride = model._store.layouts[0].stride
        predicted: dict[int, set[int]] = {}
        needed = found = unused = 0
        for name, layer, experts in log.calls:
            if name == "prefetch":
                predicted[layer] = experts
            elif layer in predicted:
                guess = predicted.pop(layer)
                needed, found = needed + len(experts), found + len(guess & experts)
                unused += len(guess - experts)
        assert not predicted
        assert needed == 30 * 3 * 3  # tokens, layers but the first, K
        assert 0.3 < found / needed < 1
        assert stats.prefetch.tokens == 30
        assert stats.prefetch.recall == found / needed
        if io == "mapped":  # slots keep what they read, and need not read it again
            not_read = sum(stride - reads.missing for reads in given_up)
            assert stats.prefetch.bytes_unused == unused * stride - not_read
            assert stats.expert_bytes_missing == stats.expert_bytes_requested == 30 * 4 * 3 * stride

    @pytest.mark.parametrize("io", ["mapped", "slots"])
    def test_the_path_of_gpus(self, packed_checkpoint: Path, io: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without tracing, which would need a compiler on the CPU."""
        if kernel.back_end() is not None:
            pytest.skip("taken anyway on a GPU")
        monkeypatch.setattr(mx, "compile", lambda function: function)
        for module in (decoder, decoder_layer):
            monkeypatch.setattr(module, "on_gpu", lambda: True)
        with load(packed_checkpoint, expert_io=io) as model:
            expected = hidden_states(model, PROMPT)
        monkeypatch.setattr(PrefetchSwitch, "on", True)
        with load(packed_checkpoint, prefetch=True, expert_io=io) as model:
            np.testing.assert_array_equal(hidden_states(model, PROMPT), expected)
            assert model._decoder.prefetcher.counters.found > 0


class TestChoice:
    @pytest.mark.parametrize("form", ["packed_checkpoint", "next_checkpoint"])
    def test_what_is_chosen_is_fetched_and_computed(
        self, form: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A layer's output against the sum over the experts that were chosen, in their own order."""
        with load(request.getfixturevalue(form), drop_cold_below=0.3, expert_io="mapped") as model:
            log = Calls(model._store, monkeypatch)
            chosen: list[tuple[np.ndarray, np.ndarray]] = []
            choose = ExpertChoice.__call__

            def remembered(self: ExpertChoice, p: np.ndarray, in_memory: object) -> tuple[np.ndarray, np.ndarray]:
                assert p.sum() == pytest.approx(1, abs=1e-5)
                chosen.append(choose(self, p, in_memory))
                return chosen[-1]

            monkeypatch.setattr(ExpertChoice, "__call__", remembered)
            moe = model._decoder.layers[1].mlp
            rng = np.random.default_rng(0)
            for _ in range(20):
                x, residual = (mx.array(rng.standard_normal((1, 64)).astype(np.float32)) for _ in range(2))
                y = moe(x, residual)
                ids, weights = chosen[-1]
                assert log.calls[-1] == ("_arrive", 1, set(ids.tolist()))
                records = model._store.fetch(1, ids.tolist()).stacked()
                routed = experts_for_token(x, records, mx.array(weights), model._store.layouts[1])
                shared = mx.sigmoid(moe.gates(x)[1]) * moe.shared_expert(x)
                np.testing.assert_allclose(np.array(y), np.array(residual + shared + routed), atol=1e-5)
            assert {len(ids) for ids, _ in chosen} == {1, 2, 3}

    @every_store
    def test_statistics_are_the_sums_over_tokens_and_layers(
        self, packed_checkpoint: Path, store: dict, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        memory = [expert % 2 == 0 for expert in range(16)]
        with load(packed_checkpoint, drop_cold_below=0.3, prefer_cached=0.2, **store) as model:
            resident = model._store.holds_everything
            if not resident:
                monkeypatch.setattr(model._store, "in_memory", lambda layer, experts: [memory[e] for e in experts])
            seen: list[tuple[np.ndarray, np.ndarray]] = []
            choose = ExpertChoice.__call__

            def remembered(self: ExpertChoice, p: np.ndarray, in_memory: object) -> tuple[np.ndarray, np.ndarray]:
                used, weights = choose(self, p, in_memory)
                seen.append((p, used))
                return used, weights

            monkeypatch.setattr(ExpertChoice, "__call__", remembered)
            model.generate(PROMPT, max_tokens=3, temperature=0)  # of which the next statistics know nothing
            seen.clear()
            stats = model.generate(PROMPT[::-1], max_tokens=12, temperature=0).stats
            stride = model._store.layouts[0].stride
        if resident:
            assert (stats.choice.routed, stats.choice.dropped, stats.choice.swapped) == (0, 0, 0)
            return
        dropped = swapped = 0
        mass = lost = 0.0
        for p, used in seen:
            top = np.argsort(-p)[:3]
            dropped += 3 - len(used)
            swapped += len(set(used.tolist()) - set(top.tolist()))
            mass, lost = mass + float(p[top].sum()), lost + float(p[top].sum()) - float(p[used].sum())
        assert dropped > 0 and swapped > 0
        found = stats.choice
        assert (found.routed, found.dropped, found.swapped) == (3 * len(seen), dropped, swapped)
        assert found.router_mass_dropped + found.router_mass_swapped == pytest.approx(lost / mass, abs=1e-6)
        assert found.router_mass_dropped > found.router_mass_swapped > 0
        assert len(seen) == 4 * 11  # layers, tokens but the last
        assert stats.decode_bytes_requested == (3 * len(seen) - dropped) * stride

    def test_the_path_of_gpus(self, packed_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without tracing, which would need a compiler on the CPU."""
        if kernel.back_end() is not None:
            pytest.skip("taken anyway on a GPU")

        def run() -> tuple[np.ndarray, object]:
            with load(packed_checkpoint, drop_cold_below=0.3, prefer_cached=0.2, expert_io="mapped") as model:
                model._store.in_memory = lambda layer, experts: [(layer + e) % 3 == 0 for e in experts]
                return hidden_states(model, PROMPT), model._decoder.choice.counters

        expected, counters = run()
        monkeypatch.setattr(mx, "compile", lambda function: function)
        for module in (decoder, decoder_layer):
            monkeypatch.setattr(module, "on_gpu", lambda: True)
        found, same_counters = run()
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert counters == same_counters and counters.dropped > 0 and counters.swapped > 0

    @pytest.mark.parametrize("io", ["mapped", "slots", "resident"])
    def test_nothing_changes_where_everything_is_in_memory(
        self, packed_checkpoint: Path, io: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(MappedFile, "residency", lambda self, *where: bytearray(b"\1") * len(pages_of(*where)))
        with load(packed_checkpoint, expert_io=io) as model:
            expected = model.generate(PROMPT, max_tokens=40, temperature=0)
        with load(packed_checkpoint, expert_io=io, drop_cold_below=1.0, prefer_cached=1.0) as model:
            found = model.generate(PROMPT, max_tokens=40, temperature=0)
            assert "drop_cold_below=1.0, prefer_cached=1.0" in repr(model)
        assert found.tokens == expected.tokens
        assert (found.stats.choice.dropped, found.stats.choice.swapped) == (0, 0)

    def test_prompts_are_run_exactly(self, packed_checkpoint: Path) -> None:
        with load(packed_checkpoint) as model:
            expected = np.array(model.logits(PROMPT))
        with load(packed_checkpoint, drop_cold_below=1.0, prefer_cached=1.0) as model:
            np.testing.assert_array_equal(np.array(model.logits(PROMPT)), expected)
            assert model._decoder.choice.counters.routed == 0


@every_store
def test_off_is_off(packed_checkpoint: Path, store: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(packed_checkpoint, **store) as model:
        decoder = model._decoder
        assert decoder.prefetcher is None and decoder.choice is None
        assert all(layer.mlp.prefetch is None and layer.mlp.choice is None for layer in decoder.layers)
        asked: list[object] = []
        monkeypatch.setattr(model._store, "in_memory", lambda *arguments: asked.append(arguments))
        log = Calls(model._store, monkeypatch)
        stats = model.generate(PROMPT[:1], max_tokens=5, temperature=0).stats
        assert not asked and not [call for call in log.calls if call[0] == "prefetch"]
        assert (stats.prefetch, stats.choice) == (None, None)
        assert "drop" not in repr(model)


@pytest.mark.parametrize(
    "options", [{"prefetch": "yes"}, {"drop_cold_below": -1}, {"prefer_cached": 2}], ids=lambda o: next(iter(o))
)
def test_bad_options_fail_before_anything_is_loaded(packed_checkpoint: Path, options: dict) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        Model.load(packed_checkpoint, progress=lambda *_: pytest.fail("loading"), **options)
