"""Launching: the only place that starts a kernel."""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from typing import Any

from epcomm.gpus import current_gpu, load_cupy
from epcomm.jit.compile import load_function
from epcomm.jit.kernels import KernelSpec

#: CUDA takes no more on any GPU, before CUDA 12.1.
_MAX_ARGUMENT_BYTES = 4096


class _Thread(threading.local):
    """What each thread launches with, made at its first launch.

    Attributes:
        argument: Memory for a kernel's argument. CUDA copies it at the launch, during which other
            threads run.
        pointers: Address of the array of pointers to all arguments, of which there is one.
    """

    def __init__(self) -> None:
        # NOTE: the driver launches in the context that is current in this thread, and the runtime
        # makes none current before a thread asks it for something.
        load_cupy().cuda.runtime.setDevice(current_gpu())
        memory = (ctypes.c_char * _MAX_ARGUMENT_BYTES)()
        self.argument = memoryview(memory).cast("B")
        self._array = ctypes.c_void_p(ctypes.addressof(memory))
        self.pointers = ctypes.addressof(self._array)


@cache
def _threads() -> _Thread:
    # At the first launch: importing this module needs no GPU.
    return _Thread()


def launch(
    spec: KernelSpec,
    *,
    stream: Any,
    num_blocks: int,
    num_threads: int,
    params: bytes,
    shared_bytes: int = 0,
) -> None:
    """Start a kernel on a stream of the current device.

    Args:
        spec: The kernel; compiled at its first use.
        stream: A cupy.cuda.Stream, or anything with its ``ptr``.
        num_blocks: Blocks of the grid.
        num_threads: Threads of a block.
        params: The one by-value argument: the kernel's struct.
        shared_bytes: Dynamic shared memory of a block.
    """
    function = load_function(spec, shared_bytes)
    thread = _threads()
    thread.argument[: len(params)] = params
    load_cupy().cuda.driver.launchKernel(
        function, num_blocks, 1, 1, num_threads, 1, 1, shared_bytes, stream.ptr, thread.pointers, 0
    )
