"""Groups: who takes part, and how ranks exchange small Python objects before they share memory.

A Buffer takes any of these as it is: an mpi4py communicator, a thread's group from
`run_threads`, a torch.distributed ProcessGroup, or None of these where a single rank is enough
(`SingleGroup`). Everything a group carries is small and rare; rows never travel through it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from epcomm import env
from epcomm.errors import CommTimeout, InvalidArgument, TransportError, kind_of, out_of_step
from epcomm.waiting import Deadline, wait_until

T = TypeVar("T")


@runtime_checkable
class Group(Protocol):
    """Ranks that call collectively.

    Attributes:
        rank: This rank, 0 to ``size - 1``.
        size: Number of ranks.
    """

    @property
    def rank(self) -> int:
        """This rank."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    def allgather(
        self, obj: Any, *, timeout_s: float | None = None, phase: str = "allgather"
    ) -> list[Any]:
        """Give every rank every rank's object. Collective.

        Args:
            obj: Anything that pickles; small.
            timeout_s: Deadline in seconds; None takes EPCOMM_TIMEOUT_S.
            phase: What the exchange is for, named in the error.

        Returns:
            The objects, by rank.

        Raises:
            CommTimeout: Some ranks did not call before the deadline.
        """
        ...

    def barrier(self, *, timeout_s: float | None = None, phase: str = "barrier") -> None:
        """Return once every rank has called. Collective. Raises CommTimeout as `allgather`."""
        ...

    def split(self, color: int) -> Group:
        """Return the group of the ranks that pass the same color, in rank order. Collective."""
        ...

    def check(self) -> None:
        """Raise TransportError if a rank of this group is known to have failed."""
        ...


class SingleGroup:
    """One rank alone."""

    rank = 0
    size = 1

    def allgather(
        self, obj: Any, *, timeout_s: float | None = None, phase: str = "allgather"
    ) -> list[Any]:
        """Return ``[obj]``."""
        return [obj]

    def barrier(self, *, timeout_s: float | None = None, phase: str = "barrier") -> None:
        """Return at once."""

    def split(self, color: int) -> SingleGroup:
        """Return a group of this rank alone."""
        return SingleGroup()

    def check(self) -> None:
        """Nobody else can fail."""


class ThreadGroup:
    """One thread of several that play ranks in one process. Made by `run_threads`."""

    def __init__(
        self, world: _ThreadWorld, context: tuple[Any, ...], ranks: Sequence[int], me: int
    ):
        self._world = world
        self._context = context
        self._ranks = tuple(ranks)
        self._round = 0
        self.rank = self._ranks.index(me)
        self.size = len(self._ranks)

    def allgather(
        self, obj: Any, *, timeout_s: float | None = None, phase: str = "allgather"
    ) -> list[Any]:
        """See `Group.allgather`. The objects themselves are passed on, not copies."""
        limit_s = env.settings().timeout_s if timeout_s is None else timeout_s
        self._round += 1
        found = self._world.exchange(
            (self._context, self._round), self.rank, self.size, (phase, obj), limit_s
        )
        if len(found) < self.size:
            missing = [rank for rank in range(self.size) if rank not in found]
            raise CommTimeout(phase, self.rank, missing, limit_s)
        for rank, (other, _) in found.items():
            if other != phase:
                raise out_of_step(phase, rank, other)
        return [found[rank][1] for rank in range(self.size)]

    def barrier(self, *, timeout_s: float | None = None, phase: str = "barrier") -> None:
        """See `Group.barrier`."""
        self.allgather(None, timeout_s=timeout_s, phase=phase)

    def split(self, color: int) -> ThreadGroup:
        """See `Group.split`."""
        colors = self.allgather(color, phase="split")
        mine = [rank for rank, other in enumerate(colors) if other == color]
        context = (*self._context, self._round, color)
        world_ranks = [self._ranks[rank] for rank in mine]
        return ThreadGroup(self._world, context, world_ranks, self._ranks[self.rank])

    def check(self) -> None:
        """Raise TransportError if another rank's function ended with an exception."""
        self._world.check()


