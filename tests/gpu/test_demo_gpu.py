"""The demo on CuPy arrays: its reference's losses and gradients, and the host engine's losses."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from gpus import on_gpus
from launch import Result

SMALL = "--batch=32 --hidden=32 --expert-hidden=32 --experts=12 --steps=5"


def first_loss(result: Result) -> float:
    found = re.search(r"loss ([\d.]+) ->", result.stdout)
    assert found is not None, result
    return float(found[1])


@pytest.mark.timeout(120)
@on_gpus(1, 2, 3, 4)
def test_demo_agrees_with_its_reference(mpiexec: Callable[..., Result], num_ranks: int) -> None:
    arguments = ("demo_check", num_ranks, *SMALL.split())
    with_cuda = mpiexec(*arguments, timeout_s=110, env={"EPCOMM_ENGINE": "cuda"})
    with_host = mpiexec(*arguments, timeout_s=60, env={"EPCOMM_ENGINE": "host"})
    assert "check passed: " in with_cuda.stdout
    assert first_loss(with_cuda) == pytest.approx(first_loss(with_host), abs=0.002)
