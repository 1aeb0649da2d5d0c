"""GPU slabs, as far as no GPU is needed: what ranks agree on, and what is left after a failure."""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from epcomm import RankMismatch, TransportError, cuda_layout, cuda_slab, run_threads
from epcomm.cuda_layout import areas_for
from epcomm.cuda_slab import CudaSlabs
from epcomm.group import Group

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")

LARGEST = 32 * 2**20


class FakeRuntime:
    """Stands in for CUDA's: two GPUs that reach each other, and memory that is counted."""

    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = 0x1000
        self.allocated: set[int] = set()

    def malloc(self, num_bytes: int) -> int:
        if num_bytes > LARGEST:
            raise self.CUDARuntimeError("out of memory")
        with self._lock:
            self._next += 0x10000
            self.allocated.add(self._next)
            return self._next

    def free(self, ptr: int) -> None:
        with self._lock:
            self.allocated.remove(ptr)

    def __getattr__(self, name: str) -> Any:
        answers = {
            "memGetInfo": (1 << 20, 1 << 30),
            "ipcGetMemHandle": b"handle",
            "deviceGetPCIBusId": "0000:00:00.0",
            "deviceGetByPCIBusId": 0,
            "deviceCanAccessPeer": 1,
            "ipcOpenMemHandle": 7,
        }
        return lambda *args: answers.get(name)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    made = FakeRuntime()
    monkeypatch.setattr(cupy, "cuda", SimpleNamespace(runtime=made))
    return made


def test_slabs_of_different_sizes_are_refused_on_all_ranks(runtime: FakeRuntime) -> None:
    def fn(group: Group) -> None:
        names = range(3, 6)
        said = r"ranks \[3, 4, 5\] need GPU slabs of \[256, 512, 256\] bytes"
        with pytest.raises(RankMismatch, match=said):
            CudaSlabs(group, 0, 512 if group.rank == 1 else 256, 64, 10.0, names)

    run_threads(fn, 3)
    assert not runtime.allocated


def test_too_little_memory_leaves_nothing_behind(runtime: FakeRuntime) -> None:
    def fn(group: Group) -> None:
        with pytest.raises(TransportError, match="rank 3: no room for a GPU slab"):
            CudaSlabs(group, 0, LARGEST + 1, 64, 10.0, names=(3, 5))

    run_threads(fn, 2)
    assert not runtime.allocated


def test_threads_see_each_other_and_free_what_they_had(runtime: FakeRuntime) -> None:
    def fn(group: Group) -> None:
        slabs = CudaSlabs(group, group.rank % 2, 256, 64, 10.0)
        assert len(set(slabs.ptrs)) == 3
        assert slabs.are_threads
        assert slabs.num_sharing == (1 if group.rank == 1 else 2)
        assert len(runtime.allocated) == 3
        slabs.close(is_collective=True)
        slabs.close(is_collective=True)

    run_threads(fn, 3)
    assert not runtime.allocated


def test_a_process_has_more_than_its_pid() -> None:
    pid, token = cuda_slab._process()
    assert pid == os.getpid()
    assert len(token) == 16


def test_processes_of_equal_pids_are_told_apart(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_slab, "_process", lambda: (1, threading.current_thread().name))

    def fn(group: Group) -> None:
        slabs = CudaSlabs(group, 0, 256, 64, 10.0)
        assert not slabs.are_threads
        assert slabs.num_sharing == 1
        assert slabs.ptrs.count(7) == 1  # the peer's, opened

    run_threads(fn, 2)


def test_a_growth_that_fails_changes_nothing(runtime: FakeRuntime) -> None:
    from epcomm.engines.cuda_room import Room

    def fn(group: Group) -> None:
        room = Room(
            *(group, 0, 0),
            state=1,
            record=2,
            timeout_s=10.0,
            names=range(2),
            is_capturing=lambda: False,
            agree=lambda header: pytest.fail("no header is compared"),
            settle=lambda: None,
        )
        before = room.areas, room.slabs, room.call
        needed = areas_for(group.size, 8192, 14336, 0)
        with pytest.raises(TransportError, match="no room for a GPU slab"):
            room.grow(needed)
        assert (room.areas, room.slabs, room.call) == before
        assert not room.areas.has_room_for(needed)
        small = areas_for(group.size, 64, 4096, 0)
        assert room.grow(small)
        assert not room.grow(small)
        assert room.areas.has_room_for(small)
        assert room.slabs.num_bytes == room.areas.num_bytes
        assert room.call != before[2]

    run_threads(fn, 2)
    assert len(runtime.allocated) == 2


def test_a_rank_that_gives_up_ends_kernels_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own as well: they may wait for a rank that has been told to end."""
    from epcomm.engines.cuda_room import Room

    queued: dict[int, int] = {}
    written: dict[int, int] = {}

    def copy(to: int, source: int, num_bytes: int, kind: int, stream: int) -> None:
        assert (num_bytes, kind, stream) == (8, 1, 77)
        queued[to] = ctypes.c_uint64.from_address(source).value

    stream = SimpleNamespace(ptr=77, synchronize=lambda: written.update(queued))
    fake = SimpleNamespace(
        runtime=SimpleNamespace(memcpyAsync=copy, memcpyHostToDevice=1),
        Device=lambda device: nullcontext(),
        Stream=lambda non_blocking: stream,
    )
    monkeypatch.setattr(cupy, "cuda", fake)
    room: Any = Room.__new__(Room)
    room._group, room._device = SimpleNamespace(rank=1, size=3), 0
    room.slabs = SimpleNamespace(ptrs=[0x1000, 0x2000, 0x3000])
    room.abort_all()
    offset = cuda_layout.constants(3)["kOffsetAbort"]
    assert written == {0x1000 + offset: 2, 0x2000 + offset: 2, 0x3000 + offset: 2}
