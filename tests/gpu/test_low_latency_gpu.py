"""Low-latency calls on GPUs: 10,000 replays, graphs in turn, hooks, masks, deadlines."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from launch import Result

FRAMES = {"cupy": "cupy", "torch-cuda": "torch"}
GRAPHS = ("graph", "hooks", "two-shapes", "mixed")
pytestmark = [pytest.mark.gpu(4), pytest.mark.timeout(90)]


@pytest.mark.parametrize("mode", GRAPHS)
@pytest.mark.parametrize("frame", list(FRAMES))
def test_replays_follow_their_inputs(mpiexec: Callable[..., Result], frame: str, mode: str) -> None:
    pytest.importorskip(FRAMES[frame], reason=f"{FRAMES[frame]} is not installed")
    mpiexec("gpu_decode", 4, frame, mode, timeout_s=80)


@pytest.mark.parametrize("mode", ["overlap", "shrink", "gone"])
def test_ranks_that_are_late(mpiexec: Callable[..., Result], mode: str) -> None:
    mpiexec("gpu_decode", 4, "cupy", mode, timeout_s=80)
