"""Arrays on a GPU for an engine of the host: they are copied through pinned host memory.

For GPUs without peer access, and groups that span nodes. A call copies its inputs to the host and
waits for them; then the inner engine makes the call; then the outputs are copied to the GPU, behind
which the caller's stream, or its event, comes. So all a call reads of the caller's arrays it has
read when it returns, and its outputs are ordered by streams like those of the cuda engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from epcomm import streams
from epcomm.arrays import BFLOAT16, CPU, ArrayView, Device, packed_strides, view_numpy
from epcomm.engines.base import (
    Allocate,
    CombineRequest,
    CombineResult,
    DispatchRequest,
    DispatchResult,
    Engine,
    LayoutViews,
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
    LowLatencyDispatchResult,
    LowLatencyShape,
    StreamOrder,
    TopK,
)
from epcomm.engines.call_streams import CallStreams
from epcomm.engines.low_latency_arrays import allocate_result, check_combine_buffer
from epcomm.errors import UnsupportedConfig

#: An array on the GPU, and the memory of the host that stands for it.
_Pair = tuple[ArrayView, ArrayView]


class Copies(Protocol):
    """Memory of the host and of one GPU, and copies between them in the order of streams."""

    #: The communication stream, with its handle as ``ptr``.
    comm_stream: Any

    def active(self) -> AbstractContextManager[Any]:
        """Return the context in which the GPU is current."""
        ...

    def empty_on_host(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Return memory of the host that copies can run to and from."""
        ...

    def empty_on_device(self, num_bytes: int) -> Any:
        """Return memory of the GPU, with its address as ``ptr``, that nothing uses yet."""
        ...

    def to_host(self, ptr: int, memory: npt.NDArray[np.uint8], stream: int) -> None:
        """Queue the copy from an address of the GPU that fills memory of the host."""
        ...

    def to_device(self, memory: npt.NDArray[np.uint8], ptr: int, stream: int) -> None:
        """Queue the copy of memory of the host to an address of the GPU."""
        ...

    def synchronize(self, stream: int) -> None:
        """Wait until all that a stream holds is done."""
        ...


