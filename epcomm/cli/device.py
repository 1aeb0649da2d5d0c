"""Where a command computes: NumPy on the processors, or CuPy on the rank's own GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from epcomm import env, topology
from epcomm.gpus import find_num_gpus
from epcomm.group import Group


@contextmanager
def array_namespace(engine: str, group: Group) -> Iterator[Any]:
    """Give the namespace of an engine's arrays: NumPy for host, CuPy for cuda. Collective.

    Inside, the rank's GPU is current, ranks of a node taking GPUs in turn.
    """
    if engine == "host":
        yield np
        return
    import cupy

    found = topology.discover(group, env.settings())
    index = found.ranks_of(found.node).index(group.rank)
    # A stream of its own: ranks that are threads would share the default one, and each its waits.
    with (
        cupy.cuda.Device(index % find_num_gpus()),
        cupy.cuda.Stream(non_blocking=True),
    ):
        yield cupy
