"""The checks that every kind of group must pass; run by threads, processes, MPI and torch.

As a program: ``fail_group.py KIND [missing]``, KIND being processes, mpi, mpi-refused or torch.
With ``missing``, rank 1 stays away from an exchange, and the others must say so.
"""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epcomm import Buffer, CommTimeout, Group, TransportError, as_group


class Payload:
    """An object of a class of one's own."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.array = np.full(7, rank)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Payload) and self.rank == other.rank

    __hash__ = None  # type: ignore[assignment]


def check_group(group: Group) -> None:
    """Collective. Checks allgather, barrier and split."""
    assert isinstance(group, Group)
    assert 0 <= group.rank < group.size
    everyone = range(group.size)
    assert group.allgather(group.rank) == list(everyone)
    for make in (str, lambda rank: None, lambda rank: b"x" * (rank * 70000), Payload):
        assert group.allgather(make(group.rank), timeout_s=30.0) == [make(i) for i in everyone]
    for i in range(50):
        assert group.allgather((i, group.rank), phase="many") == [(i, other) for other in everyone]
    group.barrier()
    group.barrier(timeout_s=30.0, phase="check")
    group.check()
    check_barrier(group)
    check_split(group)


def check_barrier(group: Group) -> None:
    """Nobody leaves a barrier before the last has come."""
    slow = group.size - 1
    if group.rank == slow:
        time.sleep(0.05)
    arrived = time.monotonic_ns()
    group.barrier()
    left = time.monotonic_ns()
    times = group.allgather((arrived, left))
    assert max(came for came, _ in times) <= min(went for _, went in times)


def check_split(group: Group) -> None:
    color = group.rank % 2
    part = group.split(color)
    members = [rank for rank in range(group.size) if rank % 2 == color]
    assert (part.rank, part.size) == (members.index(group.rank), len(members))
    assert part.allgather(group.rank) == members
    # Parts do not wait for each other, and the whole still works between their exchanges.
    for i in range(10 * (color + 1)):
        assert part.allgather((i, group.rank)) == [(i, other) for other in members]
    assert group.allgather(color) == [rank % 2 for rank in range(group.size)]
    alone = part.split(part.rank)
    assert (alone.rank, alone.size) == (0, 1)
    assert alone.allgather("me") == ["me"]
    again = group.split(7)
    assert (again.rank, again.size) == (group.rank, group.size)
    assert again.allgather(group.rank) == list(range(group.size))
    part.barrier()
    group.barrier()


def check_missing(group: Group) -> None:
    """Rank 1 comes to no exchange; the others are told of it."""
    group.barrier()
    if group.rank == 1:
        return
    start_s = time.monotonic()
    with pytest.raises(CommTimeout) as caught:
        group.allgather(group.rank, timeout_s=0.5, phase="waiting for one")
    assert 0.4 < time.monotonic() - start_s < 10
    error = caught.value
    assert (error.phase, error.rank, error.timeout_s) == ("waiting for one", group.rank, 0.5)
    assert error.peers == (1,)
    assert f"waiting for one: rank {group.rank} waited 0.5 s for rank(s) 1" in str(error)


def check_late(group: Group) -> None:
    """A message left over from an exchange that timed out is not taken for a later one's."""
    sub = group.split(0)
    if group.rank == 1:
        time.sleep(0.6)
    for i in range(2):
        try:
            found = sub.allgather((i, group.rank), timeout_s=0.2, phase="late")
            assert found == [(i, other) for other in range(group.size)]
        except CommTimeout:
            pass
    group.barrier(timeout_s=30.0)


def check_buffer(group: Any) -> None:
    """A Buffer takes the group as it is."""
    import fail_common as common

    buffer = Buffer(group, timeout_s=30.0)
    assert buffer.group is group
    for seed in range(3):
        common.check_round(buffer, seed)
        common.check_low_latency_round(buffer, seed)
    buffer.destroy()


