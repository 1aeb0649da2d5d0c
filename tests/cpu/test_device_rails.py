"""Rows of GPUs between nodes, on GPUs that are none: failures, runs of rows, words of rows."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import contract  # noqa: F401  (puts tests/ranks on the path)
import numpy as np
import pytest

from epcomm import CommTimeout, InvalidArgument, TransportError
from epcomm.arrays import CPU, ArrayView
from epcomm.engines.device_rail_moves import DeviceMoves
from epcomm.engines.device_rail_routes import Run, find_runs
from epcomm.topology import Topology

fake_gpu = importlib.import_module("fake_gpu")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (InvalidArgument("no"), [1]),
        (ValueError("no"), [1]),
        (KeyboardInterrupt(), [1]),
        # Of these the node has been told where they were found.
        (TransportError("no"), []),
        (CommTimeout("rows", 1, [0], 1.0), []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_call_that_fails_tells_its_node_and_leaves_no_work(
    error: BaseException, told: list[int]
) -> None:
    failed: list[int] = []
    with fake_gpu.FakeFrame("torch").in_use():
        call_stream = fake_gpu.FakeStream()
        engine: Any = SimpleNamespace(call_stream=lambda: call_stream.ptr, fail=failed.append)
        topology = Topology(1, (0, 1))
        moves = DeviceMoves(topology, engine, fake_gpu.FakeRowCopies(), CPU, False)
        done: list[str] = []

        def fail() -> None:
            call_stream.add(lambda: done.append("kernel"))
            moves._to_host.add(lambda: done.append("to host"))
            moves._to_device.add(lambda: done.append("to device"))
            raise error

        with pytest.raises(type(error)), moves._copying():
            fail()
    assert failed == told
    assert sorted(done) == ["kernel", "to device", "to host"]


@pytest.mark.parametrize("has_pointers", [False, True])
def test_staging_memory_is_of_the_gpu_of_the_rank(has_pointers: bool) -> None:
    """FakeCopies refuses to allocate where another GPU may be current."""
    engine: Any = None
    copies = fake_gpu.FakeRowCopies()
    moves = DeviceMoves(Topology(0, (0, 1)), engine, copies, CPU, has_pointers)
    assert moves.empty(24).size == 24


@pytest.mark.parametrize(
    ("ranks", "num_arriving", "want"),
    [
        ((0, 1), [2, 3, 4, 1], [(0, 5)]),
        ((1, 2, 3), [2, 3, 4, 1], [(2, 8)]),
        ((0, 2), [2, 3, 4, 1], [(0, 2), (5, 4)]),
        ((1, 3), [2, 3, 4, 1], [(2, 3), (9, 1)]),
        ((0, 2), [2, 0, 4, 1], [(0, 6)]),
        ((1, 3), [0, 3, 4, 0], [(0, 3)]),
        ((0, 1), [0, 0, 4, 1], [(0, 0)]),
    ],
)
def test_runs_of_rows(
    ranks: tuple[int, ...], num_arriving: list[int], want: list[tuple[int, int]]
) -> None:
    assert find_runs(ranks, np.array(num_arriving)) == [Run(*run) for run in want]


@pytest.mark.parametrize(
    ("ptr", "shape", "strides", "dtype", "want"),
    [
        (4096, (3, 8), (16, 2), "u2", ((3, 2), (16, 8), "u8")),
        (4096, (3, 6), (12, 2), "u2", ((3, 3), (12, 4), "u4")),
        (4096, (3, 7), (8, 1), "u1", ((3, 7), (8, 1), "u1")),
        (4100, (3, 8), (16, 2), "u2", ((3, 4), (16, 4), "u4")),
        (4098, (3, 8), (16, 2), "u2", ((3, 8), (16, 2), "u2")),
        (4096, (3, 8), (20, 2), "u2", ((3, 4), (20, 4), "u4")),
        (4096, (3, 8), (48, 6), "u2", ((3, 8), (48, 6), "u2")),  # columns apart
        (4096, (3, 1), (4, 12), "f4", ((3, 1), (4, 4), "u4")),
    ],
)
def test_words_of_rows(
    ptr: int, shape: tuple[int, int], strides: tuple[int, int], dtype: str, want: Any
) -> None:
    """As wide as rows, their distance and their address allow."""
    copies = pytest.importorskip("epcomm.engines.device_copies", reason="CuPy is not installed")
    found = copies._widest(ArrayView(ptr, shape, strides, np.dtype(dtype), CPU, False, None))
    assert (found.ptr, found.shape, found.strides, found.dtype) == (ptr, *want)
