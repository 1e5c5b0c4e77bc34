"""The parts of a group that need no second process."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_moe import ArgumentError, PeerError
from flash_moe.machines import joining
from flash_moe.machines.following import FollowingNetwork
from flash_moe.machines.interrupts import held_interrupts, ignored_interrupts
from flash_moe.machines.joining import Member, _accepted, find_group
from flash_moe.machines.link import Link
from flash_moe.machines.peers import Peers, _State
from flash_moe.machines.sums import Sums
from flash_moe.mlx_cache import clear_cache, communicating
from flash_moe.share import Share


def connections() -> tuple[Connection, Connection]:
    """The ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = socket.create_connection(listener.getsockname()[:2])
        return Connection(here.detach()), Connection(listener.accept()[0].detach())


def waited_for(condition: Any) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


def test_links_carry_json_and_notice_the_end() -> None:
    one, other = connections()
    received, lost = [], threading.Event()
    first = Link(one, lambda message: None, lambda: None, lambda: ["beat", 1], 60)
    second = Link(other, received.append, lost.set, lambda: ["beat", 2], 60)
    first.send(["run", 5, [1, 2, 3]])
    assert waited_for(lambda: ["run", 5, [1, 2, 3]] in received)
    assert received[0] == ["beat", 1]
    first.close()
    assert lost.wait(10)
    second.close()


def test_what_is_no_json_ends_a_link() -> None:
    one, other = connections()
    received, lost = [], threading.Event()
    link = Link(other, received.append, lost.set, lambda: ["beat"], 60)
    one.send({"pickled": "object"})
    assert lost.wait(10)
    assert received == []
    link.close()
    one.close()


def test_strangers_are_not_accepted() -> None:
    listener = Listener(("127.0.0.1", 0), authkey=b"right")
    found: dict[int, Connection] = {}
    accepting = threading.Thread(target=lambda: found.update(_accepted(listener, 2)))
    accepting.start()
    with pytest.raises(AuthenticationError):
        Client(listener.address, authkey=b"wrong")
    with Client(listener.address, authkey=b"right") as friend:
        friend.send_bytes(b"1")
        accepting.join(10)
    assert list(found) == [1]
    found[1].close()
    listener.close()


@pytest.mark.parametrize("group", ["all", 2, "Auto", object()])
def test_no_group(group: Any) -> None:
    with pytest.raises(ArgumentError, match="group is"):
        find_group(group)


def test_auto_is_nothing_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_RANK", raising=False)
    assert find_group("auto") is find_group(None) is None
    assert find_group(mx.distributed.init()) is None  # one rank


