"""Which ranks a command runs on: those mpiexec started, or threads of this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TypeVar

from epcomm.group import Group, as_group, run_threads

T = TypeVar("T")

DEFAULT_NUM_THREADS = 4

#: By which MPI launchers (Hydra, Open MPI, PMIx, MVAPICH) tell a process that it is a rank.
_RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK")


def is_mpi_rank() -> bool:
    """Return whether an MPI launcher started this process."""
    return "mpi4py" in sys.modules or any(name in os.environ for name in _RANK_VARIABLES)


def launched_group() -> Group | None:
    """Return the group of the ranks that mpiexec started, or None where it did not."""
    if not is_mpi_rank():
        return None
    from mpi4py import MPI

    return as_group(MPI.COMM_WORLD)


def run_on_ranks(fn: Callable[[Group], T], num_threads: int | None) -> list[T]:
    """Call a function on every rank of this process; return what the calls returned.

    Args:
        fn: Called with each rank's group.
        num_threads: Ranks as threads of this process; None takes the ranks that mpiexec started,
            or `DEFAULT_NUM_THREADS` threads where it did not.
    """
    group = launched_group() if num_threads is None else None
    if group is not None:
        return [fn(group)]
    return run_threads(fn, DEFAULT_NUM_THREADS if num_threads is None else num_threads)