class _ThreadWorld:
    """What the threads of one `run_threads` share."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._rounds: dict[Any, tuple[dict[int, Any], list[int]]] = {}
        self.failure: tuple[int, BaseException] | None = None

    def exchange(
        self, key: Any, rank: int, size: int, obj: Any, timeout_s: float
    ) -> dict[int, Any]:
        """Add this rank's object to a round; return those that came before the deadline."""
        with self._changed:
            objects, takers = self._rounds.setdefault(key, ({}, []))
            objects[rank] = obj
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: len(objects) == size or self.failure is not None,
                min(timeout_s, threading.TIMEOUT_MAX),
            )
            if len(objects) < size:
                self.check()
            takers.append(rank)
            if len(takers) == size:
                del self._rounds[key]
            return dict(objects)

    def fail(self, rank: int, error: BaseException) -> None:
        """Remember the first failure and wake all that wait."""
        with self._changed:
            if self.failure is None:
                self.failure = (rank, error)
            self._changed.notify_all()

    def check(self) -> None:
        if self.failure is not None:
            rank, error = self.failure
            raise TransportError(
                f"rank {rank} failed: {type(error).__name__}: {error}. The other ranks end too."
            ) from error


_this_thread = threading.local()


def is_rank_thread() -> bool:
    """Return whether this thread plays a rank, started by `run_threads`."""
    return getattr(_this_thread, "is_rank", False)