def check_mpi(comm: Any) -> None:
    """What only communicators have: the caller's own messages, and sub-communicators."""
    from mpi4py import MPI

    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    # The caller's own receives take anything at all, and must get nothing of epcomm's.
    wanted = [comm.irecv(source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG) for _ in range(3)]
    group = as_group(comm)
    check_group(group)
    assert not any(request.Test() for request in wanted)
    comm.Barrier()
    for tag in (0, 1, 2):
        comm.send((comm.rank, tag), dest=right, tag=tag)
    assert [request.wait() for request in wanted] == [(left, tag) for tag in (0, 1, 2)]
    # And epcomm's receives must get nothing of the caller's.
    pending = [comm.isend("mine", dest=right, tag=tag) for tag in (0, 1)]
    check_group(as_group(comm))
    assert [comm.recv(source=left, tag=tag) for tag in (0, 1)] == ["mine"] * 2
    MPI.Request.waitall(pending)
    own = comm.Split(comm.rank % 2, key=-comm.rank)
    assert as_group(own).allgather(comm.rank) == own.allgather(comm.rank)
    check_group(as_group(own))
    check_buffer(own)
    check_group(as_group(MPI.COMM_SELF))
    check_buffer(MPI.COMM_SELF)


def check_refused() -> None:
    from mpi4py import MPI

    from epcomm import InvalidArgument

    freed = MPI.COMM_WORLD.Dup()
    inter = None
    if MPI.COMM_WORLD.size > 1:
        half = MPI.COMM_WORLD.Split(min(MPI.COMM_WORLD.rank, 1))
        inter = half.Create_intercomm(0, MPI.COMM_WORLD, 1 if MPI.COMM_WORLD.rank == 0 else 0)
    freed.Free()
    for wrong, piece in (
        (MPI.COMM_NULL, "comm is MPI.COMM_NULL; pass a communicator"),
        (freed, "comm is MPI.COMM_NULL"),
        (inter, "comm is an intercommunicator; pass an intracommunicator (Merge())"),
        (MPI.COMM_WORLD.Get_group(), "it must be an mpi4py communicator"),
        (MPI.SUM, "it must be an mpi4py communicator"),
    ):
        if wrong is None:
            continue
        with pytest.raises(InvalidArgument, match=re.escape(piece)):
            as_group(wrong)

    class Own(MPI.Intracomm):
        """A communicator of a class of one's own."""

    assert as_group(Own(MPI.COMM_WORLD)).size == MPI.COMM_WORLD.size


def check_torch(process_group: Any) -> None:
    """What only process groups have: members that are some of the world's ranks."""
    import torch.distributed as dist

    check_group(as_group(process_group))
    check_buffer(process_group)
    world = dist.get_world_size()
    some = dist.new_group(list(range(1, world)))
    if dist.get_rank() >= 1:
        check_group(as_group(some))
        check_buffer(some)
    dist.barrier()


def check_late_buffer(process_group: Any) -> None:
    """A rank that came too late for a Buffer leaves the caller's own collectives as they were."""
    import torch
    import torch.distributed as dist

    if dist.get_rank() == 1:
        time.sleep(1.0)
    try:
        Buffer(process_group, timeout_s=0.3)
    except TransportError:
        pass
    else:
        raise AssertionError("a Buffer was made without rank 1")
    for i in range(3):
        total = torch.tensor([dist.get_rank() + i])
        dist.all_reduce(total)
        assert total.item() == sum(range(dist.get_world_size())) + i * dist.get_world_size()
    for _ in range(3):  # the ranks are at different exchanges at first
        try:
            check_buffer(process_group)
            break
        except TransportError:
            dist.barrier()
    else:
        raise AssertionError("no Buffer after a late rank")


def open_torch() -> Any:
    import fail_common as common
    import torch.distributed as dist

    store = Path(os.environ[common.FOLDER]) / "store"
    rank, size = int(os.environ[common.RANK]), int(os.environ[common.SIZE])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    return dist.group.WORLD


def main(kind: str, is_missing: bool) -> None:
    import fail_common as common

    group = open_torch() if kind == "torch" else common.open_group()
    if is_missing:
        check_missing(as_group(group))
    elif kind == "mpi-refused":
        check_refused()
    elif kind == "mpi":
        check_mpi(group)
        check_late(as_group(group))
    elif kind == "torch":
        check_torch(group)
        check_late(as_group(group))
        check_late_buffer(group)
    else:
        check_group(group)
        check_buffer(group)
    rank = as_group(group).rank
    print(f"EPCOMM-OK {rank}", flush=True)
    if is_missing:
        if rank == 1:
            time.sleep(2.0)
        os._exit(0)  # what was sent to nobody must not keep the end of the program waiting


if __name__ == "__main__":
    main(sys.argv[1], "missing" in sys.argv[2:])
