"""Whether the MPI library takes pointers to a GPU's memory."""

from __future__ import annotations

import ctypes
from functools import cache

from epcomm import env


@cache
def takes_device_pointers() -> bool:
    """Return whether rows of GPUs may be passed to MPI where they are.

    EPCOMM_MPI_DEVICE_POINTERS says so; else the library: by the memory kinds of MPI 4.1, or by
    ``MPIX_Query_cuda_support``, which Open MPI and MPICH have.
    """
    wanted = env.settings().mpi_device_pointers
    return _library_takes_them() if wanted is None else wanted


def _library_takes_them() -> bool:
    from mpi4py import MPI

    info = MPI.COMM_WORLD.Get_info()
    try:
        kinds = info.Get("mpi_memory_alloc_kinds") or ""
    finally:
        info.Free()
    if any(kind.partition(":")[0] == "cuda" for kind in kinds.split(",")):
        return True
    # The library may be one that mpi4py is linked to, or one that it has loaded for all.
    for loaded in (ctypes.CDLL(MPI.__file__), ctypes.CDLL(None)):
        query = getattr(loaded, "MPIX_Query_cuda_support", None)
        if query is not None:
            return bool(query())
    return False
