"""The slabs of throughput calls on GPUs: as large as the calls so far have needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from epcomm import cuda_layout
from epcomm.arrays import ArrayView, gpu
from epcomm.cuda_layout import Areas, areas_for
from epcomm.cuda_slab import CudaSlabs
from epcomm.engines import cuda_params
from epcomm.errors import InvalidArgument
from epcomm.group import Group

#: Tokens a rank that lists have room for at least; a call with more than they have is refused.
MIN_LIST_TOKENS = 8192
#: Where more bytes are reserved, lists have room for as many tokens as rows of this size.
LIST_ROW_BYTES = 1024


class Room:
    """One rank's part of all slabs, and how kernels find it. Construction is collective.

    Args:
        group: The ranks, all on one node.
        device: This rank's GPU, current in this thread.
        num_bytes: Bytes to reserve; `grow` adds to them.
        state: Address of the CallState of this rank's calls.
        record: Address of the FailureRecord that kernels write.
        timeout_s: Deadline of every wait, in seconds.
        names: What errors call each rank.
        is_capturing: Tells whether the call in hand is captured in a graph.
        agree: Meets all ranks on the GPU, with the header of the call in hand.
        settle: Waits until this rank's calls are done, and raises what failed in them.

    Attributes:
        areas: How every slab is divided.
        slabs: The slabs.
        call: What every kernel's argument begins with; it only changes when slabs grow.
    """

    def __init__(
        self,
        group: Group,
        device: int,
        num_bytes: int,
        state: int,
        record: int,
        timeout_s: float,
        names: Sequence[int],
        is_capturing: Callable[[], bool],
        agree: Callable[[bytes], None],
        settle: Callable[[], None],
    ) -> None:
        self._group, self._device, self._timeout_s = group, device, timeout_s
        self._names = names
        self._is_capturing, self._agree, self._settle = is_capturing, agree, settle
        self._state, self._record = state, record
        self._use(_first_areas(group.size, num_bytes))

    def _use(self, areas: Areas) -> None:
        self.slabs = CudaSlabs(
            self._group,
            self._device,
            areas.num_bytes,
            areas.stage_offset,
            self._timeout_s,
            self._names,
        )
        self.areas = areas
        call = np.zeros((), cuda_params.CALL)
        slabs = call["slabs"]
        slabs["base"][: self._group.size] = self.slabs.ptrs
        for name in ("lists", "flags", "stage_flags", "stage", "slots"):
            slabs[f"{name}_offset"] = getattr(areas, f"{name}_offset")
        for name in ("stage_bytes", "slot_bytes", "list_tokens", "flag_units", "stage_flag_units"):
            slabs[name] = getattr(areas, name)
        call["state"], call["record"] = self._state, self._record
        call["timeout_ns"] = int(self._timeout_s * 1e9)
        call["rank"] = self._group.rank
        self.call = call.tobytes()[: cuda_params.CALL_BYTES]

    def needs(self, num_tokens: int, staged_row_bytes: int, slot_row_bytes: int) -> Areas:
        """Return what a call needs of all slabs; see `epcomm.cuda_layout.areas_for`."""
        return areas_for(self._group.size, num_tokens, staged_row_bytes, slot_row_bytes)

    def check(self, needed: Areas) -> None:
        """Refuse a call that needs more than there is."""
        if not self.areas.has_room_for(needed):
            raise self._refusal(needed)

    def make(self, needed: Areas, header: bytes, is_exact: bool) -> None:
        """Have room for a call along known routes, or refuse.

        Args:
            needed: What this rank's arguments need.
            header: Of the call.
            is_exact: Whether ``needed`` counts the tokens of all ranks.
        """
        if self.areas.has_room_for(needed):
            return
        if not is_exact or self._is_capturing():
            raise self._refusal(needed)
        # Ranks that agree all need the same; one that does not would wait for the others in vain.
        self._agree(header)
        self.grow(needed)

    def grow(self, needed: Areas) -> bool:
        """Make all slabs large enough; return whether they were not.

        Collective where they grow: all ranks see the same need.
        """
        if self.areas.has_room_for(needed):
            return False
        # Peers may still use this slab: each has to be done before the old slabs go.
        self._settle()
        old = self.slabs
        self._use(self.areas.merged_with(needed))
        old.close(is_collective=True)
        return True

    def abort_all(self) -> None:
        """Make all kernels that wait fail, now and later, here as well: this rank has given up."""
        import cupy

        runtime, rank = cupy.cuda.runtime, self._group.rank
        word = np.array([1 + rank], np.uint64)
        offset = cuda_layout.constants(self._group.size)["kOffsetAbort"]
        with cupy.cuda.Device(self._device):
            # A stream of its own: others may hold kernels that wait.
            stream = cupy.cuda.Stream(non_blocking=True)
            for base in self.slabs.ptrs:
                runtime.memcpyAsync(
                    *(base + offset, word.ctypes.data, word.nbytes),
                    *(runtime.memcpyHostToDevice, stream.ptr),
                )
            stream.synchronize()

    def _refusal(self, needed: Areas) -> InvalidArgument:
        """Return the error of a call that needs more and cannot wait for slabs to grow."""
        num_bytes = self.areas.merged_with(needed).num_bytes
        return InvalidArgument(
            f"the slab has {self.areas.num_bytes} bytes, too few for this call, and it cannot grow "
            "in a graph or with num_worst_tokens, where nothing waits for the host. Pass "
            f"num_nvl_bytes={num_bytes} or more, see Config.get_nvl_buffer_size_hint. Nothing was "
            "sent."
        )

    def check_tokens(self, num_tokens: int, staged_row_bytes: int) -> None:
        """Refuse more tokens than lists have room for: others cannot know of them."""
        if num_tokens <= self.areas.list_tokens:
            return
        row_bytes = max(staged_row_bytes, LIST_ROW_BYTES + 128)
        needed = areas_for(self._group.size, num_tokens + 1024, row_bytes, row_bytes)
        raise InvalidArgument(
            f"x has {num_tokens} tokens; this Buffer was made for at most "
            f"{self.areas.list_tokens} a rank. Pass num_nvl_bytes={needed.num_bytes} or more, "
            "see Config.get_nvl_buffer_size_hint. Nothing was sent."
        )

    def rows(self) -> ArrayView:
        """Return this rank's memory for rows: what lies before are the cells of calls."""
        first = self.areas.stage_offset
        return ArrayView(
            ptr=self.slabs.ptrs[self._group.rank] + first,
            shape=(self.areas.num_bytes - first,),
            strides=(1,),
            dtype=np.dtype(np.uint8),
            device=gpu(self._device),
            is_readonly=False,
            owner=self.slabs,
        )


def _first_areas(num_ranks: int, num_bytes: int) -> Areas:
    """Divide the bytes that the caller wants reserved; a call that needs more grows them."""
    least = areas_for(num_ranks, MIN_LIST_TOKENS, 0, 0)
    part = max(0, num_bytes - least.num_bytes) // (num_ranks + 1) // 256 * 256
    return Areas(num_ranks, part, part, max(MIN_LIST_TOKENS, part // LIST_ROW_BYTES // 64 * 64))
