"""Connects processes that were started together to a group of ranks."""

from __future__ import annotations

import os
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from queue import Empty, SimpleQueue
from typing import Any, Literal
from weakref import WeakSet

import mlx.core as mx
import numpy as np

from ..checks import real, shown
from ..errors import ArgumentError, PeerError
from ..mlx_cache import communicating
from ..share import Share
from .following import FollowingNetwork
from .interrupts import deadly_interrupts
from .leading import LeadingNetwork
from .peers import Peers
from .ring import end_connections, host_addresses
from .sums import Sums

GroupOption = mx.distributed.Group | Literal["auto"] | None
_LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # environment variables of mlx.launch and mpirun
_LOAD_SECONDS = 600.0  # within which all ranks must begin to load a model
_JOIN_SECONDS = 60.0
_members: WeakSet[Peers] = WeakSet()  # of this process; sums of two models at once would be mixed up
_KEY, _HOST = 32, 64  # bytes


def launched() -> bool:
    """Returns whether ``mlx.launch`` or ``mpirun`` started this process."""
    return any(name in os.environ for name in _LAUNCHED)


def find_group(group: GroupOption) -> mx.distributed.Group | None:
    """Returns the group of ranks; None for a single process.

    Args:
        group: a group of MLX, or ``"auto"`` for the default group if ``mlx.launch`` or ``mpirun`` started this process.

    Raises:
        ArgumentError: the value is not a group.
    """
    if group is None:
        return None
    if isinstance(group, str) and group == "auto":
        if not launched():
            return None
        group = _launched_group()
    if not isinstance(group, mx.distributed.Group):
        raise ArgumentError(f"group is {shown(group)}, expected None, 'auto' or what mx.distributed.init() returns")
    return group if group.size() > 1 else None


def _launched_group() -> mx.distributed.Group:
    try:
        with deadly_interrupts():  # MLX waits here for the other ranks
            group = mx.distributed.init()
    except RuntimeError as error:
        raise PeerError(
            f"MLX could not connect the ranks: {error}; are all started, their ports free, and "
            "MLX_HOSTFILE a list of the addresses of each rank?"
        ) from error
    if group.size() == 1 and any(os.environ.get(name, "0") != "0" for name in _LAUNCHED):
        raise PeerError(
            "this process was started as another rank than 0, but MLX knows of no other; is MLX_HOSTFILE set?"
        )
    return group


class Member:
    """This process as a member of a group while it loads a model.

    Attributes:
        rank: rank of this process. peers: its connections to other ranks.
    """

    def __init__(self, group: mx.distributed.Group, timeout: float) -> None:
        self.rank, self._size, self._group = group.rank(), group.size(), group
        self.peers = Peers(self.rank, _connections(group), timeout)
        _members.add(self.peers)

    def sums(self, stored: Share, widths: Mapping[int, int]) -> Sums:
        """Returns the sums over all ranks. The share of this rank is that of its files, or follows from its rank.

        Raises:
            ArgumentError: the share in the files is for another number of machines.
        """
        share = Share(self.rank, self._size) if stored.is_whole else stored
        if share.count != self._size:
            raise ArgumentError(
                f"the folder holds share {share} of the experts, but the group has {self._size} ranks; start {share.count}"
            )
        return Sums(self._group, share, widths)

    def agree(self, share: Share, facts: Mapping[str, Any]) -> None:
        """Checks that the facts are equal on all ranks, and that their shares are complete.

        Raises:
            PeerError: a rank has different facts or could not load, or a share is missing.
        """
        own = {"share": str(share), **facts}
        if self.rank:
            self.peers.send("facts", own)
            self.peers.receive()  # this wait ends without an error only if all ranks agree
            return
        found = {0: own}
        while len(found) < self._size:
            rank, (_, theirs) = self.peers.receive()
            found[rank] = theirs
        for rank, theirs in sorted(found.items()):
            for name, value in facts.items():
                if theirs.get(name) != value:
                    raise PeerError(
                        f"rank {rank} has {name} {theirs.get(name)!r}, rank 0 has {value!r}; load the same model alike on all "
                        "ranks"
                    )
        shares = sorted(str(theirs["share"]) for theirs in found.values())
        if shares != sorted(f"{i}/{self._size}" for i in range(self._size)):
            raise PeerError(f"the ranks hold shares {', '.join(shares)}, expected each of {self._size} shares once")
        self.peers.send("agreed")

    def enter(self, network: Any, sums: Sums, store: Any) -> LeadingNetwork | FollowingNetwork:
        """Waits until all ranks have loaded, and returns the network for this rank.

        Args:
            store: the :class:`~flash_moe.experts.store.ExpertStore` of this rank.

        Raises:
            PeerError: a rank could not load.
        """
        if self.rank:
            self.peers.send("ready")
            self.peers.receive()
        else:
            for _ in range(self._size - 1):
                self.peers.receive()
            self.peers.send("start")
        self.peers.watch(sums, lambda: store.arrived)
        if self.rank:
            return FollowingNetwork(network, sums, self.peers, store)
        return LeadingNetwork(network, sums, self.peers, store)


