"""CuPy arrays, with ml_dtypes for bf16; CuPy has no fp8, so such outputs are uint8."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import cupy
import numpy as np

from epcomm.arrays import DTYPES, ArrayView, Device, gpu
from epcomm.errors import InvalidArgument

#: What stands in for the dtypes that CuPy does not have.
_STORED_AS = {dtype: np.dtype(np.uint8) for dtype in DTYPES if "float8" in dtype.name}


class CupyFramework:
    """See `epcomm.frameworks.Framework`."""

    name = "cupy"
    is_mutable = True
    tracks_streams = False
    has_streams = True

    def owns(self, array: Any) -> bool:
        """Return whether it is a CuPy array."""
        return isinstance(array, cupy.ndarray)

    def view(self, array: Any, name: str) -> ArrayView:
        """View an input."""
        memory = array.data
        device = gpu(memory.device_id)
        return ArrayView(memory.ptr, array.shape, array.strides, array.dtype, device, False, array)

    def empty(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], device: Device, stream: int | None
    ) -> ArrayView:
        """Make memory for an output."""
        if device.kind != "cuda":
            raise InvalidArgument(f"CuPy has no memory on {device}; pass NumPy arrays there.")
        array = cupy.empty(shape, _STORED_AS.get(dtype, dtype))
        return ArrayView(array.data.ptr, shape, array.strides, dtype, device, False, array)

    def is_unchanged(self, view: ArrayView) -> bool:
        """Compare with what the array says now."""
        array = view.owner
        return (array.data.ptr, array.shape, array.strides) == (view.ptr, view.shape, view.strides)

    def finish(self, view: ArrayView) -> Any:
        """Return the CuPy array."""
        owner = view.owner
        if isinstance(owner, cupy.ndarray):
            if (owner.shape, owner.strides) == (view.shape, view.strides):
                return owner
            pointer = owner.data + (view.ptr - owner.data.ptr)
        else:
            memory = cupy.cuda.UnownedMemory(view.ptr, view.num_bytes, owner)
            pointer = cupy.cuda.MemoryPointer(memory, 0)
        dtype = _STORED_AS.get(view.dtype, view.dtype)
        return cupy.ndarray(view.shape, dtype, pointer, view.strides)

    def current_stream(self, device: Device) -> int | None:
        """Return the handle of the current stream."""
        return int(cupy.cuda.get_current_stream().ptr)

    def wait_ready(self, arrays: Iterable[Any]) -> None:
        """Nothing to wait for: arrays are ordered by the stream."""
