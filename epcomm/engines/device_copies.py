"""Copies between one GPU and pinned memory of the host, and of rows on that GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import cupy
import numpy as np
import numpy.typing as npt

from epcomm.arrays import ArrayView


class DeviceCopies:
    """See `epcomm.engines.staged.Copies` and `epcomm.engines.row_copies.RowCopies`.

    Pinned memory comes from CuPy's pool, which keeps what is given back for the next call.

    Args:
        device: Number of the GPU.
    """

    def __init__(self, device: int) -> None:
        self._device = device
        with self.active():
            self.comm_stream: Any = cupy.cuda.Stream(non_blocking=True)
        self._pool = cupy.cuda.MemoryPool()

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

    def new_stream(self) -> Any:
        """See `RowCopies.new_stream`."""
        return cupy.cuda.Stream(non_blocking=True)

    def empty_in_pool(self, num_bytes: int) -> Any:
        """See `RowCopies.empty_in_pool`."""
        return self._pool.malloc(num_bytes)

    def bytes_on_device(self, num_bytes: int) -> Any:
        """See `RowCopies.bytes_on_device`: an allocation of its own, which MPI may register."""
        memory = cupy.cuda.Memory(max(1, num_bytes))
        return cupy.ndarray((num_bytes,), np.uint8, cupy.cuda.MemoryPointer(memory, 0))

    def address(self, memory: Any) -> int:
        """See `RowCopies.address`."""
        on_host = isinstance(memory, np.ndarray)
        return int(memory.ctypes.data if on_host else memory.data.ptr)

    def copy(self, source: int, to: int, num_bytes: int, stream: int) -> None:
        """See `RowCopies.copy`."""
        runtime = cupy.cuda.runtime
        # CUDA knows by an address where it is.
        runtime.memcpyAsync(to, source, num_bytes, runtime.memcpyDefault, stream)

    def set_bits(self, ptr: int, num_bytes: int, stream: int) -> None:
        """See `RowCopies.set_bits`."""
        cupy.cuda.runtime.memsetAsync(ptr, 0xFF, num_bytes, stream)

    def gather(self, rows: ArrayView, idx: ArrayView, to: int, stream: int) -> None:
        """See `RowCopies.gather`."""
        if not idx.shape[0] or not rows.shape[1]:
            return
        source = self._array(_widest(rows))
        shape = (idx.shape[0], source.shape[1])
        out = cupy.ndarray(shape, source.dtype, self._pointer(to, idx))
        with _stream(stream):
            cupy.take(source, self._array(idx), axis=0, out=out)

    def look_up(self, table: ArrayView, idx: ArrayView, stream: int) -> None:
        """See `RowCopies.look_up`."""
        if not idx.num_bytes:
            return
        choices = self._array(idx)
        with _stream(stream):
            choices[...] = cupy.take(self._array(table), choices)

    def _array(self, view: ArrayView) -> Any:
        return cupy.ndarray(view.shape, view.dtype, self._pointer(view.ptr, view), view.strides)

    def _pointer(self, ptr: int, owner: Any) -> Any:
        # Of what lies behind the pointer CuPy need not know the size: nothing checks it.
        memory = cupy.cuda.UnownedMemory(ptr, 1 << 62, owner, self._device)
        return cupy.cuda.MemoryPointer(memory, 0)

    def synchronize(self, stream: int) -> None:
        """See `Copies.synchronize`."""
        cupy.cuda.runtime.streamSynchronize(stream)


class _Handle:
    """A stream of whoever, by the protocol with which CUDA libraries share them."""

    def __init__(self, ptr: int) -> None:
        self._ptr = ptr

    def __cuda_stream__(self) -> tuple[int, int]:
        """Return the protocol's version and the stream's handle."""
        return 0, self._ptr


def _stream(ptr: int) -> AbstractContextManager[Any]:
    """Return the context in which CuPy works on a stream."""
    made: AbstractContextManager[Any]
    if hasattr(cupy.cuda.Stream, "from_external"):
        made = cupy.cuda.Stream.from_external(_Handle(ptr))
    else:  # CuPy before 14
        made = cupy.cuda.ExternalStream(ptr)
    return made


def _widest(rows: ArrayView) -> ArrayView:
    """View rows as the widest words that they are made of: fewer to move."""
    num_columns, itemsize = rows.shape[1], rows.dtype.itemsize
    row_bytes = num_columns * itemsize
    if rows.strides[1] != itemsize and num_columns > 1:
        return rows._replace(dtype=np.dtype(f"u{itemsize}"))
    aligned = row_bytes | rows.strides[0] | rows.ptr
    width = next(width for width in (8, 4, 2, 1) if aligned % width == 0)
    return rows._replace(
        shape=(rows.shape[0], row_bytes // width),
        strides=(rows.strides[0], width),
        dtype=np.dtype(f"u{width}"),
    )
