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
    mpiexec: Callable[..., Result],
    program: str,
    num_ranks: int,
    frame: str = "numpy",
    *,
    programs: tuple[str, ...] = PROGRAMS,
    ranks_per_node: int = 0,
) -> list[str]:
    """Return each rank's digest of all outputs.

    Args:
        mpiexec: The fixture of that name.
        program: The program to tell of.
        num_ranks: Ranks to start.
        frame: The kind of arrays, one of `frames.FRAMES`.
        programs: All that run in the same start, in this order; they start once for all of them.
        ranks_per_node: Ranks that count as a node; 0 where all are one.

    Raises:
        AssertionError: The program did not pass on every rank, or all did and the launch failed.
    """
    is_good, told = _launch(mpiexec, num_ranks, frame, programs, ranks_per_node)
    found = dict(re.findall(rf"EPCOMM-DIGEST {program} (\d+) (\w+)", told))
    passed = {name for name in programs if told.count(f"EPCOMM-DIGEST {name} ") == num_ranks}
    if program not in passed or (passed == set(programs) and not is_good):
        raise AssertionError(told)
    return [found[str(rank)] for rank in range(num_ranks)]


@cache
def _launch(
    mpiexec: Callable[..., Result],
    num_ranks: int,
    frame: str,
    programs: tuple[str, ...],
    ranks_per_node: int,
) -> tuple[bool, str]:
    """Run programs in one start; return whether it ended well, and what was printed."""
    env = {"EPCOMM_RANKS_PER_NODE": str(ranks_per_node)} if ranks_per_node else None
    arguments = ("contract_programs", num_ranks, "--frame", frame, *programs)
    try:
        return True, mpiexec(*arguments, env=env, timeout_s=240.0).stdout
    except AssertionError as error:
        return False, str(error)
