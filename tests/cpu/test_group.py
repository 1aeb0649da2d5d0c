"""Groups of every kind pass the same checks: one rank, threads, processes, MPI and torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import launch
import pytest
from processes import start
from ranks import fail_common as common
from ranks import fail_group

from epcomm import (
    Buffer,
    CommTimeout,
    Group,
    InvalidArgument,
    SingleGroup,
    TransportError,
    as_group,
    run_threads,
)
from epcomm.torch_group import TorchGroup

pytestmark = pytest.mark.timeout(90)


def test_single() -> None:
    group = SingleGroup()
    assert (group.rank, group.size) == (0, 1)
    fail_group.check_group(group)
    assert as_group(group) is group
    buffer = Buffer(group)
    common.check_round(buffer, 0)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8])
def test_threads(num_ranks: int) -> None:
    run_threads(fail_group.check_group, num_ranks)


def test_threads_are_taken_as_they_are() -> None:
    def fn(group: Any) -> None:
        assert as_group(group) is group
        buffer = Buffer(group, timeout_s=10.0)
        assert buffer.group is group
        common.check_round(buffer, 0)

    run_threads(fn, 2)


def test_threads_with_a_missing_rank() -> None:
    run_threads(fail_group.check_missing, 4)


def test_threads_pass_objects_on_as_they_are() -> None:
    def fn(group: Any) -> tuple[int, list[int]]:
        mine = object()
        return id(mine), [id(other) for other in group.allgather(mine)]

    results = run_threads(fn, 3)
    assert all(seen == [identity for identity, _ in results] for _, seen in results)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_processes(num_ranks: int, tmp_path: Path) -> None:
    """A group that epcomm knows nothing of: the protocol is all that it takes."""
    with start("fail_group", num_ranks, "processes", folder=tmp_path) as ranks:
        assert ranks.results() == [f"EPCOMM-OK {rank}\n" for rank in range(num_ranks)]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_mpi(mpiexec: Callable[..., launch.Result], num_ranks: int) -> None:
    mpiexec("fail_group", num_ranks, "mpi", timeout_s=60)


def test_mpi_refuses(mpiexec: Callable[..., launch.Result]) -> None:
    mpiexec("fail_group", 2, "mpi-refused", timeout_s=60)


def test_mpi_with_a_missing_rank(mpiexec: Callable[..., launch.Result]) -> None:
    result = mpiexec("fail_group", 3, "mpi", "missing", check=False, timeout_s=60)
    assert result.ok_ranks() == [0, 1, 2], str(result)


def run_torch(folder: Path, num_ranks: int, *args: str) -> None:
    pytest.importorskip("torch", reason="needs torch: pip install torch")
    with start("fail_group", num_ranks, "torch", *args, folder=folder) as ranks:
        printed = ranks.results(timeout_s=60)
    assert printed == [f"EPCOMM-OK {rank}\n" for rank in range(num_ranks)]


def test_torch(tmp_path: Path) -> None:
    run_torch(tmp_path, 3)


class Store:
    """What torch's stores do, in a dictionary: no torch is needed."""

    def __init__(self, values: dict[str, bytes]) -> None:
        self.check = lambda keys: all(key in values for key in keys)
        self.get, self.set = values.__getitem__, values.__setitem__


def groups_of_a_store(num_ranks: int) -> list[TorchGroup]:
    values: dict[str, bytes] = {}
    groups = []
    for rank in range(num_ranks):
        group = TorchGroup.__new__(TorchGroup)
        group._init(SimpleNamespace(keys=Store(values), rounds={}), range(num_ranks), rank, "all")
        groups.append(group)
    return groups


def test_torch_rank_that_gave_up_is_not_there_any_more() -> None:
    """Who comes late does not go on alone, into exchanges that nobody else makes."""
    early, late = groups_of_a_store(2)
    for group, peer in ((early, 1), (late, 0)):
        with pytest.raises(CommTimeout) as caught:
            group.allgather(0, timeout_s=0.1, phase="first")
        assert caught.value.peers == (peer,)


def test_torch_ranks_that_gave_up_differently_often_meet_again() -> None:
    early, late = groups_of_a_store(2)
    for _ in range(3):
        with pytest.raises(CommTimeout):
            early.allgather(0, timeout_s=0.05, phase="first")
    with pytest.raises(TransportError, match="rank 0 is at 'an exchange that it gave up'"):
        late.allgather(1, timeout_s=5.0, phase="first")
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda group: group.allgather(group.rank, timeout_s=10.0), (early, late))
    assert list(found) == [[0, 1], [0, 1]]


def test_torch_whose_store_is_gone() -> None:
    (group, _) = groups_of_a_store(2)

    def fail(*_: Any) -> None:
        raise RuntimeError("Connection reset by peer")

    group._store.keys.check = fail
    with pytest.raises(TransportError, match=r"first: torch\.distributed failed: Connection"):
        group.allgather(1, timeout_s=1.0, phase="first")


def test_torch_with_a_missing_rank(tmp_path: Path) -> None:
    run_torch(tmp_path, 2, "missing")


# --- run_threads ----------------------------------------------------------------------------------


