"""Between nodes with rows on GPUs: one host is split into nodes, whose ranks share no slab."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from gpus import PROGRAMS, frames, need
from launch import Result

Mpiexec = Callable[..., Result]

TIMEOUT_S = 170.0
pytestmark = pytest.mark.timeout(180)


@pytest.mark.parametrize(
    ("num_ranks", "ranks_per_node"),
    [
        pytest.param(num_ranks, ranks_per_node, marks=pytest.mark.gpu(num_gpus))
        for num_ranks, ranks_per_node, num_gpus in ((2, 1, 1), (2, 1, 2), (4, 2, 2), (4, 1, 4))
    ],
)
@frames
def test_contract(mpiexec: Mpiexec, frame: str, num_ranks: int, ranks_per_node: int) -> None:
    """Ranks beyond the number of GPUs share them, and take turns."""
    need(frame)
    arguments = (frame, "--engine", "auto", *PROGRAMS["throughput"])
    env = {"EPCOMM_RANKS_PER_NODE": str(ranks_per_node)}
    mpiexec("gpu_contract", num_ranks, *arguments, timeout_s=TIMEOUT_S, env=env)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("frame", ["cupy", "torch-cuda"])
def test_consumers_behind_the_event(mpiexec: Mpiexec, frame: str) -> None:
    need(frame)
    env = {"EPCOMM_RANKS_PER_NODE": "1"}
    arguments = (frame, "--engine", "auto", "--rounds", 200)
    mpiexec("gpu_streams", 2, *arguments, timeout_s=TIMEOUT_S, env=env)


@pytest.mark.gpu(2)
def test_random_rounds(mpiexec: Mpiexec) -> None:
    env = {"EPCOMM_RANKS_PER_NODE": "1"}
    arguments = ("--frame", "cupy", "--engine", "auto", "--seconds", 10)
    mpiexec("gpu_soak", 2, *arguments, timeout_s=TIMEOUT_S, env=env)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("place", ["rows", "sums"])
def test_stuck_node_ends_the_others(mpiexec: Mpiexec, place: str) -> None:
    env = {"EPCOMM_RANKS_PER_NODE": "2", "EPCOMM_ENGINE": "cuda"}
    mpiexec("rails_fail", 4, "stuck", place, "--gpus", timeout_s=60, env=env)
