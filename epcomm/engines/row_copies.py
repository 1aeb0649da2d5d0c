"""What moves rows on one GPU, and between it and the host."""

from __future__ import annotations

from typing import Any, Protocol

from epcomm.arrays import ArrayView
from epcomm.engines.staged import Copies
from epcomm.rail_link import Bytes


class RowCopies(Copies, Protocol):
    """Copies to and from a GPU, and what moves rows on it."""

    def new_stream(self) -> Any:
        """Return a stream, with its handle as ``ptr``."""
        ...

    def empty_in_pool(self, num_bytes: int) -> Any:
        """As `empty_on_device`, of a pool: what comes back is given out again at once.

        So whoever asks orders what it does behind all earlier uses.
        """
        ...

    def bytes_on_device(self, num_bytes: int) -> Bytes:
        """Return memory of the GPU as an array that MPI takes."""
        ...

    def address(self, memory: Bytes) -> int:
        """Return the address of pinned memory, or of what `bytes_on_device` gave."""
        ...

    def copy(self, source: int, to: int, num_bytes: int, stream: int) -> None:
        """Queue the copy from one address to another, of the GPU or of pinned memory."""
        ...

    def set_bits(self, ptr: int, num_bytes: int, stream: int) -> None:
        """Queue what sets every bit of some memory of the GPU."""
        ...

    def gather(self, rows: ArrayView, idx: ArrayView, to: int, stream: int) -> None:
        """Queue the copy of ``rows[idx]``, row-major, to an address.

        Args:
            rows: ``[n, width]`` of any strides.
            idx: ``[m] int64``.
            to: The address.
            stream: Handle of the stream.
        """
        ...

    def look_up(self, table: ArrayView, idx: ArrayView, stream: int) -> None:
        """Queue what replaces each i of a contiguous array by ``table[i]``, -1 by the last."""
        ...
