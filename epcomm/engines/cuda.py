"""The cuda engine: ranks of one node move rows over NVLink with the kernels of cuda_src.

The host decides and launches; it waits only for the number of arriving rows, to return arrays of so
many, and not even for that where the caller fixes the number (``num_worst_tokens``) or the routes
are known (a handle). The GPU waits for the host only where nothing tells how large outputs must be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import cupy
import numpy as np
import numpy.typing as npt

from epcomm import streams
from epcomm.arrays import ArrayView
from epcomm.engines import cuda_failures, cuda_params
from epcomm.engines.base import (
    Allocate,
    CombineRequest,
    CombineResult,
    DispatchRequest,
    DispatchResult,
    LayoutViews,
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
    LowLatencyDispatchResult,
    LowLatencyShape,
    StreamOrder,
)
from epcomm.engines.call_streams import CallStreams
from epcomm.engines.cuda_combine import combine_header, combine_params, make_sums, sum_form_of
from epcomm.engines.cuda_counts import Counts
from epcomm.engines.cuda_dispatch import (
    Form,
    Launch,
    Move,
    Outputs,
    dispatch_header,
    form_of,
    make_outputs,
    num_experts_of,
)
from epcomm.engines.cuda_launch import PeerLauncher
from epcomm.engines.cuda_limits import Limits, check_aligned
from epcomm.engines.cuda_low_latency import CudaLowLatency
from epcomm.engines.cuda_room import Room
from epcomm.engines.cuda_routes import Routing, Tables, layout_params, make_tables, route_params
from epcomm.errors import InvalidArgument, UnsupportedConfig
from epcomm.gpus import current_gpu, has_bulk_copies
from epcomm.group import Group
from epcomm.handle import DispatchHandle
from epcomm.jit import kernels
from epcomm.jit.launch import launch

_AGREE_THREADS = 32
_INT32, _BOOL = np.dtype(np.int32), np.dtype(np.bool_)
#: Of all calls that find their GPU current.
_NOTHING_TO_DO = nullcontext()


class CudaEngine:
    """See `epcomm.engines.base.Engine`. Construction is collective.

    Args:
        group: The ranks, all on one node.
        device: This rank's GPU.
        num_bytes: Bytes to reserve for throughput calls; grows when a call needs more.
        num_low_latency_bytes: The same for low-latency calls.
        can_mask: Whether low-latency calls mask ranks that do not answer.
        num_sms: Gives the multiprocessors of a call without a config.
        timeout_s: Deadline of every wait, in seconds.
        buffer_id: Marks the handles of this engine's Buffer.
        names: Numbers of the ranks in a larger group, for errors; None where there is none.
    """

    name = "cuda"
    makes_layout_in_dispatch = True

    def __init__(
        self,
        group: Group,
        device: int,
        num_bytes: int,
        num_low_latency_bytes: int,
        can_mask: bool,
        num_sms: Callable[[], int],
        timeout_s: float,
        buffer_id: int,
        names: Sequence[int] | None = None,
    ) -> None:
        self._group = group
        self._names = tuple(range(group.size)) if names is None else tuple(names)
        self._device = device
        self._timeout_s = timeout_s
        self._buffer_id = buffer_id
        self._num_dispatches = 0
        self._is_closed = False
        with cupy.cuda.Device(device):
            self._has_bulk = has_bulk_copies()
            self._comm_stream = cupy.cuda.Stream(non_blocking=True)
            self._streams = CallStreams(self._comm_stream)
            self._state = cupy.zeros(cuda_params.CALL_STATE_BYTES, np.uint8)
            self._record = _pinned(cuda_params.FAILURE_RECORD)
            self._record_ptr = int(self._record.ctypes.data)
            summary = _pinned(cuda_params.HOST_SUMMARY)
            cupy.cuda.runtime.deviceSynchronize()
            self._room = Room(
                group,
                device,
                num_bytes,
                state=self._state.data.ptr,
                record=self._record_ptr,
                timeout_s=timeout_s,
                names=self._names,
                is_capturing=lambda: self._streams.is_capturing,
                agree=self._agree,
                settle=self._settle,
            )
            slabs = self._room.slabs
            self._limits = Limits(
                device,
                int(cupy.cuda.Device(device).attributes["MultiProcessorCount"]),
                slabs.num_sharing,
                group.size,
                num_sms,
            )
            self._counts = Counts(
                summary,
                self._names[group.rank],
                timeout_s,
                check=self._check_call,
                # They meet around launches, so all have to make the same ones.
                can_move_ahead=not slabs.are_threads,
            )
            self._launcher = PeerLauncher(group, slabs.are_threads, timeout_s, self._names)
            self._low_latency = CudaLowLatency(
                group,
                device,
                num_low_latency_bytes,
                num_blocks=self._limits.num_low_latency_blocks,
                record=self._record,
                timeout_s=timeout_s,
                can_mask=can_mask,
                launcher=self._launcher,
                stream=lambda: self._streams.stream,
                is_capturing=lambda: self._streams.is_capturing,
                before_growth=self._settle,
            )

    def slab_bytes(self) -> int:
        """See `Engine.slab_bytes`."""
        return self._room.areas.num_bytes + self._low_latency.slab_bytes()

    def comm_stream(self) -> Any:
        """See `Engine.comm_stream`: a cupy.cuda.Stream."""
        return self._comm_stream

    def local_memory(self, is_low_latency: bool) -> ArrayView:
        """See `Engine.local_memory`."""
        if is_low_latency:
            return self._low_latency.local_memory()
        return self._room.rows()

    # --- streams -------------------------------------------------------------------------------

    def active(self) -> AbstractContextManager[Any]:
        """See `Engine.active`."""
        if current_gpu() == self._device:
            return _NOTHING_TO_DO
        device: AbstractContextManager[Any] = cupy.cuda.Device(self._device)
        return device

    def begin(self, order: StreamOrder) -> None:
        """See `Engine.begin`."""
        self._raise_failures()
        current = order.current_stream
        if current == 0 and self._room.slabs.num_sharing > 1:
            raise UnsupportedConfig(
                f"ranks share GPU {self._device} as threads of one process, and this call is on "
                "the default stream, which they would share too: each would wait for the other. "
                "Give each thread a stream of its own: with cupy.cuda.Stream(non_blocking=True): "
                "or with torch.cuda.stream(torch.cuda.Stream()):"
            )
        self._streams.begin(order, current is not None and streams.is_capturing(current))

    def end(self, order: StreamOrder, keep: Any) -> Any:
        """See `Engine.end`."""
        return self._streams.end(order, keep)

    def synchronize(self) -> None:
        """See `Engine.synchronize`."""
        self._wait_all()
        self._raise_failures()

    def _wait_all(self) -> None:
        """Wait for all calls that ended."""
        self._comm_stream.synchronize()
        self._streams.wait_last()

    def _wait_call(self) -> None:
        """Wait for the call in hand, and all before it."""
        cupy.cuda.runtime.streamSynchronize(self._streams.stream.ptr)
        self._wait_all()

    def _settle(self) -> None:
        self._wait_call()
        self._raise_failures()

    def call_stream(self) -> int:
        """See `DeviceNodeEngine.call_stream`."""
        stream: int = self._streams.stream.ptr
        return stream

    def check_part(self, request: DispatchRequest | CombineRequest, max_tokens: int) -> None:
        """See `DeviceNodeEngine.check_part`."""
        if isinstance(request, CombineRequest):
            self._limits.check_combine(request)
            return
        self._limits.check_dispatch(request)
        if request.layout is not None:
            layout = request.layout
            num_experts = layout.num_tokens_per_expert.shape[0]
            num_local = num_experts // layout.num_tokens_per_rank.shape[0]
            self._limits.check_experts(num_local * self._group.size)
        self._room.check_tokens(max_tokens, self._form(request, 0).staged)

    def fail(self, missed: int) -> None:
        """See `NodeEngine.fail`: kernels find their abort cells set."""
        self._room.abort_all()

    def check_failed(self, phase: str) -> None:
        """See `NodeEngine.check_failed`."""
        self._raise_failures()

    def _raise_failures(self) -> None:
        error = cuda_failures.error_in(self._record, self._group.rank, self._names, self._timeout_s)
        if error is not None:
            raise error

    def _check_call(self) -> None:
        """Raise what has ended the call in hand, where something has."""
        if cuda_failures.ends_call(int(self._record["failure"])):
            self._wait_call()
            self._raise_failures()
        self._group.check()

    def _launch(
        self,
        spec: kernels.KernelSpec,
        *,
        num_blocks: int,
        num_threads: int,
        params: bytes,
        shared_bytes: int = 0,
    ) -> None:
        """Start a kernel that waits for peers, on the stream of the call in hand."""
        self._launcher.launch(
            spec,
            stream=self._streams.stream,
            num_blocks=num_blocks,
            num_threads=num_threads,
            params=params,
            shared_bytes=shared_bytes,
            meets=not self._streams.is_capturing,
        )

    def _agree(self, header: bytes) -> None:
        """Meet all ranks, each with the header of its call."""
        self._launch(
            kernels.agree_spec(self._group.size),
            num_blocks=1,
            num_threads=_AGREE_THREADS,
            params=cuda_params.pack(cuda_params.AGREE, self._room.call, header, ()),
        )

    # --- layout --------------------------------------------------------------------------------

    def make_layout(self, topk_idx: ArrayView, num_experts: int, allocate: Allocate) -> LayoutViews:
        """See `Engine.make_layout`."""
        num_ranks = self._group.size
        self._limits.check_experts(num_experts)
        layout = LayoutViews(
            num_tokens_per_rank=allocate((num_ranks,), _INT32),
            num_tokens_per_node=None,
            num_tokens_per_expert=allocate((num_experts,), _INT32),
            is_token_in_rank=allocate((topk_idx.shape[0], num_ranks), _BOOL),
        )
        launch(
            kernels.layout_spec(num_ranks),
            stream=self._streams.stream,
            num_blocks=1,
            num_threads=kernels.ROUTE_THREADS,
            params=layout_params(topk_idx, num_experts, layout, self._record_ptr),
            shared_bytes=(num_experts + num_ranks) * 4,
        )
        return layout

    # --- dispatch ------------------------------------------------------------------------------

    def dispatch(self, request: DispatchRequest) -> DispatchResult:
        """See `Engine.dispatch`."""
        num_blocks = self._limits.check_dispatch(request)
        if request.handle is not None:
            return self._dispatch_again(request, request.handle, num_blocks)
        num_experts = num_experts_of(request)
        self._limits.check_experts(num_experts)
        num_tokens = request.data.shape[0]
        form = self._form(request, num_experts)
        header = dispatch_header("dispatch", 0, request, form)
        is_exact = not request.num_worst_tokens
        if is_exact and self._streams.is_capturing:
            raise InvalidArgument(
                "dispatch: a graph is being captured, and the host cannot wait for the number of "
                "rows that arrive. Pass num_worst_tokens=, or a handle. Nothing was sent."
            )
        if not is_exact:
            self._room.check(self._room.needs(num_tokens, form.staged, 0))
        self._room.check_tokens(num_tokens, form.staged)
        tables = self._route(request, header, num_experts)
        # Only now: a call that was refused above does not count, on this rank alone as well.
        self._num_dispatches += 1
        num_local = num_experts // self._group.size
        first_expert = self._group.rank * num_local
        move = Move(request, header, form, tables, num_blocks, first_expert, num_local)
        num_recv, max_tokens = request.num_worst_tokens, num_tokens
        if is_exact:
            outputs, num_recv, max_tokens = self._counts.move(
                request,
                lambda outputs, launch: self._move(move, outputs, launch),
                lambda tokens: self._room.grow(self._room.needs(tokens, form.staged, 0)),
            )
        else:
            outputs = make_outputs(request, num_recv)
            self._move(move, outputs)
        # After the launch, what the GPU does not wait for.
        handle = DispatchHandle(
            buffer_id=self._buffer_id,
            serial=self._num_dispatches,
            num_tokens=num_tokens,
            num_recv_rows=num_recv,
            num_recv_tokens=num_recv if is_exact else None,
            routing=Routing(tables, max_tokens, is_exact),
        )
        pairs = self._counts.of_experts(num_local, request.expert_alignment) if is_exact else []
        return DispatchResult(*outputs, pairs, handle)

    def _dispatch_again(
        self, request: DispatchRequest, handle: DispatchHandle, num_blocks: int
    ) -> DispatchResult:
        record: Routing = handle.routing
        form = self._form(request, 0)
        header = dispatch_header("dispatch with a handle", handle.serial, request, form)
        needed = self._room.needs(record.max_tokens, form.staged, 0)
        self._room.make(needed, header, record.is_exact)
        outputs = make_outputs(request, handle.num_recv_rows)
        self._move(Move(request, header, form, record.tables, num_blocks), outputs)
        return DispatchResult(outputs.data, outputs.scales, None, [], handle)

    def _form(self, request: DispatchRequest, num_experts: int) -> Form:
        return form_of(request, num_experts, self._group.size, self._has_bulk)

    def _route(self, request: DispatchRequest, header: bytes, num_experts: int) -> Tables:
        """Launch route.cu; return what it fills."""
        num_ranks = self._group.size
        # Others' tokens are unknown yet, but for parts; lists bound them.
        most_work = (num_ranks - 1) * self._room.areas.list_tokens
        if request.into is not None:
            most_work = request.into.data.shape[0]
        # Kept here as well, for where the call fails while the kernel runs.
        self._tables = make_tables(request.data.shape[0], num_ranks, max(1, most_work))
        host = self._counts.begin()
        call, tables = self._room.call, self._tables
        self._launch(
            kernels.route_spec(num_ranks),
            num_blocks=num_ranks,
            num_threads=kernels.ROUTE_THREADS,
            params=route_params(call, header, request, num_experts, tables, host),
        )
        return tables

    def _move(self, move: Move, outputs: Outputs, launch: Launch = Launch.WHOLE) -> None:
        """Launch dispatch.cu."""
        form = move.form
        self._launch(
            form.spec,
            num_blocks=move.num_blocks,
            num_threads=form.num_threads,
            params=move.params(self._room.call, outputs, launch),
            shared_bytes=form.shared_bytes,
        )

    # --- combine -------------------------------------------------------------------------------

    def combine(self, request: CombineRequest) -> CombineResult:
        """See `Engine.combine`."""
        num_blocks = self._limits.check_combine(request)
        record: Routing = request.handle.routing
        form = sum_form_of(request, self._group.size, self._has_bulk)
        header = combine_header(request, form)
        needed = self._room.needs(record.max_tokens, 0, form.slot_row_bytes)
        self._room.make(needed, header, record.is_exact)
        out = make_sums(request)
        self._launch(
            form.spec,
            num_blocks=num_blocks,
            num_threads=form.num_threads,
            params=combine_params(self._room.call, header, request, record.tables, form, out),
            shared_bytes=form.shared_bytes,
        )
        return out

    # --- low latency ---------------------------------------------------------------------------

    def low_latency_dispatch(self, request: LowLatencyDispatchRequest) -> LowLatencyDispatchResult:
        """See `Engine.low_latency_dispatch`."""
        check_aligned(request.data, "x")
        return self._low_latency.dispatch(request)

    def low_latency_combine(self, request: LowLatencyCombineRequest) -> Callable[[], None]:
        """See `Engine.low_latency_combine`."""
        check_aligned(request.data, "x")
        check_aligned(request.out, "out")
        return self._low_latency.combine(request)

    def next_combine_buffer(self, shape: LowLatencyShape) -> ArrayView:
        """See `Engine.next_combine_buffer`."""
        return self._low_latency.next_combine_buffer(shape)

    def copy_masks(self, out: ArrayView) -> None:
        """See `Engine.copy_masks`."""
        self._low_latency.copy_masks(out)

    def set_masked(self, rank: int, is_masked: bool) -> None:
        """See `Engine.set_masked`: behind what the caller's current stream holds."""
        order = StreamOrder(
            current_stream=streams.current_stream(),
            waits_for_current=True,
            previous_event=None,
            is_async=False,
        )
        self.begin(order)
        self._launcher.set_masked(rank, is_masked)
        self._low_latency.set_masked(rank, is_masked)
        self.end(order, None)

    def close(self, is_collective: bool) -> None:
        """See `Engine.close`."""
        if self._is_closed:
            return
        self._is_closed = True
        with cupy.cuda.Device(self._device):
            self._wait_all()
            self._streams.forget()
            self._room.slabs.close(is_collective)
            self._low_latency.close(is_collective)


def _pinned(dtype: np.dtype[Any]) -> npt.NDArray[np.void]:
    """Return host memory that the device can write, ``[]`` of a struct, zeroed."""
    memory = cupy.cuda.alloc_pinned_memory(dtype.itemsize)
    array: npt.NDArray[np.void] = np.frombuffer(memory, dtype, count=1).reshape(())
    array[...] = 0
    return array