def test_a_rank_that_finds_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not generate by itself what rank 0 generates."""
    monkeypatch.setenv("MLX_RANK", "1")
    monkeypatch.delenv("MLX_HOSTFILE", raising=False)
    with pytest.raises(PeerError, match="started as another rank than 0, but MLX knows of no other"):
        find_group("auto")
    monkeypatch.setattr(mx.distributed, "init", fails("[ring] Couldn't bind socket"))
    with pytest.raises(PeerError, match=r"could not connect the ranks: .*bind"):
        find_group("auto")


def fails(message: str) -> Any:
    def fail(*arguments: Any, **named: Any) -> None:
        raise RuntimeError(message)

    return fail


def test_ranks_that_do_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    absent, numbers = threading.Event(), np.zeros(3, np.int32)
    monkeypatch.setattr(joining, "_LOAD_SECONDS", 0.05)
    monkeypatch.setattr(mx.distributed, "all_sum", lambda values, group: absent.wait() and values)
    with pytest.raises(PeerError, match="not all ranks have begun to load"):
        joining._sum(numbers, Alone())  # type: ignore[arg-type]
    absent.set()
    monkeypatch.setattr(mx.distributed, "all_sum", fails("[ring] lost"))
    with pytest.raises(PeerError, match=r"not connected any more: .*lost; start all ranks again"):
        joining._sum(numbers, Alone())  # type: ignore[arg-type]


def test_one_model_of_a_process_is_in_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = connections()
    peers = Peers(0, {1: one}, 5.0)
    joining._members.add(peers)
    monkeypatch.setattr(joining, "find_group", lambda group: Alone())
    monkeypatch.setattr(joining, "Member", lambda group, timeout: "joined")
    with pytest.raises(ArgumentError, match="close it on all ranks"), joining.joined(None, 5.0):
        pass
    peers.close()
    with joining.joined(None, 5.0) as member:
        assert member == "joined"
    other.close()


def test_who_waits_for_an_answer_learns_that_the_model_was_closed() -> None:
    one, other = connections()
    peers, errors = Peers(0, {1: one}, 5.0), list[str]()

    def ask() -> None:
        with pytest.raises(PeerError) as caught:
            peers.receive()
        errors.append(str(caught.value))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    peers.close()
    asking.join(10)
    assert errors == ["the model was closed"]
    other.close()


def test_a_forked_process_leaves_the_connections_open(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = connections()
    received: list[Any] = []
    link = Link(one, received.append, lambda: None, lambda: ["beat"], 60)
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: -1)
        link.close()
    other.send_bytes(b'["still here"]')
    assert waited_for(lambda: received == [["still here"]])
    link.close()
    other.close()


def test_interrupts_are_held() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), held_interrupts() as held:
        assert not held()
        os.kill(os.getpid(), signal.SIGINT)
        assert held()
        reached = True
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_the_process_ignores_is_not_held() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with held_interrupts() as held:
            os.kill(os.getpid(), signal.SIGINT)
            assert not held()
    finally:
        signal.signal(signal.SIGINT, before)


def test_interrupts_are_ignored() -> None:
    with ignored_interrupts():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_progress_is_sums_records_or_computing() -> None:
    state = _State()
    assert state.progress(100.0, 1.0) == 0
    assert state.progress(105.0, 1.0) == 5
    state.cpu = 0.5
    assert state.progress(106.0, 1.0) == 6, "too little computing"
    state.records = 1
    assert state.progress(107.0, 1.0) == 0
    state.cpu = 2.0
    assert state.progress(109.0, 1.0) == 0
    state.entered = 1
    assert state.progress(110.0, 1.0) == 0
    assert state.progress(113.0, 1.0) == 3
    state.cpu, state.doing = 9.0, "waits"
    assert state.progress(114.0, 1.0) == 4, "a ring that spins computes nothing"


def test_the_cache_of_mlx_is_cleared_between_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX waits there for a sum that is under way, and no other thread runs meanwhile."""
    cleared, during = threading.Event(), list[bool]()
    clearing = threading.Thread(target=lambda: (clear_cache(), cleared.set()))

    def evaluate(array: mx.array) -> None:
        during.append(communicating.locked())
        if communicating.locked():
            clearing.start()
            assert not cleared.wait(0.1)

    sums = Sums(Alone(), Share(0, 2), {3: 4})  # type: ignore[arg-type]
    monkeypatch.setattr(mx.distributed, "all_sum", lambda flat, group: flat + flat)
    monkeypatch.setattr(mx, "eval", evaluate)
    sums.begin([1])
    sums.add(mx.ones((1, 4)), 3, np.array([[1]]))
    assert cleared.wait(10)
    assert during == [False, True]


def test_a_ring_that_fails_breaks_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(array: mx.array) -> None:
        if communicating.locked():
            raise RuntimeError("[ring] lost")

    reasons: list[str] = []
    sums = Sums(Alone(), Share(0, 2), {3: 4})  # type: ignore[arg-type]
    sums.broken = reasons.append
    monkeypatch.setattr(mx.distributed, "all_sum", lambda flat, group: flat + flat)
    monkeypatch.setattr(mx, "eval", fails)
    sums.begin([1])
    with pytest.raises(PeerError, match="layer 3: the sum failed on rank 0"):
        sums.add(mx.ones((1, 4)), 3, np.array([[1]]))
    assert reasons == ["the sum failed on rank 0: [ring] lost"]


