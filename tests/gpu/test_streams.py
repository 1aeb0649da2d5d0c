"""Calls on a caller's stream, whose outputs are consumed at once: 1,000 rounds, changing data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from launch import Result

FRAMES = {"cupy": "cupy", "torch-cuda": "torch"}
pytestmark = [pytest.mark.gpu(4), pytest.mark.timeout(90)]
frames = pytest.mark.parametrize("frame", list(FRAMES))


@frames
def test_consumers_behind_the_event(mpiexec: Callable[..., Result], frame: str) -> None:
    pytest.importorskip(FRAMES[frame], reason=f"{FRAMES[frame]} is not installed")
    mpiexec("gpu_streams", 4, frame, "--rounds", 1000, timeout_s=80)


@frames
def test_the_stream_that_is_current_at_the_wait_waits(
    mpiexec: Callable[..., Result], frame: str
) -> None:
    pytest.importorskip(FRAMES[frame], reason=f"{FRAMES[frame]} is not installed")
    mpiexec("gpu_streams", 4, frame, "--rounds", 200, "--wait-elsewhere", timeout_s=80)
