"""Late and disagreeing ranks, and too little room: errors on all ranks, and a GPU that works on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from gpus import on_gpus
from launch import Result

SCENARIOS = (
    *("late-dispatch", "late-combine", "disagree", "disagree-and-grow"),
    *("worst", "many-tokens", "one-has-many", "bad-choices", "low-latency-disagree"),
)


@pytest.mark.timeout(90)
@pytest.mark.parametrize("scenario", SCENARIOS)
@on_gpus(2, 4)
def test_a_failing_call(mpiexec: Callable[..., Result], num_ranks: int, scenario: str) -> None:
    mpiexec("gpu_fail", num_ranks, "cupy", scenario, timeout_s=80)