def test_results_come_by_rank() -> None:
    def fn(group: Any) -> tuple[int, str]:
        time.sleep(0.02 * (group.size - group.rank))
        return group.rank, threading.current_thread().name

    results = run_threads(fn, 4)
    assert [rank for rank, _ in results] == [0, 1, 2, 3]
    assert len({name for _, name in results}) == 4


def test_one_rank() -> None:
    assert run_threads(lambda group: (group.rank, group.size), 1) == [(0, 1)]


@pytest.mark.parametrize("number", [0, -3])
def test_no_ranks(number: int) -> None:
    with pytest.raises(InvalidArgument, match=f"num_ranks is {number}; it must be at least 1"):
        run_threads(lambda group: None, number)


class UserError(Exception):
    """Raised by a rank's own code."""


def test_exception_of_a_rank_is_raised() -> None:
    def fn(group: Any) -> None:
        if group.rank == 2:
            raise UserError("rank two")

    with pytest.raises(UserError, match="rank two"):
        run_threads(fn, 3)


def test_first_failure_is_raised_and_not_what_followed_from_it() -> None:
    def fn(group: Any) -> None:
        if group.rank == 1:
            time.sleep(0.05)
            raise UserError("the cause")
        group.barrier(timeout_s=60.0)

    start_s = time.monotonic()
    with pytest.raises(UserError, match="the cause"):
        run_threads(fn, 4)
    assert time.monotonic() - start_s < 20


def test_waits_of_the_others_end_with_the_cause() -> None:
    seen: list[BaseException] = []

    def fn(group: Any) -> None:
        if group.rank == 0:
            raise UserError("the cause")
        try:
            group.allgather(1, timeout_s=60.0)
        except TransportError as error:
            seen.append(error)
            raise

    with pytest.raises(UserError):
        run_threads(fn, 3)
    assert len(seen) == 2
    for error in seen:
        assert "rank 0 failed: UserError: the cause. The other ranks end too." in str(error)
        assert isinstance(error.__cause__, UserError)
        assert not isinstance(error, CommTimeout)


def test_check_tells_of_a_failed_rank() -> None:
    failed = threading.Event()

    def fn(group: Any) -> None:
        if group.rank == 0:
            failed.set()
            raise UserError("the cause")
        assert failed.wait(20)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            group.check()
            time.sleep(0.001)

    with pytest.raises(UserError):
        run_threads(fn, 2)


def test_base_exceptions_are_passed_on() -> None:
    def fn(group: Any) -> None:
        if group.rank == 1:
            raise SystemExit(3)
        group.barrier(timeout_s=60.0)

    with pytest.raises(SystemExit):
        run_threads(fn, 2)


def test_runs_do_not_mix() -> None:
    """Runs inside runs, and one after the other, each have ranks of their own."""

    def outer(group: Any) -> None:
        for i in range(20):
            mine = (group.rank, i)
            found = run_threads(lambda inner: inner.allgather((*mine, inner.rank)), 2)  # noqa: B023
            assert found == [[(*mine, 0), (*mine, 1)]] * 2
            assert group.allgather(mine) == [(rank, i) for rank in range(3)]

    run_threads(outer, 3)


def test_rounds_leave_nothing_behind() -> None:
    def fn(group: Any) -> int:
        for i in range(30):
            group.allgather(i)
        part = group.split(group.rank % 2)
        part.barrier()
        group.barrier()
        return len(group._world._rounds)

    assert max(run_threads(fn, 4)) <= 1


def test_object_that_comes_too_late_is_not_taken_for_a_later_one() -> None:
    """A rank misses an exchange; what it says afterwards is not mixed up with what was."""
    gave_up = threading.Event()

    def fn(group: Any) -> None:
        group.barrier()
        if group.rank == 0:
            with pytest.raises(CommTimeout):
                group.allgather("question 1", timeout_s=0.2, phase="first")
            gave_up.set()
        else:
            assert gave_up.wait(20)
        for _ in range(3):
            try:
                found = group.allgather("question 2", timeout_s=0.5, phase="second")
            except TransportError:
                continue
            assert found == ["question 2", "question 2"]
            return
        raise AssertionError(f"rank {group.rank} never got through")

    run_threads(fn, 2)


# --- as_group -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [None, 0, "comm", [], object(), SingleGroup, int])
def test_what_is_no_group(wrong: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        as_group(wrong)
    kind = "None" if wrong is None else f"a {type(wrong).__name__}"
    assert f"group is {kind}; it must be an mpi4py" in str(caught.value)
    assert "torch.distributed ProcessGroup" in str(caught.value)
    assert "run_threads" in str(caught.value)


def test_protocol_is_what_counts() -> None:
    class Own:
        """A group without any base class."""

        rank, size = 0, 1

        def allgather(self, obj: Any, *, timeout_s: Any = None, phase: str = "") -> list[Any]:
            return [obj]

        def barrier(self, *, timeout_s: Any = None, phase: str = "") -> None:
            pass

        def split(self, color: int) -> Own:
            return self

        def check(self) -> None:
            pass

    own = Own()
    assert isinstance(own, Group)
    assert as_group(own) is own
    fail_group.check_group(own)
    common.check_round(Buffer(own), 0)