def test_a_process_that_stood_still_accuses_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clock went on, and neither it nor the others made progress."""
    one, other = connections()
    friend = Link(other, lambda message: None, lambda: None, lambda: ["beat", 0, 0, 0.0, 3, "waits"], 0.05)
    skipped, clock = 0.0, time.monotonic
    monkeypatch.setattr(time, "process_time", lambda: 0.0)  # this test's own computing is no progress
    monkeypatch.setattr(time, "monotonic", lambda: clock() + skipped)
    peers = Peers(0, {1: one}, 1.0)
    peers.watch(Recorder(pending=1, waiting=False, entered=0, layer=3, nbytes=0), lambda: 0)
    peers.working = True
    time.sleep(0.35)
    skipped += 5
    time.sleep(0.3)
    assert peers.failure == ""
    assert waited_for(lambda: peers.failure)
    assert "rank 0 makes no progress: nothing for" in peers.failure
    peers.close()
    friend.close()


class Recorder:
    """Stands for sums, peers, store and caches: notes what is called."""

    def __init__(self, **attributes: Any) -> None:
        self.calls: list[tuple[Any, ...]] = []
        vars(self).update(attributes)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **named: self.calls.append((name, *arguments))


def test_a_sequence_of_another_length_is_not_run() -> None:
    cache = Recorder(tokens=[1, 2, 3])
    network = Recorder(new_cache=lambda: cache, chunks=lambda tokens, cache, last: [len(tokens)])
    sums, peers = Recorder(rank=1), Recorder(failure="")
    following = FollowingNetwork(network, sums, peers, Recorder())
    following._change("new", 7)
    following._pass("run", 1, [2], [3], [7], [8, 9])
    assert [call[0] for call in network.calls] == ["run"]
    following._pass("run", 2, [2], [5], [7], [8, 9])
    assert [call[0] for call in network.calls] == ["run"], "it ran with another length"
    assert ("give_up",) in sums.calls
    assert any(call[0] == "say_cause" and "another length" in str(call[1]) for call in peers.calls)
    following._pass("run", 3, [2], [3], [99], [8, 9])
    assert any(call[0] == "say_cause" and "was lost" in str(call[1]) for call in peers.calls)


def test_a_cache_that_cannot_follow_is_dropped() -> None:
    def fails(length: int) -> None:
        raise KeyError(length)

    cache = Recorder(tokens=[1, 2, 3], cut_back=fails, held=[3])
    sums, peers = Recorder(rank=1), Recorder(failure="")
    following = FollowingNetwork(Recorder(new_cache=lambda: cache), sums, peers, Recorder())
    following._change("new", 7)
    following._answer("held", 1, 7)
    following._change("cut_back", 7, 2)
    following._answer("held", 2, 7)
    assert [call for call in peers.calls if call[0] == "send"] == [
        ("send", "answer", 1, [3]),
        ("send", "answer", 2, []),
    ]


class Alone:
    """A group of one rank that says it has two."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2


def test_sums_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two ranks that both take part, of one that does not, and of ranks that chose otherwise."""
    sums = Sums(Alone(), Share(0, 2), {3: 4})  # type: ignore[arg-type]
    part, chosen = mx.arange(8, dtype=mx.float32).reshape(2, 4), np.array([[1], [2]])
    for change, error in (([], ""), ([0, 0], "another rank failed"), ([1, 9], "chose different experts")):

        def all_sum(flat: mx.array, group: Any, change: list[float] = change) -> mx.array:
            others = flat if not change else mx.concatenate([flat[:-2], mx.array(change, dtype=mx.float32)])
            return flat + others

        monkeypatch.setattr(mx.distributed, "all_sum", all_sum)
        sums.begin([2])
        if error:
            with pytest.raises(PeerError, match=f"layer 3: .*{error}"):
                sums.add(part, 3, chosen)
        else:
            assert np.array_equal(np.array(sums.add(part, 3, chosen)), 2 * np.array(part))
        assert sums.pending == 0
    with pytest.raises(PeerError, match="cannot run in a group"):
        sums.add(part, 3, chosen)


def test_beats_keep_a_group_alive_and_silence_ends_it() -> None:
    one, other = connections()
    peers = Peers(0, {1: one}, 0.4)
    friend = Link(other, lambda message: None, lambda: None, lambda: ["beat", 0, 0, 0.0, -1, "idle"], 0.05)
    time.sleep(0.6)
    assert peers.failure == ""
    silent = threading.Event()
    friend._beat = lambda: [silent.wait()]
    assert waited_for(lambda: peers.failure)
    assert peers.failure.startswith("rank 1 has been silent for 0.")
    silent.set()
    peers.close()
    friend.close()


def test_what_ranks_must_have_in_common() -> None:
    """Rank 0 compares; the others wait for its word."""
    member = Member.__new__(Member)
    share, facts = Share(0, 2), {"arithmetic": "cpu", "mlx": "1"}
    for theirs, error in (
        ({"share": "1/2", **facts}, ""),
        (
            {"share": "1/2", **facts, "arithmetic": "CPU kernels"},
            "rank 1 has arithmetic 'CPU kernels', rank 0 has 'cpu'",
        ),
        ({"share": "1/2", "arithmetic": "cpu"}, "rank 1 has mlx None, rank 0 has '1'"),
        ({"share": "0/2", **facts}, "the ranks hold shares 0/2, 0/2, expected each of 2 shares once"),
    ):
        member.rank, member._size = 0, 2
        member.peers = Recorder(receive=lambda theirs=theirs: (1, ["facts", theirs]))
        if error:
            with pytest.raises(PeerError, match=error):
                member.agree(share, facts)
        else:
            member.agree(share, facts)
        assert (("send", "agreed") in member.peers.calls) is not bool(error)
