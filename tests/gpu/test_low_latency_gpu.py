"""Low-latency calls on GPUs: 10,000 replays, graphs in turn, hooks, masks, deadlines."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from gpus import on_gpus
from launch import Result

FRAMES = {"cupy": "cupy", "torch-cuda": "torch"}
GRAPHS = ("graph", "hooks", "two-shapes", "mixed")
pytestmark = pytest.mark.timeout(90)


@pytest.mark.parametrize("mode", GRAPHS)
@pytest.mark.parametrize("frame", list(FRAMES))
@on_gpus(2, 4)
def test_replays_follow_their_inputs(
    mpiexec: Callable[..., Result], num_ranks: int, frame: str, mode: str
) -> None:
    pytest.importorskip(FRAMES[frame], reason=f"{FRAMES[frame]} is not installed")
    mpiexec("gpu_decode", num_ranks, frame, mode, timeout_s=80)


@pytest.mark.parametrize("mode", ["overlap", "shrink", "gone"])
@on_gpus(2, 4)
def test_ranks_that_are_late(mpiexec: Callable[..., Result], num_ranks: int, mode: str) -> None:
    mpiexec("gpu_decode", num_ranks, "cupy", mode, timeout_s=80)
