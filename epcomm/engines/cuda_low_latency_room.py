"""The slabs of low-latency calls on GPUs: slots as large as the calls so far have needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cupy
import numpy as np

from epcomm import cuda_layout
from epcomm.arrays import ArrayView, gpu
from epcomm.cuda_slab import CudaSlabs
from epcomm.engines import cuda_params
from epcomm.errors import InvalidArgument, TransportError
from epcomm.group import Group

NUM_SLOTS = 2


class Slab:
    """One generation of slabs, and the device memory that its calls count in. Collective."""

    def __init__(self, group: Group, device: int, rows_bytes: int, timeout_s: float) -> None:
        self.rows_bytes = rows_bytes = -(-rows_bytes // 256) * 256
        self.first_row = cuda_layout.low_latency_rows_offset(group.size)
        num_bytes = cuda_layout.low_latency_slab_bytes(group.size, rows_bytes)
        self.slabs = CudaSlabs(group, device, num_bytes, self.first_row, timeout_s)
        self.bases = (*self.slabs.ptrs, *(0,) * (cuda_layout.MAX_RANKS - group.size))
        self.state = cupy.zeros(cuda_params.LOW_LATENCY_STATE.itemsize, np.uint8)
        cupy.cuda.runtime.deviceSynchronize()


class LowLatencyRoom:
    """Where low-latency calls run. Construction is collective.

    Slabs grow when a call needs more. Old ones stay until the end: results that wait for their
    hook, and captured graphs, go on using them, each generation with epochs of its own.

    Args:
        group: The ranks, all on one node.
        device: This rank's GPU, current in this thread.
        num_bytes: Bytes to reserve for all slots' rows.
        timeout_s: Deadline of every wait, in seconds.
        masks: ``[num_ranks] int32`` of CuPy: which ranks are masked.
        is_capturing: Tells whether the stream of the call in hand is being captured.
        before_growth: Waits until this rank's calls are done, and raises what failed in them.
    """

    def __init__(
        self,
        group: Group,
        device: int,
        num_bytes: int,
        timeout_s: float,
        masks: Any,
        is_capturing: Callable[[], bool],
        before_growth: Callable[[], None],
    ) -> None:
        self._group, self._device, self._timeout_s = group, device, timeout_s
        self._masks = masks
        self._is_capturing, self._before_growth = is_capturing, before_growth
        self._old: list[Slab] = []
        self._slab: Slab | None = None
        if num_bytes:
            self._slab = self._new_slab(-(-num_bytes // NUM_SLOTS))

    def _new_slab(self, rows_bytes: int) -> Slab:
        return Slab(self._group, self._device, rows_bytes, self._timeout_s)

    def _all(self) -> list[Slab]:
        return [*self._old, *([self._slab] if self._slab else [])]

    def num_bytes(self) -> int:
        """Return the bytes that this rank holds."""
        return sum(slab.slabs.num_bytes for slab in self._all())

    def rows(self) -> ArrayView:
        """Return the rows of all slots: what lies before them are the cells of calls."""
        slab = self._slab
        size = NUM_SLOTS * slab.rows_bytes if slab else 0
        ptr = slab.slabs.ptrs[self._group.rank] + slab.first_row if slab else 0
        return ArrayView(
            ptr=ptr,
            shape=(size,),
            strides=(1,),
            dtype=np.dtype(np.uint8),
            device=gpu(self._device),
            is_readonly=False,
            owner=slab.slabs if slab else None,
        )

    def make(self, name: str, needed: int, agree: Callable[[Slab], None]) -> Slab:
        """Return slabs with room for a call. Collective where they grow.

        Args:
            name: Of the Buffer's method.
            needed: Bytes of rows that a slot needs.
            agree: Launches a kernel, on the slabs so far, that compares the call in hand on all
                ranks. Ranks that agree all need more room; one that does not would wait for the
                others in vain.
        """
        slab = self._slab
        if slab is not None and slab.rows_bytes >= needed:
            return slab
        hint = NUM_SLOTS * needed
        if self._is_capturing():
            raise InvalidArgument(
                f"{name} needs {hint} bytes of slots, which cannot grow while a graph is captured. "
                f"Pass num_rdma_bytes={hint} or more when making the Buffer, see "
                "get_low_latency_rdma_size_hint, or make the call once before. Nothing was sent."
            )
        # First, so that an earlier call's failure is raised before any peer is met.
        self._before_growth()
        if slab is not None:
            agree(slab)
            self._before_growth()  # raises where ranks differ
            if self._masks.get().any():
                raise TransportError(
                    f"{name} needs {hint} bytes of slots, and they cannot grow while a rank is "
                    f"masked: growing takes all ranks. Pass num_rdma_bytes={hint} when making the "
                    "Buffer."
                )
        # Every rank comes to the same decision: the shape is the same on all.
        new = self._new_slab(needed)
        if slab is not None:
            self._old.append(slab)
        self._slab = new
        return new

    def close(self, is_collective: bool) -> None:
        """Let go of the memory; no call may be running."""
        for slab in self._all():
            slab.slabs.close(is_collective)
        self._old.clear()
        self._slab = None
