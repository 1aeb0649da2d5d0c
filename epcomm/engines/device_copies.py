"""Copies between one GPU and pinned memory of the host."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import cupy
import numpy as np
import numpy.typing as npt


class DeviceCopies:
    """See `epcomm.engines.staged.Copies`.

    Pinned memory comes from CuPy's pool, which keeps what is given back for the next call.

    Args:
        device: Number of the GPU.
    """

    def __init__(self, device: int) -> None:
        self._device = device
        with self.active():
            self.comm_stream: Any = cupy.cuda.Stream(non_blocking=True)

    def active(self) -> AbstractContextManager[Any]:
        """See `Copies.active`."""
        device: AbstractContextManager[Any] = cupy.cuda.Device(self._device)
        return device

    def empty_on_host(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """See `Copies.empty_on_host`."""
        memory = cupy.cuda.alloc_pinned_memory(max(1, num_bytes))
        return np.frombuffer(memory, np.uint8, count=num_bytes)

    def empty_on_device(self, num_bytes: int) -> Any:
        """See `Copies.empty_on_device`: not from a pool, whose last user may not be done yet."""
        return cupy.cuda.Memory(num_bytes)

    def to_host(self, ptr: int, memory: npt.NDArray[np.uint8], stream: int) -> None:
        """See `Copies.to_host`."""
        runtime = cupy.cuda.runtime
        runtime.memcpyAsync(
            memory.ctypes.data, ptr, memory.nbytes, runtime.memcpyDeviceToHost, stream
        )

    def to_device(self, memory: npt.NDArray[np.uint8], ptr: int, stream: int) -> None:
        """See `Copies.to_device`."""
        runtime = cupy.cuda.runtime
        runtime.memcpyAsync(
            ptr, memory.ctypes.data, memory.nbytes, runtime.memcpyHostToDevice, stream
        )

    def synchronize(self, stream: int) -> None:
        """See `Copies.synchronize`."""
        cupy.cuda.runtime.streamSynchronize(stream)
