"""Launching: the only place that starts a kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from epcomm.jit.compile import load_function
from epcomm.jit.kernels import KernelSpec


def launch(
    spec: KernelSpec,
    *,
    stream: Any,
    num_blocks: int,
    num_threads: int,
    params: npt.NDArray[np.void],
    shared_bytes: int = 0,
) -> None:
    """Start a kernel on a stream of the current device.

    Args:
        spec: The kernel; compiled at its first use.
        stream: A cupy.cuda.Stream, or anything with its ``ptr``.
        num_blocks: Blocks of the grid.
        num_threads: Threads of a block.
        params: The one by-value argument, zero-dimensional, of the kernel's struct.
        shared_bytes: Dynamic shared memory of a block.
    """
    function = load_function(spec, shared_bytes)
    function((num_blocks,), (num_threads,), (params,), shared_bytes, stream)
