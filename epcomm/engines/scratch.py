"""Memory for intermediate results that is kept from call to call."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt


class Scratch:
    """Uninitialised arrays by name, each made once at its largest size."""

    def __init__(self) -> None:
        self._arrays: dict[str, npt.NDArray[np.uint8]] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Return an array, valid until the next `take` of this name."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if name not in self._arrays or self._arrays[name].size < num_bytes:
            self._arrays[name] = np.empty(num_bytes, np.uint8)
        return self._arrays[name][:num_bytes].view(dtype).reshape(shape)

    def clear(self) -> None:
        """Let go of all memory."""
        self._arrays.clear()