@contextmanager
def joined(group: GroupOption, timeout: float) -> Iterator[Member | None]:
    """Connects the ranks of a group. An error inside the block is sent to the other ranks, and ends the connections.

    Yields:
        The membership of this process; None without a group.

    Raises:
        ArgumentError: the group or the timeout is invalid, or another model of this process is in a group.
        PeerError: the ranks could not be connected.
    """
    timeout = real("group_timeout", timeout, "seconds, 0.1 or more", 0.1)
    if (found := find_group(group)) is None:
        yield None
        return
    if not all(peers.closed for peers in list(_members)):
        raise ArgumentError(
            "this process has a model in a group already; close it on all ranks before you load another"
        )
    member = Member(found, timeout)
    try:
        yield member
    except BaseException as error:
        member.peers.fail(f"rank {member.rank} could not load the model: {type(error).__name__}: {error}")
        member.peers.close()
        raise


def _connections(group: mx.distributed.Group) -> dict[int, Connection]:
    """Connects the ranks. Rank 0 listens, and sends its address and a key to the others through a sum."""
    announced = np.zeros(_KEY + _HOST + 1, np.int32)
    listener = None
    if group.rank() == 0:
        key, host = secrets.token_bytes(_KEY), _own_host()
        listener = Listener((host, 0), backlog=group.size(), authkey=key)
        announced[:_KEY] = list(key)
        announced[_KEY : _KEY + len(host)] = list(host.encode())
        announced[-1] = listener.address[1]
    try:
        values = _sum(announced, group)
        if listener is not None:
            return _accepted(listener, group.size())
    finally:
        if listener is not None:
            listener.close()
    host = bytes(values[_KEY:-1]).rstrip(b"\0").decode()
    try:
        connection = Client((host, values[-1]), authkey=bytes(values[:_KEY]))
        connection.send_bytes(str(group.rank()).encode())
    except (OSError, EOFError, AuthenticationError) as error:
        raise PeerError(f"rank {group.rank()} cannot reach rank 0 at {host}:{values[-1]}: {error!r}") from error
    return {0: connection}


def _sum(values: np.ndarray, group: mx.distributed.Group) -> list[int]:
    """Returns the sum over all ranks, as soon as all load a model; in a thread, so that Ctrl-C ends the wait."""
    found: SimpleQueue[Any] = SimpleQueue()

    def add() -> None:
        try:
            total = mx.distributed.all_sum(mx.array(values), group=group)
            with communicating:
                mx.eval(total)
            found.put(np.array(total).tolist())
        except RuntimeError as error:
            found.put(error)

    threading.Thread(target=add, name="flash-moe joining", daemon=True).start()
    try:
        total = found.get(timeout=_LOAD_SECONDS)
    except BaseException as error:
        end_connections(host_addresses())  # the others need not wait either
        if isinstance(error, Empty):
            raise PeerError(f"not all ranks have begun to load the model within {_LOAD_SECONDS:.0f} s") from None
        raise
    if isinstance(total, RuntimeError):
        raise PeerError(f"the ranks are not connected any more: {total}; start all ranks again") from total
    return list(total)


def _accepted(listener: Listener, size: int) -> dict[int, Connection]:
    """Accepts connections with the right key. It uses a thread, because a stranger may connect and send nothing."""
    arrived: SimpleQueue[Connection] = SimpleQueue()

    def accept() -> None:
        count = 1
        with suppress(OSError):  # the listener was closed
            while count < size:
                with suppress(AuthenticationError, EOFError):
                    arrived.put(listener.accept())
                    count += 1

    threading.Thread(target=accept, daemon=True).start()
    found: dict[int, Connection] = {}
    while len(found) < size - 1:
        try:
            connection = arrived.get(timeout=_JOIN_SECONDS)
        except Empty:
            absent = sorted(set(range(1, size)) - set(found))
            raise PeerError(
                f"rank {absent[0]} did not connect to rank 0 within {_JOIN_SECONDS:.0f} s; can it reach {listener.address}?"
            ) from None
        found[int(connection.recv_bytes(16))] = connection
    return found


def _own_host() -> str:
    """Returns the address at which other ranks can reach rank 0: that of the back end's connections."""
    coordinator = os.environ.get("MLX_JACCL_COORDINATOR", "")
    for address in (*host_addresses()[:1], coordinator, os.environ.get("NCCL_HOST_IP", "")):
        if host := address.rpartition(":")[0] or address:
            return host
    return socket.gethostbyname(socket.gethostname())
