"""Runs the contract programs of tests/ranks, with ranks as threads of this process or under MPI."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from functools import cache

import pytest
from launch import ROOT, Result

from epcomm import env, run_threads

# Rank programs import each other as they do under mpiexec, where their folder leads the path.
sys.path.append(str(ROOT / "tests" / "ranks"))

PROGRAMS = (
    "contract_dispatch",
    "contract_buffers",
    "contract_low_latency",
    "contract_slots",
    "contract_training",
)
#: Module of the framework that a frame needs.
NEEDS = {"numpy": "numpy", "torch": "torch", "jax": "jax", "jax64": "jax"}


def need(frame: str) -> None:
    """Skip the test where the frame's framework is not installed."""
    pytest.importorskip(NEEDS[frame], reason=f"{NEEDS[frame]} is not installed")


@cache
def run_as_threads(program: str, num_ranks: int, frame: str = "numpy") -> list[str]:
    """Return each rank's digest of all outputs. Run once for each set of arguments."""
    frames, common = importlib.import_module("frames"), importlib.import_module("common")
    module, used = importlib.import_module(program), common.frame_of(frame)
    with pytest.MonkeyPatch.context() as patch, frames.poisoned_outputs(used):
        # For Buffers that a program does not make itself, where "auto" would find GPUs.
        patch.setattr(env, "settings", lambda: env.Settings(engine="host"))
        return run_threads(lambda group: module.run(group, used, "host"), num_ranks)


def run_under_mpi(
    mpiexec: Callable[..., Result], program: str, num_ranks: int, frame: str = "numpy"
) -> list[str]:
    """Return each rank's digest of all outputs."""
    result = mpiexec(program, num_ranks, "--frame", frame)
    digests = dict(re.findall(r"EPCOMM-DIGEST (\d+) (\w+)", result.stdout))
    return [digests[str(rank)] for rank in range(num_ranks)]
