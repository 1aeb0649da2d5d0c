"""Which GPUs this process can use, asked of CuPy where it is installed."""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cache
from types import TracebackType
from typing import Any

from epcomm.errors import CudaError

#: GPUs, by compute capability times ten, that have bulk copies, and room in shared memory for the
#: rows that these keep on their way. Those of 12.0 on have less of it: 99 KiB a block.
BULK_ARCHS = range(90, 120)


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


def cuda_error_types() -> tuple[type[BaseException], ...]:
    """Return what CuPy raises when a call of CUDA fails."""
    if "cupy" not in sys.modules:
        return ()
    cuda = load_cupy().cuda
    return cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError


class CudaErrors:
    """Within it, a failed call of CUDA raises CudaError.

    Args:
        rank: Whose calls they are.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and isinstance(error, cuda_error_types()):
            raise CudaError(
                f"rank {self._rank}: CUDA failed: {error}. It may tell here of an earlier kernel, "
                "the caller's own included, and most such errors end all work of the process on "
                "its GPU: look for the first one on any rank (CUDA_LAUNCH_BLOCKING=1 shows its "
                "place), and start the job again."
            ) from error


def current_gpu() -> int:
    """Return the number of the GPU that is current in this thread."""
    number: int = load_cupy().cuda.runtime.getDevice()
    return number


def has_bulk_copies() -> bool:
    """Return whether kernels for the current GPU move rows by bulk copies through shared memory."""
    import cupy

    return int(cupy.cuda.Device().compute_capability) in BULK_ARCHS
