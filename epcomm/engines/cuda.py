"""The cuda engine: ranks of one node move rows over NVLink with the kernels of cuda_src.

The host decides and launches; it waits only for the number of arriving rows, to return arrays of so
many, and not even for that where the caller fixes the number (``num_worst_tokens``) or the routes
are known (a handle). The GPU waits for the host only where nothing tells how large outputs must be.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import cupy
import numpy as np
import numpy.typing as npt

from epcomm import cuda_layout, streams
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
from epcomm.engines.cuda_dispatch import (
    Form,
    Launch,
    Move,
    Outputs,
    RowForecast,
    dispatch_header,
    form_of,
    make_outputs,
    prepare_move,
)
from epcomm.engines.cuda_launch import PeerLauncher
from epcomm.engines.cuda_low_latency import CudaLowLatency
from epcomm.engines.cuda_room import Room
from epcomm.engines.cuda_routes import Routing, make_tables
from epcomm.errors import CommTimeout, InvalidArgument, UnsupportedConfig
from epcomm.gpus import has_bulk_copies
from epcomm.group import Group
from epcomm.handle import DispatchHandle
from epcomm.jit import kernels
from epcomm.jit.launch import launch
from epcomm.waiting import Deadline, poll_until

_ROUTE_THREADS = 1024
_AGREE_THREADS = 32
_INT32, _BOOL = np.dtype(np.int32), np.dtype(np.bool_)


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
        self._num_sms = num_sms
        self._timeout_s = timeout_s
        self._buffer_id = buffer_id
        self._num_dispatches = 0
        self._tickets = itertools.count(1)
        self._forecast = RowForecast()
        self._ahead: Outputs | None = None
        self._is_closed = False
        with cupy.cuda.Device(device):
            attributes = cupy.cuda.Device(device).attributes
            self._num_multiprocessors = int(attributes["MultiProcessorCount"])
            self._has_bulk = has_bulk_copies()
            self._comm_stream = cupy.cuda.Stream(non_blocking=True)
            self._streams = CallStreams(self._comm_stream)
            self._state = cupy.zeros(cuda_params.CALL_STATE_BYTES, np.uint8)
            self._record = _pinned(cuda_params.FAILURE_RECORD)
            self._record_ptr = int(self._record.ctypes.data)
            self._summary = _pinned(cuda_params.HOST_SUMMARY)
            self._summary_ptr = int(self._summary.ctypes.data)
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
            self._launcher = PeerLauncher(
                group, self._room.slabs.are_threads, timeout_s, self._names
            )
            self._low_latency = CudaLowLatency(
                group,
                device,
                num_low_latency_bytes,
                num_blocks=self._num_low_latency_blocks,
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
            self._check_combine(request)
            return
        self._check_dispatch(request)
        if request.layout is not None:
            layout = request.layout
            num_experts = layout.num_tokens_per_expert.shape[0]
            num_local = num_experts // layout.num_tokens_per_rank.shape[0]
            self._check_experts(num_local * self._group.size)
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

    def _launch(
        self,
        spec: kernels.KernelSpec,
        *,
        num_blocks: int,
        num_threads: int,
        params: npt.NDArray[np.void],
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
        self._check_experts(num_experts)
        per_rank = allocate((num_ranks,), _INT32)
        per_expert = allocate((num_experts,), _INT32)
        in_rank = allocate((topk_idx.shape[0], num_ranks), _BOOL)
        params = cuda_params.pack_all(
            cuda_params.LAYOUT,
            (
                topk_idx.ptr,
                *(per_rank.ptr, per_expert.ptr, in_rank.ptr),
                self._record_ptr,
                *topk_idx.shape,
                num_experts,
                int(topk_idx.dtype.itemsize == 8),
            ),
        )
        launch(
            kernels.layout_spec(num_ranks),
            stream=self._streams.stream,
            num_blocks=1,
            num_threads=_ROUTE_THREADS,
            params=params,
            shared_bytes=(num_experts + num_ranks) * 4,
        )
        return LayoutViews(per_rank, None, per_expert, in_rank)

    def _check_experts(self, num_experts: int) -> None:
        most = cuda_layout.MAX_LOCAL_EXPERTS * self._group.size
        if num_experts > most:
            raise InvalidArgument(
                f"num_experts is {num_experts}; the cuda engine takes at most "
                f"{cuda_layout.MAX_LOCAL_EXPERTS} a rank, {most} here."
            )

    # --- dispatch ------------------------------------------------------------------------------

    def dispatch(self, request: DispatchRequest) -> DispatchResult:
        """See `Engine.dispatch`."""
        num_blocks = self._check_dispatch(request)
        if request.handle is not None:
            return self._dispatch_again(request, request.handle, num_blocks)
        num_experts = request.num_experts
        if request.layout is not None:
            num_experts = request.layout.num_tokens_per_expert.shape[0]
        self._check_experts(num_experts)
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
        ticket = self._route(request, form, header, num_experts)
        # Only now: a call that was refused above does not count, on this rank alone as well.
        self._num_dispatches += 1
        # While the GPU routes, all that can be done without the counts.
        tables = self._tables
        num_local = num_experts // self._group.size
        move = prepare_move(request, tables, form, num_local, self._group.rank, num_blocks)
        num_recv, max_tokens = request.num_worst_tokens, num_tokens
        if is_exact:
            outputs, num_recv, max_tokens = self._move_counted(request, move, header, ticket)
        else:
            outputs = make_outputs(request, num_recv)
            self._move(move, header, outputs)
        # After the launch, what the GPU does not wait for.
        handle = DispatchHandle(
            buffer_id=self._buffer_id,
            serial=self._num_dispatches,
            num_tokens=num_tokens,
            num_recv_rows=num_recv,
            num_recv_tokens=num_recv if is_exact else None,
            routing=Routing(tables, max_tokens, is_exact),
        )
        counts = self._expert_counts(request, num_experts) if is_exact else []
        return DispatchResult(*outputs, counts, handle)

    def _move_counted(
        self, request: DispatchRequest, move: Move, header: bytes, ticket: int
    ) -> tuple[Outputs, int, int]:
        """Launch dispatch.cu, with outputs of as many rows as arrive.

        Where a dispatch like this one came before, it is launched before the counts are known, so
        that the GPU does not wait for the host.

        Returns:
            The outputs, how many rows arrive, and the most tokens of any rank.
        """
        # Kept here as well, for where the call fails while the kernel runs.
        self._ahead = ahead = self._make_outputs_ahead(request)
        if ahead is not None:
            self._move(move, header, ahead, Launch.AHEAD)
        num_recv, max_tokens = self._wait_counts(ticket)
        self._forecast.note(request, num_recv)
        launch = Launch.WHOLE if ahead is None else Launch.RESUMES
        if self._room.grow(self._room.needs(max_tokens, move.form.staged, 0)):
            launch = Launch.WHOLE  # dispatch.cu has seen that, and done nothing
        elif ahead is not None and num_recv <= ahead.data.shape[0]:
            self._ahead = None
            return ahead.leading(num_recv), num_recv, max_tokens
        self._ahead = ahead = None  # dispatch.cu has written nothing there, and will not
        outputs = make_outputs(request, num_recv)
        self._move(move, header, outputs, launch)
        return outputs, num_recv, max_tokens

    def _make_outputs_ahead(self, request: DispatchRequest) -> Outputs | None:
        """Make outputs for as many rows as are forecast; None where nothing is, or in vain."""
        # Ranks that are threads meet around launches, so all have to make the same ones.
        if request.into is not None or self._room.slabs.are_threads:
            return None
        num_rows = self._forecast.num_rows(request)
        if num_rows == 0:
            return None
        try:
            return make_outputs(request, num_rows)
        except Exception:  # no memory, in the words of any framework; it may do for fewer rows
            return None

    def _check_dispatch(self, request: DispatchRequest) -> int:
        """Raise what one rank can see alone; return the blocks to launch."""
        _check_aligned(request.data, "x")
        return self._num_blocks(request.num_sms)

    def _check_combine(self, request: CombineRequest) -> int:
        """As `_check_dispatch`."""
        _check_aligned(request.data, "x")
        for i, bias in enumerate(request.biases):
            _check_aligned(bias, f"bias[{i}]")
        return self._num_blocks(request.num_sms)

    def _dispatch_again(
        self, request: DispatchRequest, handle: DispatchHandle, num_blocks: int
    ) -> DispatchResult:
        record: Routing = handle.routing
        form = self._form(request, 0)
        header = dispatch_header("dispatch with a handle", handle.serial, request, form)
        needed = self._room.needs(record.max_tokens, form.staged, 0)
        self._room.make(needed, header, record.is_exact)
        move = prepare_move(request, record.tables, form, 0, self._group.rank, num_blocks)
        outputs = make_outputs(request, handle.num_recv_rows)
        self._move(move, header, outputs)
        return DispatchResult(outputs.data, outputs.scales, None, [], handle)

    def _form(self, request: DispatchRequest, num_experts: int) -> Form:
        return form_of(request, num_experts, self._group.size, self._has_bulk)

    def _route(self, request: DispatchRequest, form: Form, header: bytes, num_experts: int) -> int:
        """Launch route.cu; return the ticket that the host's summary will carry."""
        layout, topk = request.layout, request.topk
        in_rank = per_expert = idx = num_topk = is_64_bit = 0
        if layout is not None:
            in_rank, per_expert = layout.is_token_in_rank.ptr, layout.num_tokens_per_expert.ptr
        else:
            assert topk is not None  # the Buffer gives one of the two
            idx, num_topk = topk.idx.ptr, topk.idx.shape[1]
            is_64_bit = int(topk.idx.dtype.itemsize == 8)
        num_tokens, num_ranks = request.data.shape[0], self._group.size
        self._room.check_tokens(num_tokens, form.staged)
        # Others' tokens are unknown yet, but for parts; lists bound them.
        most_work = (num_ranks - 1) * self._room.areas.list_tokens
        if request.into is not None:
            most_work = request.into.data.shape[0]
        # Kept here as well, for where the call fails while the kernel runs.
        self._tables = tables = make_tables(num_tokens, num_ranks, max(1, most_work))
        ticket = next(self._tickets)
        params = cuda_params.pack(
            cuda_params.ROUTE,
            self._room.call,
            header,
            (
                *(in_rank, per_expert, idx),
                *(tables.positions, tables.work, tables.counts, tables.summary),
                self._summary_ptr,
                ticket,
                *(num_tokens, num_experts, request.num_worst_tokens),
                *(num_topk, is_64_bit, int(layout is None)),
            ),
        )
        self._launch(
            kernels.route_spec(num_ranks),
            num_blocks=num_ranks,
            num_threads=_ROUTE_THREADS,
            params=params,
        )
        return ticket

    def _wait_counts(self, ticket: int) -> tuple[int, int]:
        """Wait, without holding the GIL, until route.cu has told the host.

        Returns:
            Rows that arrive here, and the most tokens of any rank.
        """
        summary = self._summary
        seen, failure = summary["ticket"], self._record["failure"]

        def is_known() -> bool:
            if int(seen) == ticket:
                return True
            if cuda_failures.ends_call(int(failure)):
                self._wait_call()
                self._raise_failures()
            self._group.check()
            return False

        # The device's own deadline comes first; this one is for a device that does not answer.
        if not poll_until(is_known, Deadline(2 * self._timeout_s + 10)):
            raise CommTimeout(
                "dispatch: counts", self._names[self._group.rank], [], self._timeout_s
            )
        return int(summary["num_recv"]), int(summary["max_tokens"])

    def _expert_counts(self, request: DispatchRequest, num_experts: int) -> list[int]:
        """Return the pairs of each local expert, as route.cu told them, rounded up."""
        pairs = self._summary["expert_counts"][: num_experts // self._group.size]
        multiple = request.expert_alignment
        rounded: list[int] = (-(-pairs.astype(np.int64) // multiple) * multiple).tolist()
        return rounded

    def _move(
        self, move: Move, header: bytes, outputs: Outputs, launch: Launch = Launch.WHOLE
    ) -> None:
        """Launch dispatch.cu."""
        self._launch(
            move.form.spec,
            num_blocks=move.num_blocks,
            num_threads=move.form.num_threads,
            params=move.params(self._room.call, header, outputs, launch),
            shared_bytes=move.form.shared_bytes,
        )

    def _num_blocks(self, num_sms: int | None) -> int:
        num_sharing = self._room.slabs.num_sharing
        most = self._num_multiprocessors // num_sharing
        if num_sms is None:
            # The default is no promise where threads share a GPU: their blocks run side by side.
            num_sms = min(self._num_sms(), most) if num_sharing > 1 else self._num_sms()
        if num_sms > most:
            shared = f", which {num_sharing} ranks share" if num_sharing > 1 else ""
            raise InvalidArgument(
                f"num_sms is {num_sms}; GPU {self._device} has {self._num_multiprocessors} "
                f"multiprocessors{shared}, and all blocks of a call must run at once. Pass at most "
                f"{most}."
            )
        return num_sms

    # --- combine -------------------------------------------------------------------------------

    def combine(self, request: CombineRequest) -> CombineResult:
        """See `Engine.combine`."""
        num_blocks = self._check_combine(request)
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

    def _num_low_latency_blocks(self) -> int:
        # Threads that share the GPU run on it at the same time, and wait for one another; processes
        # take turns on it.
        most = self._num_multiprocessors // self._room.slabs.num_sharing
        # As many for each source: a block that has rows of two finds their places one by one.
        blocks = max(1, most // self._group.size * self._group.size)
        return min(blocks, cuda_layout.MAX_LOW_LATENCY_BLOCKS)

    def low_latency_dispatch(self, request: LowLatencyDispatchRequest) -> LowLatencyDispatchResult:
        """See `Engine.low_latency_dispatch`."""
        _check_aligned(request.data, "x")
        return self._low_latency.dispatch(request)

    def low_latency_combine(self, request: LowLatencyCombineRequest) -> Callable[[], None]:
        """See `Engine.low_latency_combine`."""
        _check_aligned(request.data, "x")
        _check_aligned(request.out, "out")
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


def _check_aligned(view: ArrayView, name: str) -> None:
    if view.ptr % 16:
        raise InvalidArgument(
            f"{name} begins at an address that is not a multiple of 16 bytes; pass a copy of it: "
            f"{name}.clone() or {name}.copy()."
        )
