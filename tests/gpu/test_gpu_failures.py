"""Late and disagreeing ranks, and too little room: errors on all ranks, and a GPU that works on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from launch import Result

SCENARIOS = (
    *("late-dispatch", "late-combine", "disagree", "disagree-and-grow"),
    *("worst", "many-tokens", "one-has-many"),
)


@pytest.mark.gpu(4)
@pytest.mark.timeout(90)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_failing_call(mpiexec: Callable[..., Result], scenario: str) -> None:
    mpiexec("gpu_fail", 4, "cupy", scenario, timeout_s=80)
