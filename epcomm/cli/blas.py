"""Sharing the processors between ranks: each rank's matrix products take its part, not all.

NumPy's BLAS starts as many threads as there are processors. Where every rank does, they wait for
each other more than they compute: on 2 processors, 4 ranks took 13 times as long as with one
thread each. OMP_NUM_THREADS helps as well, but only from before NumPy is imported.
"""

from __future__ import annotations

import importlib.util
import os
import socket

from epcomm.group import Group

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def share_processors(group: Group) -> str:
    """Limit the BLAS of this process to the rank's part of its host's processors. Collective.

    Never raises a limit. The limit stays for the rest of the process.

    Returns:
        What to tell the user: empty, or how to get the library that this needs.
    """
    hosts = group.allgather(socket.gethostname(), phase="demo: hosts")
    num_ranks = hosts.count(hosts[group.rank])
    if num_ranks == 1:
        return ""
    if importlib.util.find_spec("threadpoolctl") is None:
        if any(name in os.environ for name in _THREAD_VARIABLES):
            return ""
        return (
            "threadpoolctl is not installed, so the ranks' matrix products compete for the "
            "processors: pip install 'epcomm[demo]', or set OMP_NUM_THREADS=1"
        )
    from threadpoolctl import threadpool_info, threadpool_limits

    limit = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    # NOTE: every thread that plays a rank does it for itself: some libraries keep a limit a thread.
    threadpool_limits(
        [
            library | {"num_threads": min(limit, library["num_threads"])}
            for library in threadpool_info()
            if library["user_api"] == "blas"
        ]
    )
    return ""