class StagedEngine:
    """See `epcomm.engines.base.Engine`.

    Args:
        inner: Makes the calls; it works on CPU memory.
        copies: Of this rank's GPU.
        device: That GPU.
    """

    def __init__(self, inner: Engine, copies: Copies, device: Device) -> None:
        self.name = f"{inner.name}+staged"
        self._inner = inner
        self._copies = copies
        self._device = device
        self._streams = CallStreams(copies.comm_stream)
        #: What the call in hand copies to the GPU.
        self._sources: list[Any] = []
        self._combine_buffer: Any = None
        self._combine_buffer_bytes = 0

    def slab_bytes(self) -> int:
        """See `Engine.slab_bytes`; without the pinned memory, which belongs to a pool."""
        return self._inner.slab_bytes()

    def comm_stream(self) -> Any:
        """See `Engine.comm_stream`."""
        return self._copies.comm_stream

    def local_memory(self, is_low_latency: bool) -> ArrayView:
        """See `Engine.local_memory`: CPU memory."""
        return self._inner.local_memory(is_low_latency)

    # --- streams -------------------------------------------------------------------------------

    def active(self) -> AbstractContextManager[Any]:
        """See `Engine.active`."""
        return self._copies.active()

    def begin(self, order: StreamOrder) -> None:
        """See `Engine.begin`."""
        current = order.current_stream
        if current is not None and streams.is_capturing(current):
            raise UnsupportedConfig(
                f"a CUDA graph is being captured, and the {self.name} engine copies arrays through "
                "host memory, which a graph cannot repeat. Call outside of the capture, or use "
                "engine='cuda', which needs one node and peer access. Nothing was sent."
            )
        self._sources = []
        self._streams.begin(order, is_capturing=False)

    def end(self, order: StreamOrder, keep: Any) -> Any:
        """See `Engine.end`."""
        # Pinned memory goes back to its pool, for others to write, only when it has been read.
        sources, self._sources = self._sources, []
        return self._streams.end(order, keep, own=sources)

    def synchronize(self) -> None:
        """See `Engine.synchronize`."""
        self._copies.synchronize(self._copies.comm_stream.ptr)
        self._streams.wait_last()

    # --- copies --------------------------------------------------------------------------------

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> ArrayView:
        """Return row-major host memory: what the inner engine gets as an output."""
        memory = self._copies.empty_on_host(math.prod(shape) * dtype.itemsize)
        return view_numpy(memory.view(dtype).reshape(shape))

    def _fetch(self, view: ArrayView) -> ArrayView:
        """Queue the copy of an array to the host; return where it will be, with its strides."""
        first, num_bytes = _span(view)
        memory = self._copies.empty_on_host(num_bytes)
        if num_bytes:
            self._copies.to_host(view.ptr + first, memory, self._streams.stream.ptr)
        ptr = memory.ctypes.data - first
        return view._replace(ptr=ptr, device=CPU, is_readonly=False, owner=memory)

    def _fetch_rows(self, view: ArrayView, num_rows: int | None) -> ArrayView:
        """As `_fetch`, of so many leading rows of a contiguous array; None stands for all."""
        host = self._empty(view.shape, view.dtype)
        self._fetch_into(host.numpy()[:num_rows], view.ptr)
        return host

    def _fetch_into(self, array: npt.NDArray[Any], ptr: int) -> None:
        if array.size:
            self._copies.to_host(ptr, _bytes(array), self._streams.stream.ptr)

    def _give(self, allocate: Allocate, host: ArrayView, num_rows: int | None = None) -> ArrayView:
        """Allocate an output and queue the copy of so many leading rows; None stands for all."""
        view = allocate(host.shape, host.dtype)
        self._put(host.numpy()[:num_rows], view.ptr)
        return view

    def _put(self, array: npt.NDArray[Any], ptr: int) -> None:
        """Queue the copy of contiguous host memory to an address of the GPU."""
        if array.size:
            self._sources.append(array)
            self._copies.to_device(_bytes(array), ptr, self._streams.stream.ptr)

    def _wait(self) -> None:
        """Wait for what was fetched."""
        self._copies.synchronize(self._streams.stream.ptr)

    # --- layout, dispatch and combine ----------------------------------------------------------

    def make_layout(self, topk_idx: ArrayView, num_experts: int, allocate: Allocate) -> LayoutViews:
        """See `Engine.make_layout`."""
        idx = self._fetch(topk_idx)
        self._wait()
        made = self._inner.make_layout(idx, num_experts, self._empty)
        per_node = made.num_tokens_per_node
        return LayoutViews(
            num_tokens_per_rank=self._give(allocate, made.num_tokens_per_rank),
            num_tokens_per_node=None if per_node is None else self._give(allocate, per_node),
            num_tokens_per_expert=self._give(allocate, made.num_tokens_per_expert),
            is_token_in_rank=self._give(allocate, made.is_token_in_rank),
        )

    def dispatch(self, request: DispatchRequest) -> DispatchResult:
        """See `Engine.dispatch`."""
        layout, scales, topk = request.layout, request.scales, request.topk
        staged = request._replace(
            data=self._fetch(request.data),
            scales=None if scales is None else self._fetch(scales),
            layout=None if layout is None else self._fetch_layout(layout),
            topk=None if topk is None else TopK(self._fetch(topk.idx), self._fetch(topk.weights)),
            allocate=self._empty,
        )
        self._wait()
        result = self._inner.dispatch(staged)
        # With num_worst_tokens there are rows behind the last that arrived; of those only the
        # choices hold anything.
        arrived = result.handle.num_recv_tokens

        def give(host: ArrayView) -> ArrayView:
            return self._give(request.allocate, host, arrived)

        recv_topk = None
        if result.topk is not None:
            idx = self._give(request.allocate, result.topk.idx)
            recv_topk = TopK(idx, give(result.topk.weights))
        return result._replace(
            data=give(result.data),
            scales=None if result.scales is None else give(result.scales),
            topk=recv_topk,
        )

    def _fetch_layout(self, layout: LayoutViews) -> LayoutViews:
        return LayoutViews(
            num_tokens_per_rank=self._fetch(layout.num_tokens_per_rank),
            num_tokens_per_node=None,  # not used by dispatch
            num_tokens_per_expert=self._fetch(layout.num_tokens_per_expert),
            is_token_in_rank=self._fetch(layout.is_token_in_rank),
        )

    def combine(self, request: CombineRequest) -> CombineResult:
        """See `Engine.combine`."""
        weights, arrived = request.topk_weights, request.handle.num_recv_tokens
        staged = request._replace(
            data=self._fetch_rows(request.data, arrived),
            topk_weights=None if weights is None else self._fetch_rows(weights, arrived),
            biases=tuple(self._fetch(bias) for bias in request.biases),
            allocate=self._empty,
        )
        self._wait()
        result = self._inner.combine(staged)
        sums = result.topk_weights
        return CombineResult(
            self._give(request.allocate, result.data),
            None if sums is None else self._give(request.allocate, sums),
        )

    # --- low latency ---------------------------------------------------------------------------

    def low_latency_dispatch(self, request: LowLatencyDispatchRequest) -> LowLatencyDispatchResult:
        """See `Engine.low_latency_dispatch`."""
        # Before any peer is touched: without memory nothing has begun.
        result, scales = allocate_result(request)
        recv_stats = self._stage_stats(request.recv_stats)
        wait_stats = self._stage_stats(request.wait_stats)
        staged = replace(
            request,
            data=self._fetch(request.data),
            topk_idx=self._fetch(request.topk_idx),
            recv_stats=recv_stats and recv_stats[1],
            wait_stats=wait_stats and wait_stats[1],
            allocate=self._empty,
        )
        self._wait()
        sent = self._inner.low_latency_dispatch(staged)

        def deliver() -> None:
            self._put_experts(sent, result["data"], scales)
            for name in ("recv_count", "src_info", "layout_range"):
                self._put(getattr(sent, name).numpy(), result[name].ptr)

        stats = [pair for pair in (recv_stats, wait_stats) if pair is not None]
        receive = self._receiver(sent.receive, stats, deliver)
        return LowLatencyDispatchResult(scales=scales, receive=receive, **result)

    def _put_experts(
        self, sent: LowLatencyDispatchResult, data: ArrayView, scales: ArrayView | None
    ) -> None:
        """Queue the copies of the rows that arrived for each local expert, and of its scales."""
        rows = sent.data.numpy()
        for expert, count in enumerate(sent.recv_count.numpy().tolist()):
            self._put(rows[expert, :count], data.ptr + expert * data.strides[0])
            if count and scales is not None and sent.scales is not None:
                # Rows are innermost there: an expert's scales lie among those of no row.
                ptr = scales.ptr + expert * scales.strides[0]
                self._put(sent.scales.numpy()[expert], ptr)

    def low_latency_combine(self, request: LowLatencyCombineRequest) -> Callable[[], None]:
        """See `Engine.low_latency_combine`."""
        if request.is_zero_copy:
            self._check_zero_copy(request)
        wait_stats = self._stage_stats(request.wait_stats)
        out = self._empty(request.out.shape, request.out.dtype)
        staged = replace(
            request,
            topk_idx=self._fetch(request.topk_idx),
            topk_weights=self._fetch(request.topk_weights),
            layout_range=self._fetch(request.layout_range),
            is_zero_copy=False,
            wait_stats=wait_stats and wait_stats[1],
            out=out,
        )
        # NOTE: waiting for the counts costs less than copying the rows of all that has room.
        self._wait()
        data = self._fetch_experts(request.data, staged.layout_range.numpy())
        self._wait()
        receive = self._inner.low_latency_combine(replace(staged, data=data))

        def deliver() -> None:
            self._put(out.numpy(), request.out.ptr)

        return self._receiver(receive, [] if wait_stats is None else [wait_stats], deliver)

    def _fetch_experts(self, data: ArrayView, ranges: npt.NDArray[np.int64]) -> ArrayView:
        """Queue the copies of the rows that each local expert has received."""
        host = self._empty(data.shape, data.dtype)
        rows = host.numpy()
        for expert, count in enumerate((ranges & 0xFFFFFFFF).sum(axis=1).tolist()):
            self._fetch_into(rows[expert, :count], data.ptr + expert * data.strides[0])
        return host

    def _stage_stats(self, view: ArrayView | None) -> _Pair | None:
        return None if view is None else (view, self._empty(view.shape, view.dtype))

    def _receiver(
        self, receive: Callable[[], None], stats: Sequence[_Pair], deliver: Callable[[], None]
    ) -> Callable[[], None]:
        """Return the function that receives, adds to statistics in place, and delivers.

        Statistics are fetched no sooner: of two results that wait, both may add to the same.
        """

        def receive_and_copy() -> None:
            for view, host in stats:
                self._fetch_into(host.numpy(), view.ptr)
            if stats:
                self._wait()
            receive()
            for view, host in stats:
                self._put(host.numpy(), view.ptr)
            deliver()

        return receive_and_copy

    def next_combine_buffer(self, shape: LowLatencyShape) -> ArrayView:
        """See `Engine.next_combine_buffer`: memory of the GPU, made at the first use."""
        self._inner.next_combine_buffer(shape)  # refuses where there is none to be had
        sizes = (shape.num_local_experts, shape.num_recv_rows, shape.hidden)
        num_bytes = math.prod(sizes) * BFLOAT16.itemsize
        if self._combine_buffer_bytes < num_bytes:
            self._combine_buffer = self._copies.empty_on_device(num_bytes)
            self._combine_buffer_bytes = num_bytes
        return ArrayView(
            ptr=self._combine_buffer.ptr,
            shape=sizes,
            strides=packed_strides(sizes, BFLOAT16),
            dtype=BFLOAT16,
            device=self._device,
            is_readonly=False,
            owner=self._combine_buffer,
        )

    def _check_zero_copy(self, request: LowLatencyCombineRequest) -> None:
        wanted = 0 if self._combine_buffer is None else self._combine_buffer.ptr
        check_combine_buffer(request.data, wanted)

    # --- masks ---------------------------------------------------------------------------------

    def copy_masks(self, out: ArrayView) -> None:
        """See `Engine.copy_masks`."""
        host = self._empty(out.shape, out.dtype)
        self._inner.copy_masks(host)
        self._put(host.numpy(), out.ptr)

    def set_masked(self, rank: int, is_masked: bool) -> None:
        """See `Engine.set_masked`: at once, as all earlier calls are done with the inner engine."""
        self._inner.set_masked(rank, is_masked)

    def close(self, is_collective: bool) -> None:
        """See `Engine.close`."""
        with self.active():
            self.synchronize()
            self._streams.forget()
            self._combine_buffer = None
            self._combine_buffer_bytes = 0
            self._inner.close(is_collective)


def _bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """View contiguous memory as bytes."""
    return array.reshape(-1).view(np.uint8)


def _span(view: ArrayView) -> tuple[int, int]:
    """Return where an array's memory begins, from its first element, and how long it is, in bytes.

    What lies between its elements is counted in: it is of the same allocation.
    """
    if 0 in view.shape:
        return 0, 0
    ends = [(n - 1) * step for n, step in zip(view.shape, view.strides, strict=True)]
    first = sum(end for end in ends if end < 0)
    last = sum(end for end in ends if end > 0)
    return first, last - first + view.dtype.itemsize
