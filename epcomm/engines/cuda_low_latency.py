"""Low-latency calls of the cuda engine: one kernel a call, or two where the caller has a hook.

Nothing here waits for the device, or knows in which round a kernel runs: epochs live in device
memory, so what is launched once may be replayed in a graph any number of times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import cupy
import numpy as np
import numpy.typing as npt

from epcomm import cuda_layout
from epcomm.arrays import BFLOAT16, ArrayView, Device, packed_strides
from epcomm.engines import cuda_failures, cuda_params
from epcomm.engines.base import (
    CombinePrecision,
    Fp8Format,
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
    LowLatencyDispatchResult,
    LowLatencyShape,
)
from epcomm.engines.cuda_launch import PeerLauncher
from epcomm.engines.cuda_low_latency_room import NUM_SLOTS, LowLatencyRoom, Slab
from epcomm.engines.cuda_tuning import (
    LOW_LATENCY_COMBINE_GRID,
    LOW_LATENCY_DISPATCH_GRID,
    low_latency_parts,
)
from epcomm.engines.low_latency_arrays import allocate_result, check_combine_buffer
from epcomm.errors import InvalidArgument
from epcomm.fp8 import num_scales
from epcomm.group import Group
from epcomm.jit import kernels

# As in comm/low_latency.cuh.
_SENDS, _RECEIVES = 1, 2
_MASK_BYTES = 4
_TICKET_BYTES, _NUM_TICKETS = 4, 1024


@dataclass(frozen=True)
class _Call:
    """What both kernels of a call share.

    Attributes:
        name: Of the Buffer's method.
        slab: Where it runs.
        spec: Its kernel.
        grid: How that divides its work, as in `spec`.
        params: Dtype of the kernel's argument.
        shape: LowLatencyShape of comm/low_latency.cuh, in order.
        shared_bytes: Dynamic shared memory of a block.
    """

    name: str
    slab: Slab
    spec: kernels.KernelSpec
    grid: kernels.LowLatencyGrid
    params: np.dtype[Any]
    shape: tuple[int, ...]
    shared_bytes: int


class CudaLowLatency:
    """The low-latency half of `CudaEngine`. Construction is collective.

    Args:
        group: The ranks, all on one node.
        device: This rank's GPU, current in this thread.
        num_bytes: Bytes to reserve for both slots' rows.
        num_blocks: Blocks of every kernel: all fit on the GPU at once. As many each time, because
            each block counts the calls.
        record: FAILURE_RECORD in pinned memory, the engine's.
        timeout_s: Deadline of every wait, in seconds.
        can_mask: Whether ranks that do not answer are masked in place of failing.
        launcher: Starts the kernels.
        stream: Gives the stream of the call in hand.
        is_capturing: Tells whether that stream is being captured.
        before_growth: Waits until this rank's calls are done, and raises what failed in them.
    """

    def __init__(
        self,
        group: Group,
        device: int,
        num_bytes: int,
        num_blocks: Callable[[], int],
        record: npt.NDArray[np.void],
        timeout_s: float,
        can_mask: bool,
        launcher: PeerLauncher,
        stream: Callable[[], Any],
        is_capturing: Callable[[], bool],
        before_growth: Callable[[], None],
    ) -> None:
        self._group, self._device = group, device
        self._num_blocks = num_blocks
        self._record, self._timeout_s, self._can_mask = record, timeout_s, can_mask
        self._launcher = launcher
        self._stream, self._is_capturing = stream, is_capturing
        self._num_calls = 0
        #: Numbers of the calls whose hook was not called yet.
        self._unreceived: set[int] = set()
        self._tickets: list[int] = []
        self._ticket_memory: list[Any] = []
        self._add_tickets()  # now: a capture may not be able to
        self._combine_buffers: list[Any] = []
        self._masks = cupy.zeros(group.size, np.int32)
        self._room = LowLatencyRoom(
            group, device, num_bytes, timeout_s, self._masks, is_capturing, before_growth
        )

    def slab_bytes(self) -> int:
        """Return the bytes that this rank holds."""
        return self._room.num_bytes()

    def local_memory(self) -> ArrayView:
        """Return the rows of both slots: what lies before them are the cells of calls."""
        return self._room.rows()

    def close(self, is_collective: bool) -> None:
        """Let go of the memory; no call may be running."""
        self._room.close(is_collective)
        self._combine_buffers.clear()

    # --- one call ------------------------------------------------------------------------------

    def _check_unreceived(self, name: str) -> None:
        # The next call writes the slot of the one that was NUM_SLOTS before it.
        oldest = min(self._unreceived, default=self._num_calls + 1)
        if oldest - 1 <= self._num_calls - NUM_SLOTS:
            raise InvalidArgument(
                f"{name}: {len(self._unreceived)} earlier low-latency results wait for their hook, "
                f"and there are {NUM_SLOTS} slots; call the oldest hook() first. Nothing was sent."
            )

    def _make_room(
        self, name: str, shape: LowLatencyShape, told: tuple[int, ...], lines: int
    ) -> Slab:
        """Return slabs with room for a call.

        Args:
            name: Of the Buffer's method.
            shape: Of the call.
            told: Its header: see `_Call.shape`.
            lines: Lines of rows that a slot needs.
        """
        needed = cuda_layout.low_latency_rows_bytes(shape, lines)
        return self._room.make(name, needed, partial(self._agree, name, shape, told))

    def _agree(self, name: str, shape: LowLatencyShape, told: tuple[int, ...], slab: Slab) -> None:
        """Meet the others in a dispatch of no tokens, with the header of the call in hand."""
        num_local, grid = shape.num_local_experts, LOW_LATENCY_DISPATCH_GRID
        # NOTE: kind and format are those of the call in hand, which may be a combine; a dispatch of
        # no tokens only compares them.
        *agreed, _num_tokens, num_parts = told
        call = _Call(
            name=name,
            slab=slab,
            spec=kernels.low_latency_dispatch_spec(shape.num_ranks, False, grid),
            grid=grid,
            params=cuda_params.LOW_LATENCY_DISPATCH,
            shape=(*agreed, 0, num_parts),
            shared_bytes=kernels.low_latency_dispatch_bytes(shape.num_ranks, num_local),
        )
        counts = cupy.empty(num_local, np.int32)
        sources = cupy.empty((num_local, shape.num_recv_rows), np.int32)
        ranges = cupy.empty((num_local, shape.num_ranks), np.int64)
        outputs = (counts.data.ptr, sources.data.ptr, ranges.data.ptr)
        self._launch(call, _SENDS | _RECEIVES, (0, 0, 0, 0, *outputs, 0, 0, 0))
        self._num_calls += 1

    def _start(
        self,
        call: _Call,
        request: LowLatencyDispatchRequest | LowLatencyCombineRequest,
        own: tuple[int, ...],
    ) -> Callable[[], None]:
        """Launch a call's kernel, or the one that sends; return what receives.

        Args:
            call: The call.
            request: What was asked for; alive as long as the function that comes back.
            own: The params behind the common part, in order.
        """
        ticket = self._take_ticket() if request.has_hook else 0
        wait_stats = 0 if request.wait_stats is None else request.wait_stats.ptr

        def run(phases: int) -> None:
            self._launch(call, phases, own, ticket, wait_stats)

        if not request.has_hook:
            run(_SENDS | _RECEIVES)
            self._num_calls += 1
            return lambda: None
        run(_SENDS)
        self._num_calls += 1
        number, is_captured = self._num_calls, self._is_capturing()
        self._unreceived.add(number)

        def receive() -> None:
            if number not in self._unreceived:
                raise InvalidArgument(
                    f"{call.name}: this hook was called before; call each hook once."
                )
            run(_RECEIVES)
            self._unreceived.discard(number)
            if not is_captured:  # a graph goes on using its tickets
                self._tickets.append(ticket)

        return receive

    def _launch(
        self,
        call: _Call,
        phases: int,
        own: tuple[int, ...],
        ticket: int = 0,
        wait_stats: int = 0,
    ) -> None:
        """Launch a kernel of a call.

        Args:
            call: The call.
            phases: What the kernel does: _SENDS, _RECEIVES or both.
            own: The params behind the common part, in order.
            ticket: Address of the call's epoch, where one kernel sends and another receives.
            wait_stats: Address of the caller's statistics, or 0.
        """
        common = (
            *call.slab.bases,
            call.slab.rows_bytes,
            *call.shape,
            call.slab.state.data.ptr,
            self._record.ctypes.data,
            self._masks.data.ptr,
            ticket,
            wait_stats,
            int(self._timeout_s * 1e9),
            *(self._group.rank, phases, int(self._can_mask), 0),
        )
        self._launcher.launch(
            call.spec,
            stream=self._stream(),
            # What is only received was sent by kernels that are launched.
            meets=bool(phases & _SENDS) and not self._is_capturing(),
            can_mask=self._can_mask,
            num_blocks=self._num_blocks(),
            num_threads=call.grid.num_threads,
            params=cuda_params.pack_all(call.params, (*common, *own)),
            shared_bytes=call.shared_bytes,
        )

    def _take_ticket(self) -> int:
        """Return device memory for the epoch of one call."""
        if not self._tickets:
            self._add_tickets()
        return self._tickets.pop()

    def _add_tickets(self) -> None:
        memory = cupy.empty(_NUM_TICKETS * _TICKET_BYTES, np.uint8)
        self._ticket_memory.append(memory)
        ptr = memory.data.ptr
        self._tickets += range(ptr, ptr + memory.nbytes, _TICKET_BYTES)

    # --- dispatch ------------------------------------------------------------------------------

    def dispatch(self, request: LowLatencyDispatchRequest) -> LowLatencyDispatchResult:
        """See `Engine.low_latency_dispatch`."""
        name = "low_latency_dispatch"
        shape, fp8, idx = request.shape, request.fp8, request.topk_idx
        self._check_unreceived(name)
        num_tokens, num_topk = idx.shape
        _check_limits(shape, num_topk)
        is_fp8, grid = fp8 is not Fp8Format.NONE, LOW_LATENCY_DISPATCH_GRID
        told = (
            cuda_failures.LOW_LATENCY_CALL_INDEX[name],
            *(shape.num_max_tokens, shape.hidden, shape.num_experts),
            *(num_topk, fp8.value, num_tokens),
            low_latency_parts(
                shape.hidden * (1 if is_fp8 else BFLOAT16.itemsize),
                num_tokens,
                num_tokens,
                self._num_blocks(),
                grid,
            ),
        )
        slab = self._make_room(name, shape, told, shape.num_ranks)
        result, scales = allocate_result(request)
        call = _Call(
            name=name,
            slab=slab,
            spec=kernels.low_latency_dispatch_spec(shape.num_ranks, is_fp8, grid),
            grid=grid,
            params=cuda_params.LOW_LATENCY_DISPATCH,
            shape=told,
            shared_bytes=kernels.low_latency_dispatch_bytes(
                shape.num_ranks, shape.num_local_experts
            ),
        )
        own = (
            *(request.data.ptr, idx.ptr, result["data"].ptr),
            0 if scales is None else scales.ptr,
            *(result[field].ptr for field in ("recv_count", "src_info", "layout_range")),
            0 if request.recv_stats is None else request.recv_stats.ptr,
            *(int(idx.dtype.itemsize == 8), num_scales(fp8, shape.hidden)),
        )
        receive = self._start(call, request, own)
        return LowLatencyDispatchResult(scales=scales, receive=receive, **result)

    # --- combine -------------------------------------------------------------------------------

    def combine(self, request: LowLatencyCombineRequest) -> Callable[[], None]:
        """See `Engine.low_latency_combine`."""
        name = "low_latency_combine"
        shape, idx = request.shape, request.topk_idx
        self._check_unreceived(name)
        if request.is_zero_copy:
            self._check_zero_copy(request)
        num_tokens, num_topk = idx.shape
        is_by_rank = request.precision is CombinePrecision.RANK
        grid = LOW_LATENCY_COMBINE_GRID
        _check_limits(shape, num_topk)
        told = (
            cuda_failures.LOW_LATENCY_CALL_INDEX[name],
            *(shape.num_max_tokens, shape.hidden, shape.num_experts),
            *(num_topk, request.precision.value, num_tokens),
            low_latency_parts(
                shape.hidden * BFLOAT16.itemsize,
                # Those of all ranks, whose tokens are about as many as this one's.
                shape.num_ranks * num_tokens,
                num_tokens,
                self._num_blocks(),
                grid,
            ),
        )
        slab = self._make_room(name, shape, told, shape.num_ranks if is_by_rank else num_topk)
        call = _Call(
            name=name,
            slab=slab,
            spec=kernels.low_latency_combine_spec(shape.num_ranks, grid),
            grid=grid,
            params=cuda_params.LOW_LATENCY_COMBINE,
            shape=told,
            shared_bytes=kernels.low_latency_combine_bytes(grid, shape.num_local_experts),
        )
        own = (
            *(request.data.ptr, idx.ptr, request.topk_weights.ptr),
            *(request.layout_range.ptr, request.out.ptr),
            *(int(idx.dtype.itemsize == 8), 0),
        )
        return self._start(call, request, own)

    def next_combine_buffer(self, shape: LowLatencyShape) -> ArrayView:
        """See `Engine.next_combine_buffer`: memory of this GPU, made at the first use."""
        sizes = (shape.num_local_experts, shape.num_recv_rows, shape.hidden)
        num_bytes = int(np.prod(sizes)) * BFLOAT16.itemsize
        if not self._combine_buffers or self._combine_buffers[-1].nbytes < num_bytes:
            # Older ones stay: captured graphs may read them.
            self._combine_buffers.append(cupy.empty(max(1, num_bytes), np.uint8))
        memory = self._combine_buffers[-1]
        return ArrayView(
            ptr=memory.data.ptr,
            shape=sizes,
            strides=packed_strides(sizes, BFLOAT16),
            dtype=BFLOAT16,
            device=Device("cuda", self._device),
            is_readonly=False,
            owner=memory,
        )

    def _check_zero_copy(self, request: LowLatencyCombineRequest) -> None:
        wanted = self._combine_buffers[-1].data.ptr if self._combine_buffers else 0
        check_combine_buffer(request.data, wanted)

    # --- masks ---------------------------------------------------------------------------------

    def copy_masks(self, out: ArrayView) -> None:
        """See `Engine.copy_masks`: on the stream of the call."""
        runtime = cupy.cuda.runtime
        runtime.memcpyAsync(
            out.ptr,
            self._masks.data.ptr,
            out.num_bytes,
            runtime.memcpyDeviceToDevice,
            self._stream().ptr,
        )

    def set_masked(self, rank: int, is_masked: bool) -> None:
        """See `Engine.set_masked`: on the stream of the call."""
        # One byte of a little-endian word.
        ptr = self._masks.data.ptr + _MASK_BYTES * rank
        cupy.cuda.runtime.memsetAsync(ptr, int(is_masked), 1, self._stream().ptr)


def _check_limits(shape: LowLatencyShape, num_topk: int) -> None:
    if shape.num_max_tokens > cuda_layout.MAX_LOW_LATENCY_TOKENS:
        raise InvalidArgument(
            f"num_max_dispatch_tokens_per_rank is {shape.num_max_tokens}; low-latency calls of the "
            f"cuda engine take at most {cuda_layout.MAX_LOW_LATENCY_TOKENS}. Use dispatch and "
            "combine for more."
        )
    most = cuda_layout.MAX_LOW_LATENCY_LOCAL_EXPERTS
    if shape.num_local_experts > most:
        raise InvalidArgument(
            f"num_experts is {shape.num_experts}; low-latency calls of the cuda engine take at "
            f"most {most} a rank, {most * shape.num_ranks} here. Use dispatch and combine for more."
        )
    if shape.hidden * BFLOAT16.itemsize % 16 or num_topk == 0:
        raise InvalidArgument(
            f"a row of {shape.hidden} bf16 must be a multiple of 16 bytes, and a token must have "
            f"at least one choice, not {num_topk}."
        )
