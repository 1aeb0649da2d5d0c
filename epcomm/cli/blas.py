"""Sharing the processors between ranks: each rank's matrix products take its part, not all.

NumPy's BLAS starts as many threads as there are processors. Where every rank does, they wait for
each other more than they compute: on 2 processors, 4 ranks took 13 times as long as with one
thread each. The usual cure, OMP_NUM_THREADS, only works before NumPy is imported.
"""

from __future__ import annotations

import ctypes
import os
import socket
from pathlib import Path

from epcomm.group import Group

# By NumPy's own wheels, new and old, and by Linux distributions.
OPENBLAS_NAMES = (
    "scipy_openblas_{}_num_threads64_",
    "scipy_openblas_{}_num_threads",
    "openblas_{}_num_threads64_",
    "openblas_{}_num_threads",
)


def share_processors(group: Group) -> None:
    """Limit this process's OpenBLAS to the rank's part of its host's processors.

    Never raises a limit, and does nothing where NumPy uses another BLAS. The limit stays for the
    rest of the process. Collective.
    """
    hosts = group.allgather(socket.gethostname(), phase="demo: hosts")
    try:
        num_processors = len(os.sched_getaffinity(0))
        maps = Path("/proc/self/maps").read_text()
    except (AttributeError, OSError):  # not Linux
        return
    limit = max(1, num_processors // hosts.count(hosts[group.rank]))
    for path in {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "openblas" in line}:
        _limit_threads(path, limit)


def _limit_threads(path: str, limit: int) -> None:
    """Lower the number of threads of an OpenBLAS library that is already loaded."""
    library = ctypes.CDLL(path)
    for name in OPENBLAS_NAMES:
        get = getattr(library, name.format("get"), None)
        put = getattr(library, name.format("set"), None)
        if get is not None and put is not None:
            if get() > limit:
                put(limit)
            return
