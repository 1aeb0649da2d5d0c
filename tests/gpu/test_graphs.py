"""Dispatch and combine in CUDA graphs of CuPy and torch: 1,000 replays with changing data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from gpus import on_gpus
from launch import Result

FRAMES = {"cupy": "cupy", "torch-cuda": "torch"}


@pytest.mark.timeout(90)
@pytest.mark.parametrize("mode", ["worst", "cached"])
@pytest.mark.parametrize("frame", list(FRAMES))
@on_gpus(2, 4)
def test_replays_follow_their_inputs(
    mpiexec: Callable[..., Result], num_ranks: int, frame: str, mode: str
) -> None:
    pytest.importorskip(FRAMES[frame], reason=f"{FRAMES[frame]} is not installed")
    mpiexec("gpu_graphs", num_ranks, frame, mode, timeout_s=80)
