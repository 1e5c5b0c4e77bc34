"""Models on 2 and 3 ranks: the tokens of one process, and each rank reads its share and nothing else."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import program
import pytest
from random_checkpoint import text_config, write_checkpoint
from ranks import Ranks

from flash_moe.packing.convert import convert

ALL = list(program.WORK)
OWN, KERNELS = {"kernels": False}, {"kernels": True}
CASES: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "mapped": {
            "path": "packed", "options": {"expert_io": "mapped", **OWN}, "prompts": [1, 40, 700],
            "work": ["interleaved", "threads", "continued"],
        },
        "slots": {"path": "packed", "options": {"expert_io": "slots", "experts_per_token": None, **OWN}, "prompts": [1, 40]},
        "resident": {"path": "packed", "options": {"expert_io": "resident", "experts_per_token": 1, **OWN}, "prompts": [40]},
        "shares": {"path": "{rank}of2", "options": {"expert_io": "mapped", "prefetch": True, **OWN}, "prompts": [1, 40]},
        "unmodified": {"path": "float", "options": OWN, "prompts": [40]},
        "kernels of the CPU": {"path": "float", "options": KERNELS, "prompts": [40], "work": ["together"]},
        "mlx-lm": {"path": "qwen3_moe", "options": {}, "prompts": [1, 40], "work": ["continued"]},
    },
    3: {
        "shares of 3": {"path": "{rank}of3", "options": {"expert_io": "slots", **OWN}, "prompts": [1, 40]},
    },
}  # fmt: skip
REFUSED = {
    "K": ([("packed", {}), ("packed", {"experts_per_token": 3})], "rank 1 has experts_per_token 3, rank 0 has 4"),
    "dtype": ([("packed", {}), ("packed", {"dtype": "bfloat16"})], "rank 1 has dtype 'bfloat16', rank 0 has 'float32'"),
    "model": ([("packed", {}), ("float", {})], "rank 1 has model"),
    "share": ([("0of2", {}), ("0of2", {})], "the ranks hold shares 0/2, 0/2, expected each of 2 shares once"),
    "number of shares": ([("0of3", {}), ("1of3", {})], "holds share .*/3 of the experts, but the group has 2 ranks"),
    "folder": ([("packed", {}), ("absent", {})], "rank 1 could not load the model: CheckpointError"),
    "option": ([("packed", {"prefer_cached": 0.1})] * 2, "drop_cold_below and prefer_cached depend on"),
}  # fmt: skip
NAMES = [(size, name) for size, cases in CASES.items() for name in cases]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float checkpoint of 32 experts and top-10, packed, packed as shares; and one of another family."""
    folder = tmp_path_factory.mktemp("machines")
    source = write_checkpoint(folder / "float", text_config(num_experts=32, num_experts_per_tok=10))
    packed = folder / "packed"
    convert(source, packed, group_size=32, rounding="nearest", progress=False)
    for name, share in {f"{i}of{n}": f"{i}/{n}" for n in CASES for i in range(n)}.items():
        convert(packed, folder / name, share=share, progress=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(Path(__file__).parents[1] / "adapted"))
        from family_checkpoints import write

        write("qwen3_moe", folder / "qwen3_moe")
    for file in source.glob("*token*"):
        (folder / "qwen3_moe" / file.name).write_bytes(file.read_bytes())
    return folder


def cases(models: Path, size: int) -> dict[str, dict[str, Any]]:
    found = {}
    for name, case in CASES[size].items():
        if case["options"] is not KERNELS or importlib.util.find_spec("numba") is not None:
            found[name] = {"work": []} | case | {"path": str(models / case["path"])}
    return found


def refusals(models: Path) -> dict[str, dict[str, Any]]:
    """What 2 ranks cannot load; before the other cases, which the group must still be good for."""
    return {
        f"refused {name}": {"refused": [(str(models / path), options) for path, options in by_rank]}
        for name, (by_rank, _) in REFUSED.items()
    }