def run_threads(fn: Callable[[Group], T], num_ranks: int) -> list[T]:
    """Run a function once a rank, with ranks as threads of this process.

    For notebooks, tests, and frameworks that drive all GPUs from one process.

    Args:
        fn: Called as ``fn(group)`` in a thread of its own for each rank.
        num_ranks: Number of ranks, at least 1.

    Returns:
        What each call returned, by rank.

    Raises:
        InvalidArgument: ``num_ranks`` is below 1.
        BaseException: What the first failing rank raised; the other ranks' waits end at once.
    """
    if not isinstance(num_ranks, int) or num_ranks < 1:
        raise InvalidArgument(f"num_ranks is {num_ranks!r}; it must be at least 1.")
    world = _ThreadWorld()
    results: list[Any] = [None] * num_ranks

    def run_rank(rank: int) -> None:
        _this_thread.is_rank = True
        try:
            results[rank] = fn(ThreadGroup(world, (), range(num_ranks), rank))
        except BaseException as error:  # re-raised in the caller's thread below
            world.fail(rank, error)

    threads = [
        threading.Thread(target=run_rank, args=(rank,), name=f"epcomm rank {rank}", daemon=True)
        for rank in range(num_ranks)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if world.failure is not None:
        raise world.failure[1]
    return results


class MpiGroup:
    """An mpi4py communicator as a group.

    Messages go point to point on a private duplicate of the communicator, so that the caller's
    own traffic is untouched and a missing rank can be named.

    Args:
        comm: The communicator. Collective over it at the first use of each communicator.
        timeout_s: Deadline of that, in seconds; None takes EPCOMM_TIMEOUT_S.
    """

    def __init__(self, comm: Any, timeout_s: float | None = None) -> None:
        private = _private_comm(comm, timeout_s)
        self._init(private, range(private.comm.size), tag=0)

    def _init(self, private: _PrivateComm, ranks: Sequence[int], tag: int) -> None:
        self._private = private
        self._ranks = tuple(ranks)
        self._tag = tag
        self.rank = self._ranks.index(private.comm.rank)
        self.size = len(self._ranks)

    def allgather(
        self, obj: Any, *, timeout_s: float | None = None, phase: str = "allgather"
    ) -> list[Any]:
        """See `Group.allgather`."""
        deadline = Deadline(env.settings().timeout_s if timeout_s is None else timeout_s)
        comm = self._private.comm
        this_round = self._private.next_round(self._tag)
        others = [rank for rank in range(self.size) if rank != self.rank]
        message = (this_round, phase, obj)
        sends = [comm.isend(message, dest=self._ranks[rank], tag=self._tag) for rank in others]
        received = {self.rank: obj}

        def is_done() -> bool:
            for rank in others:
                if rank in received:
                    continue
                matched = comm.improbe(source=self._ranks[rank], tag=self._tag)
                if matched is not None:
                    sent_round, sent_phase, sent = matched.recv()
                    if sent_round < this_round:
                        continue  # left over from a round that timed out
                    if (sent_round, sent_phase) != (this_round, phase):
                        self._private.skip_to(self._tag, sent_round)
                        raise out_of_step(phase, rank, sent_phase)
                    received[rank] = sent
            return len(received) == self.size and all(send.Test() for send in sends)

        try:
            is_in_time = wait_until(is_done, deadline)
        except TransportError:
            self._private.abandoned.extend(sends)
            raise
        if not is_in_time:
            self._private.abandoned.extend(sends)
            missing = [rank for rank in others if rank not in received]
            raise CommTimeout(phase, self.rank, missing, deadline.timeout_s)
        return [received[rank] for rank in range(self.size)]

    def barrier(self, *, timeout_s: float | None = None, phase: str = "barrier") -> None:
        """See `Group.barrier`."""
        self.allgather(None, timeout_s=timeout_s, phase=phase)

    def split(self, color: int) -> MpiGroup:
        """See `Group.split`."""
        answers = self.allgather((color, self._private.free_tag), phase="split")
        tag = max(free_tag for _, free_tag in answers)
        self._private.free_tag = tag + 1
        group = MpiGroup.__new__(MpiGroup)
        ranks = [self._ranks[rank] for rank, (other, _) in enumerate(answers) if other == color]
        group._init(self._private, ranks, tag)
        return group

    def check(self) -> None:
        """Nothing to look at: MPI itself ends the ranks whose peers die."""

    def send(self, memory: Any, rank: int) -> Any:
        """Begin to send memory to a rank of this group; return mpi4py's request.

        Messages of one pair arrive in the order in which they were begun. They share a tag with
        the exchanges above: a group is used for one or the other.
        """
        return self._private.comm.Isend(memory, dest=self._ranks[rank], tag=self._tag)

    def receive(self, memory: Any, rank: int) -> Any:
        """Begin to receive a message of a rank of this group; return mpi4py's request."""
        return self._private.comm.Irecv(memory, source=self._ranks[rank], tag=self._tag)

    def poll(self) -> None:
        """Let MPI move on whatever is under way."""
        self._private.comm.Iprobe(tag=self._tag)


class _PrivateComm:
    """epcomm's duplicate of a communicator, kept with it, and what its groups share."""

    def __init__(self, comm: Any) -> None:
        self.comm, self._request = comm.Idup()
        self.free_tag = 1  # 0 is the whole communicator's
        self.abandoned: list[Any] = []  # sends that timed out: MPI may still read their buffers
        self._rounds: dict[int, int] = {}

    def wait_made(self, rank: int, timeout_s: float) -> None:
        """Wait until all ranks have made it; may be called again after a timeout."""
        if self._request is not None:
            if not wait_until(self._request.Test, Deadline(timeout_s)):
                raise CommTimeout("duplicating comm", rank, [], timeout_s)
            self._request = None

    def free(self) -> None:
        """Give the communicator back to MPI. Collective, as the freeing of the caller's is."""
        if self._request is None:
            self.comm.Free()

    def skip_to(self, tag: int, this_round: int) -> None:
        """Take part in a group's rounds again after a later one of its peers'."""
        self._rounds[tag] = max(self._rounds[tag], this_round)

    def next_round(self, tag: int) -> int:
        self._rounds[tag] = self._rounds.get(tag, 0) + 1
        return self._rounds[tag]


_private_comm_key: int | None = None


def _private_comm(comm: Any, timeout_s: float | None) -> _PrivateComm:
    """Return the communicator's private duplicate; made, collectively, at the first call."""
    global _private_comm_key
    from mpi4py import MPI

    if comm == MPI.COMM_NULL:
        raise InvalidArgument("comm is MPI.COMM_NULL; pass a communicator this rank belongs to.")
    if comm.Is_inter():
        raise InvalidArgument("comm is an intercommunicator; pass an intracommunicator (Merge()).")
    if _private_comm_key is None:
        _private_comm_key = MPI.Comm.Create_keyval(
            delete_fn=lambda _comm, _key, private: private.free()
        )
    private = comm.Get_attr(_private_comm_key)
    if private is None:
        private = _PrivateComm(comm)
        comm.Set_attr(_private_comm_key, private)
    assert isinstance(private, _PrivateComm)
    private.wait_made(comm.rank, env.settings().timeout_s if timeout_s is None else timeout_s)
    return private


def as_group(obj: Any, timeout_s: float | None = None) -> Group:
    """Return the Group for what a caller passes as one.

    Args:
        obj: An mpi4py communicator, a torch.distributed ProcessGroup, or a `Group`.
        timeout_s: Deadline of the first use of a communicator, which is collective, in seconds;
            None takes EPCOMM_TIMEOUT_S.

    Raises:
        InvalidArgument: ``obj`` is none of these.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and isinstance(obj, mpi.Comm):
        return MpiGroup(obj, timeout_s)
    torch = sys.modules.get("torch")
    dist = getattr(torch, "distributed", None)
    if dist is not None and dist.is_available() and isinstance(obj, dist.ProcessGroup):
        from epcomm.torch_group import TorchGroup

        return TorchGroup(obj)
    if isinstance(obj, Group) and not isinstance(obj, type):
        return obj
    raise InvalidArgument(
        f"group is {kind_of(obj)}; it must be an mpi4py communicator, a torch.distributed "
        "ProcessGroup, or an epcomm group (run_threads gives one to each rank)."
    )
