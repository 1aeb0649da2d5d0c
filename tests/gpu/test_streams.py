"""Calls on a caller's stream, whose outputs are consumed at once: 1,000 rounds, changing data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from gpus import on_gpus
from launch import Result

FRAMES = {"cupy": "cupy", "torch-cuda": "torch"}
pytestmark = pytest.mark.timeout(90)
frames = pytest.mark.parametrize("frame", list(FRAMES))


@frames
@on_gpus(2, 4)
def test_consumers_behind_the_event(
    mpiexec: Callable[..., Result], num_ranks: int, frame: str
) -> None:
    pytest.importorskip(FRAMES[frame], reason=f"{FRAMES[frame]} is not installed")
    mpiexec("gpu_streams", num_ranks, frame, "--rounds", 1000, timeout_s=80)


@frames
@on_gpus(2, 4)
def test_the_stream_that_is_current_at_the_wait_waits(
    mpiexec: Callable[..., Result], num_ranks: int, frame: str
) -> None:
    pytest.importorskip(FRAMES[frame], reason=f"{FRAMES[frame]} is not installed")
    mpiexec("gpu_streams", num_ranks, frame, "--rounds", 200, "--wait-elsewhere", timeout_s=80)