def launched(folder: Path, size: int, wanted: dict[str, dict[str, Any]], seconds: float = 900) -> dict[str, list[Any]]:
    """What each rank found, by case."""
    file = folder / "cases.json"
    file.write_text(json.dumps(wanted))
    with Ranks(folder, size, [program.__file__, str(file)]) as ranks:
        assert ranks.wait(seconds) == [0] * size, ranks.said()
    by_rank = [json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(size)]
    return {name: [of_rank[name] for of_rank in by_rank] for name in by_rank[0]}


@pytest.fixture(scope="module")
def found(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """What each rank found, by case."""
    results = {}
    for size in CASES:
        wanted = (refusals(models) if size == 2 else {}) | cases(models, size)
        by_case = launched(tmp_path_factory.mktemp(f"ranks-{size}"), size, wanted)
        results |= {(size, name): by_rank for name, by_rank in by_case.items()}
    return results


@pytest.mark.parametrize(("size", "name"), NAMES)
def test_as_one_process(size: int, name: str, models: Path, found: dict[tuple[int, str], list[dict[str, Any]]]) -> None:
    if (size, name) not in found:
        pytest.skip("Numba is not installed")
    case = cases(models, size)[name]
    if "{rank}" in case["path"]:
        case["path"] = str(models / "packed")
    first, *others = found[size, name]
    check(first, program.run(case, 0, None), exact=name == "mlx-lm")
    assert [other["rank"] for other in others] == list(range(1, size))
    assert all(other["alone"].count("call model.follow() here") == 2 for other in others)


def check(first: dict[str, Any], expected: dict[str, Any], exact: bool = False) -> None:
    """Rank 0 found what one process finds."""
    for what in set(expected) - {"rank", "logits", "bytes_requested", "bytes_loaded"}:
        assert first[what] == expected[what], what
    different = {token for tokens in first["greedy"] for token in tokens}
    assert len(different) > 4, "a degenerate reply would hide differences"
    difference = np.abs(np.array(first["logits"]) - np.array(expected["logits"])).max()
    assert difference == 0 if exact else difference < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_everything_with_everything(size: int, models: Path, tmp_path: Path) -> None:
    """Every store and form, at every K, with all prompts and all work; by MLX's ops and by the kernels of the CPU."""
    pytest.importorskip("numba")
    share = "{rank}of" + str(size)
    stores = {"mapped": "packed", "slots": "packed", "resident": "packed", "shares": share, "float": "float"}
    wanted = {}
    for number, (store, path) in enumerate(stores.items()):
        for k in (1, 4, 10):
            io = {"shares": "mapped", "float": "slots"}.get(store, store)
            options = {"expert_io": io, "experts_per_token": k, "kernels": (number + k) % 2 == 0}
            case = {"path": str(models / path), "options": options, "prompts": [1, 40, 700], "work": ALL}
            wanted[f"{store}, K={k}"] = case
    found = launched(tmp_path, size, wanted, 2000)
    for name, case in wanted.items():
        check(found[name][0], program.run(case | {"path": case["path"].replace(share, "packed")}, 0, None))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_all_ranks(name: str, found: dict[tuple[int, str], list[dict[str, Any]]]) -> None:
    errors = found[2, f"refused {name}"]
    assert {error["error"] for error in errors} <= {"PeerError", "ArgumentError", "CheckpointError"}
    assert all(re.search(REFUSED[name][1], error["message"]) for error in errors if name != "folder"), errors
    assert re.search(REFUSED[name][1], errors[0]["message"]), errors


@pytest.mark.parametrize(("size", "name"), [key for key in NAMES if key[1] != "mlx-lm"])
def test_each_rank_reads_its_share(
    size: int, name: str, models: Path, found: dict[tuple[int, str], list[dict[str, Any]]]
) -> None:
    if (size, name) not in found:
        pytest.skip("Numba is not installed")
    by_rank, case = found[size, name], cases(models, size)[name]
    requested = [of_rank["bytes_requested"] for of_rank in by_rank]
    assert min(requested) > 0.7 * sum(requested) / size
    if case["options"].get("expert_io") == "resident":
        whole = sum(file.stat().st_size for file in (models / "packed").glob("experts-*"))
        assert whole * 0.95 < sum(of_rank["bytes_loaded"] for of_rank in by_rank) < whole
        assert max(of_rank["bytes_loaded"] for of_rank in by_rank) < 1.1 * whole / size
