"""How a piece of a slab is divided into arrays: the one place that knows offsets on the host."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

#: Name of an array, its shape, and its dtype.
Spec = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]

_ALIGNMENT = 64


class Sections:
    """Arrays that lie one after the other in a slab.

    Args:
        spec: The arrays, in order.
        start: Byte where the first begins.
    """

    def __init__(self, spec: Spec, start: int = 0) -> None:
        self.spec = spec
        self._offsets: dict[str, int] = {}
        end = start
        for name, (shape, dtype) in spec.items():
            self._offsets[name] = end
            num_bytes = math.prod(shape) * dtype.itemsize
            end += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        #: Byte after the last array.
        self.end = end

    def offset(self, name: str) -> int:
        """Return the byte where an array begins."""
        return self._offsets[name]

    def view(self, slab: npt.NDArray[np.uint8], name: str) -> npt.NDArray[Any]:
        """Return one of the arrays in a slab."""
        shape, dtype = self.spec[name]
        start = self._offsets[name]
        num_bytes = math.prod(shape) * dtype.itemsize
        return slab[start : start + num_bytes].view(dtype).reshape(shape)


def row_dtype(row_bytes: int) -> np.dtype[Any]:
    """Return a dtype whose one element is a whole row, so that NumPy moves rows with memcpy."""
    return np.dtype((np.void, row_bytes))


def as_rows(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """View ``[num_rows, ...]``, contiguous, as ``[num_rows]`` whole rows."""
    row_bytes = math.prod(array.shape[1:]) * array.dtype.itemsize
    if array.shape[0] == 0 or row_bytes == 0:
        return np.empty(array.shape[0], row_dtype(row_bytes))
    return array.reshape(array.shape[0], -1).view(np.uint8).view(row_dtype(row_bytes))[:, 0]


def gather_rows(rows: npt.NDArray[Any], idx: npt.NDArray[np.int64], out: npt.NDArray[Any]) -> None:
    """Copy ``rows[idx]`` to ``out``, one memcpy a row. All ``[n]`` from `as_rows`."""
    # NOTE: with mode="raise" NumPy would gather into a temporary first.
    if len(idx):
        np.take(rows, idx, out=out, mode="clip")
