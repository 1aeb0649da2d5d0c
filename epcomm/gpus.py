"""Which GPUs this process can use, asked of CuPy where it is installed."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

#: Bulk copies came with compute capability 9.0.
FIRST_BULK_ARCH = 90


@cache
def load_cupy() -> Any:
    """Return CuPy, for what every call does: an import statement takes four times as long."""
    import cupy

    return cupy


@cache
def find_num_gpus() -> int:
    """Return the number of GPUs that CuPy can use; 0 without CuPy or a driver."""
    # CuPy takes a while to import: a machine without a driver need not wait for it.
    if not os.path.exists("/dev/nvidiactl") and not os.path.exists("/dev/dxg"):
        return 0
    if importlib.util.find_spec("cupy") is None:
        return 0
    import cupy

    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError:
        return 0


def current_gpu() -> int:
    """Return the number of the GPU that is current in this thread."""
    number: int = load_cupy().cuda.runtime.getDevice()
    return number


def has_bulk_copies() -> bool:
    """Return whether the current GPU has bulk copies between global and shared memory."""
    import cupy

    return int(cupy.cuda.Device().compute_capability) >= FIRST_BULK_ARCH
