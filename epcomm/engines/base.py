"""What the Buffer asks of an engine. Engines see views and plain numbers, never a framework.

What is made in every throughput call is a NamedTuple: making a frozen dataclass takes three to
four times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol

import numpy as np

from epcomm.arrays import ArrayView
from epcomm.events import EventHandle
from epcomm.handle import DispatchHandle

#: Makes memory for an output in the caller's framework: (shape, dtype) -> writable view.
Allocate = Callable[[tuple[int, ...], np.dtype[Any]], ArrayView]


@dataclass(frozen=True)
class Chunks:
    """How rows cross between nodes.

    Attributes:
        num_tokens: Tokens of a rank that cross at a time, one message for each other node.
        num_in_flight: Messages that a rank has under way, each way.
    """

    num_tokens: int
    num_in_flight: int


DEFAULT_CHUNKS = Chunks(num_tokens=256, num_in_flight=6)

#: Most choices a token may have in a low-latency call.
MAX_LOW_LATENCY_TOPK = 32


class StreamOrder(NamedTuple):
    """How one call is ordered against the caller's streams.

    Attributes:
        current_stream: Handle of the caller's current stream; None where its framework has none,
            and the host waits before and after the call.
        waits_for_current: Whether the call begins after what the current stream holds.
        previous_event: Event after which the call begins, or None.
        is_async: Whether the caller waits through an event; else its current stream waits here.
    """

    current_stream: int | None
    waits_for_current: bool
    previous_event: EventHandle | None
    is_async: bool


class LayoutViews(NamedTuple):
    """The layout of one rank's tokens, as `Buffer.get_dispatch_layout` gives it.

    Attributes:
        num_tokens_per_rank: ``[num_ranks] int32``.
        num_tokens_per_node: ``[num_nodes] int32``, or None inside one node.
        num_tokens_per_expert: ``[num_experts] int32``.
        is_token_in_rank: ``[num_tokens, num_ranks] bool``.
    """

    num_tokens_per_rank: ArrayView
    num_tokens_per_node: ArrayView | None
    num_tokens_per_expert: ArrayView
    is_token_in_rank: ArrayView


class TopK(NamedTuple):
    """Top-k choices and their weights: ``[num_tokens, num_topk]`` int32 or int64, and f32."""

    idx: ArrayView
    weights: ArrayView


@dataclass(frozen=True)
class DispatchInto:
    """Where a dispatch writes that is a part of a larger one.

    Attributes:
        data: Rows of the larger one; the rest as in `DispatchResult`.
        scales: See above.
        topk: See above.
        first_rows: For each source rank, the row where this part of its rows begins; empty where
            they lie one after the other and fill the arrays.
    """

    data: ArrayView
    scales: ArrayView | None
    topk: TopK | None
    first_rows: tuple[int, ...]


class DispatchRequest(NamedTuple):
    """A checked dispatch.

    Attributes:
        data: ``[num_tokens, hidden]`` rows, contiguous.
        scales: ``[num_tokens, num_scales]`` f32 or i32 of any strides, or None.
        layout: The layout; None where ``handle`` gives it, or ``num_experts`` with ``topk``.
        topk: Choices that travel with the rows, or None.
        handle: An earlier dispatch to repeat, or None.
        expert_alignment: Expert counts are rounded up to it.
        num_worst_tokens: Rows of the output, or 0 for as many as arrive.
        num_sms: Multiprocessors to use; None takes the default.
        allocate: Makes the outputs.
        chunks: How rows cross between nodes.
        into: Where to write in place of allocating, for a part of a larger dispatch; or None.
        num_experts: Where it is above 0 the layout is that of ``topk``, for so many experts; for
            engines that make it in dispatch.
    """

    data: ArrayView
    scales: ArrayView | None
    layout: LayoutViews | None
    topk: TopK | None
    handle: DispatchHandle | None
    expert_alignment: int
    num_worst_tokens: int
    num_sms: int | None
    allocate: Allocate
    chunks: Chunks = DEFAULT_CHUNKS
    into: DispatchInto | None = None
    num_experts: int = 0


class DispatchResult(NamedTuple):
    """What a dispatch gives.

    Attributes:
        data: ``[num_recv_rows, hidden]``.
        scales: ``[num_recv_rows, num_scales]``, or None.
        topk: Local expert ids and weights of the received rows, or None.
        num_recv_tokens_per_expert: Pairs a local expert; empty with ``num_worst_tokens``.
        handle: The record for combine.
        num_recv_tokens_per_source: Rows that arrived from each rank, where the host knows.
    """

    data: ArrayView
    scales: ArrayView | None
    topk: TopK | None
    num_recv_tokens_per_expert: list[int]
    handle: DispatchHandle
    num_recv_tokens_per_source: tuple[int, ...] | None = None


@dataclass(frozen=True)
class FurtherRows:
    """Rows that a combine adds after those of its own ranks.

    Attributes:
        data: ``[n + 1, hidden]`` of the rows' dtype; the last is the spare row of minus zeros.
        topk_weights: ``[n + 1, num_topk] f32``, or None.
        slots: ``[num_tokens] int64`` row of each token, n where it has none.
    """

    data: np.ndarray[Any, Any]
    topk_weights: np.ndarray[Any, Any] | None
    slots: np.ndarray[Any, np.dtype[np.int64]]


class FurtherSums(NamedTuple):
    """Rows like `FurtherRows`, of all other nodes together, on a GPU.

    Attributes:
        data: ``[n, hidden]`` of the rows' dtype.
        topk_weights: ``[n, num_topk] f32``, or None.
        places: ``[num_tokens, num_further] int32`` rows to add to each token, in order; or -1.
    """

    data: ArrayView
    topk_weights: ArrayView | None
    places: ArrayView


class CombineRequest(NamedTuple):
    """A checked combine.

    Attributes:
        data: ``[num_recv_rows, hidden]`` bf16, f16 or f32, contiguous.
        topk_weights: ``[num_recv_rows, num_topk] f32`` to sum alongside, or None.
        biases: Up to two ``[num_tokens, hidden]`` of the rows' dtype.
        handle: The dispatch that is undone.
        num_sms: Multiprocessors to use; None takes the default.
        allocate: Makes the outputs.
        chunks: How rows cross between nodes.
        into: Outputs to write in place of allocating; or None.
        first_rows: Where each source rank's rows begin in ``data``, as in `DispatchInto`; None
            where they lie one after the other.
        further: Rows to add after those of the ranks, before the one rounding; for the host engine.
        further_sums: The same for the cuda engine.
    """

    data: ArrayView
    topk_weights: ArrayView | None
    biases: tuple[ArrayView, ...]
    handle: DispatchHandle
    num_sms: int | None
    allocate: Allocate
    chunks: Chunks = DEFAULT_CHUNKS
    into: CombineResult | None = None
    first_rows: tuple[int, ...] | None = None
    further: Sequence[FurtherRows] = ()
    further_sums: FurtherSums | None = None


class CombineResult(NamedTuple):
    """``[num_tokens, hidden]`` sums, and ``[num_tokens, num_topk] f32`` sums of weights or None."""

    data: ArrayView
    topk_weights: ArrayView | None


class Fp8Format(Enum):
    """What low-latency dispatch sends: bf16 rows, or fp8 rows with one of three kinds of scale."""

    NONE = 0
    FLOAT_SCALES = 1
    POWER_OF_TWO_SCALES = 2
    PACKED_UE8M0_SCALES = 3


class CombinePrecision(Enum):
    """What low-latency combine sends for each token.

    RANK: one row a rank, its experts' weighted sum rounded to bf16.
    EXPERT: one row an expert, unweighted; the origin does all arithmetic in fp32.
    """

    RANK = 0
    EXPERT = 1


@dataclass(frozen=True)
class LowLatencyShape:
    """The fixed shape of a low-latency call, equal on all ranks."""

    num_max_tokens: int
    hidden: int
    num_experts: int
    num_ranks: int

    @property
    def num_local_experts(self) -> int:
        """Experts of one rank."""
        return self.num_experts // self.num_ranks

    @property
    def num_recv_rows(self) -> int:
        """Rows that each local expert has room for."""
        return self.num_ranks * self.num_max_tokens


@dataclass(frozen=True)
class LowLatencyDispatchRequest:
    """A checked low-latency dispatch.

    Attributes:
        data: ``[num_tokens, hidden] bf16``.
        topk_idx: ``[num_tokens, num_topk]`` int32 or int64.
        shape: The call's fixed shape.
        fp8: What is sent.
        recv_stats: ``[num_local_experts] int32``, received rows are added; or None.
        wait_stats: ``[num_ranks] int64``, microseconds waited are added; or None.
        has_hook: Whether ``receive`` is called later, and not at once.
        allocate: Makes the outputs.
    """

    data: ArrayView
    topk_idx: ArrayView
    shape: LowLatencyShape
    fp8: Fp8Format
    recv_stats: ArrayView | None
    wait_stats: ArrayView | None
    has_hook: bool
    allocate: Allocate


@dataclass(frozen=True)
class LowLatencyDispatchResult:
    """What a low-latency dispatch gives; filled once ``receive`` has run.

    Attributes:
        data: ``[num_local_experts, num_recv_rows, hidden]`` bf16 or fp8.
        scales: Stored ``[num_local_experts, num_scales, num_recv_rows]``, or None.
        recv_count: ``[num_local_experts] int32``.
        src_info: ``[num_local_experts, num_recv_rows] int32`` source token, -1 past the count.
        layout_range: ``[num_local_experts, num_ranks] int64`` begin << 32 | count.
        receive: Waits for the rows; must be called exactly once.
    """

    data: ArrayView
    scales: ArrayView | None
    recv_count: ArrayView
    src_info: ArrayView
    layout_range: ArrayView
    receive: Callable[[], None]


@dataclass(frozen=True)
class LowLatencyCombineRequest:
    """A checked low-latency combine.

    Attributes:
        data: ``[num_local_experts, num_recv_rows, hidden] bf16``.
        topk_idx: ``[num_tokens, num_topk]``.
        topk_weights: ``[num_tokens, num_topk] f32``.
        layout_range: From the dispatch.
        shape: The call's fixed shape.
        precision: What is sent.
        is_zero_copy: Whether ``data`` is the engine's own next combine buffer.
        wait_stats: As in dispatch.
        has_hook: As in dispatch.
        out: ``[num_tokens, hidden] bf16`` to write.
    """

    data: ArrayView
    topk_idx: ArrayView
    topk_weights: ArrayView
    layout_range: ArrayView
    shape: LowLatencyShape
    precision: CombinePrecision
    is_zero_copy: bool
    wait_stats: ArrayView | None
    has_hook: bool
    out: ArrayView


class Engine(Protocol):
    """Moves rows between the ranks of one node. All transfers are collective."""

    name: str
    #: Whether dispatch takes ``num_experts`` in place of a layout.
    makes_layout_in_dispatch: bool

    def slab_bytes(self) -> int:
        """Return the bytes of shared memory that this rank holds."""
        ...

    def active(self) -> AbstractContextManager[Any]:
        """Return the context in which calls are made: the engine's device is current."""
        ...

    def begin(self, order: StreamOrder) -> None:
        """Order the next call after what it has to wait for."""
        ...

    def end(self, order: StreamOrder, keep: Any) -> Any:
        """Order the caller after the call; return an event of `epcomm.streams`, or None.

        Args:
            order: As given to `begin`.
            keep: Arrays that must live until the event has passed.
        """
        ...

    def synchronize(self) -> None:
        """Wait on the host until all calls are done; raise what went wrong in them."""
        ...

    def comm_stream(self) -> Any:
        """Return the communication stream, None where there is none."""
        ...

    def make_layout(self, topk_idx: ArrayView, num_experts: int, allocate: Allocate) -> LayoutViews:
        """Count where this rank's tokens go. Not collective."""
        ...

    def dispatch(self, request: DispatchRequest) -> DispatchResult:
        """Move every row to the ranks that hold its experts."""
        ...

    def combine(self, request: CombineRequest) -> CombineResult:
        """Bring rows back and sum them."""
        ...

    def low_latency_dispatch(self, request: LowLatencyDispatchRequest) -> LowLatencyDispatchResult:
        """Send rows; the result's ``receive`` gathers them by local expert."""
        ...

    def low_latency_combine(self, request: LowLatencyCombineRequest) -> Callable[[], None]:
        """Send experts' rows; the returned function waits and sums into ``request.out``."""
        ...

    def next_combine_buffer(self, shape: LowLatencyShape) -> ArrayView:
        """Return the slab memory that the next low-latency combine sends from."""
        ...

    def local_memory(self, is_low_latency: bool) -> ArrayView:
        """Return this rank's own slab, ``[num_bytes] uint8``."""
        ...

    def copy_masks(self, out: ArrayView) -> None:
        """Write, by rank, 1 where low-latency calls go on without it: ``[num_ranks] int32``."""
        ...

    def set_masked(self, rank: int, is_masked: bool) -> None:
        """Mask or unmask a rank."""
        ...

    def close(self, is_collective: bool) -> None:
        """Let go of all memory; may be called twice.

        Args:
            is_collective: Whether all ranks close now. If not, nobody is waited for.
        """
        ...


class NodeEngine(Engine, Protocol):
    """An engine of one node's ranks of a larger group; it takes parts of larger calls.

    That is, requests with ``into``; the host engine's with ``first_rows`` and ``further``, the cuda
    engine's with ``further_sums``.
    """

    def fail(self, missed: int) -> None:
        """Make the calls of all ranks of the node fail: this rank gave up waiting for another."""
        ...

    def check_failed(self, phase: str) -> None:
        """Raise CommTimeout or TransportError if a rank of the node has failed."""
        ...


class DeviceNodeEngine(NodeEngine, Protocol):
    """A `NodeEngine` whose rows are on a GPU."""

    def call_stream(self) -> int:
        """Return the handle of the stream on which the call in hand runs."""
        ...

    def check_part(self, request: DispatchRequest | CombineRequest, max_tokens: int) -> None:
        """Raise InvalidArgument unless this engine takes a call's parts.

        Args:
            request: The whole call.
            max_tokens: Most tokens of any rank.
        """
        ...
