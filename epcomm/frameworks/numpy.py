"""NumPy arrays, with ml_dtypes for bf16 and fp8."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from epcomm.arrays import CPU, ArrayView, Device, empty_aligned, view_numpy
from epcomm.errors import InvalidArgument


class NumpyFramework:
    """See `epcomm.frameworks.Framework`."""

    name = "numpy"
    is_mutable = True
    tracks_streams = False
    has_streams = True

    def owns(self, array: Any) -> bool:
        """Return whether it is a NumPy array."""
        return isinstance(array, np.ndarray)

    def view(self, array: Any, name: str) -> ArrayView:
        """View an input."""
        if not array.dtype.isnative:
            raise InvalidArgument(
                f"{name} has byte order {array.dtype.str}; pass native byte order: "
                f"{name}.astype({name}.dtype.newbyteorder('='))."
            )
        return view_numpy(array)

    def empty(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], device: Device, stream: int | None
    ) -> ArrayView:
        """Make memory for an output."""
        if device != CPU:
            raise InvalidArgument(f"NumPy has no memory on {device}; pass CuPy arrays there.")
        return view_numpy(empty_aligned(shape, dtype))

    def is_unchanged(self, view: ArrayView) -> bool:
        """Compare with what the array says now."""
        return view.is_all_of(view.owner)

    def finish(self, view: ArrayView) -> Any:
        """Return the NumPy array."""
        return view.numpy()

    def current_stream(self, device: Device) -> int | None:
        """Return None: the CPU has no streams."""
        return None

    def wait_ready(self, arrays: Iterable[Any]) -> None:
        """Nothing to wait for: NumPy computes at once."""
