"""What all tests share: the mpiexec launcher, the gpu mark, hypothesis settings."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import hypothesis
import pytest
from launch import Result, find_mpiexec, run_ranks

# Shared machines are slow at times: no example fails for its duration.
hypothesis.settings.register_profile("epcomm", deadline=None)
hypothesis.settings.load_profile("epcomm")


@pytest.fixture(scope="session")
def mpiexec() -> Callable[..., Result]:
    """Run a program of tests/ranks under mpiexec: see launch.run_ranks for its arguments."""
    if find_mpiexec() is None:
        pytest.skip("no mpiexec beside this Python or on PATH: pip install mpich")
    return run_ranks


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked ``gpu(n)`` where CuPy can use fewer than n GPUs."""
    mark = item.get_closest_marker("gpu")
    if mark is None:
        return
    (needed,) = mark.args
    if needed > num_gpus():
        pytest.skip(f"needs {needed} GPU(s) that CuPy can use, found {num_gpus()}")


@cache
def num_gpus() -> int:
    """Return how many GPUs CuPy can use; CuPy is imported at the first call, not before."""
    try:
        import cupy
    except ImportError:
        return 0
    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError:
        return 0
