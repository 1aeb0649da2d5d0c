"""The host engine: ranks of one host move rows through shared memory with NumPy.

Every rank stages its rows in its own slab, and every receiver gathers from there straight to the
rows' final positions: one stage copy and one memcpy a row. Also the oracle of the kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from epcomm import routing
from epcomm.arrays import ArrayView, view_numpy
from epcomm.board import Board, define_call
from epcomm.engines.agreed_values import (
    AGREED_ROWS,
    AGREED_SUMS,
    AGREED_TOPK,
    OWN_TOKENS,
    combine_values,
    dispatch_values,
    row_values,
)
from epcomm.engines.base import (
    Allocate,
    CombineRequest,
    CombineResult,
    DispatchInto,
    DispatchRequest,
    DispatchResult,
    LayoutViews,
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
    LowLatencyDispatchResult,
    LowLatencyShape,
    StreamOrder,
    TopK,
)
from epcomm.engines.host_layout import (
    check_layout,
    check_pairs,
    check_worst_tokens,
    make_layout,
)
from epcomm.engines.host_low_latency import HostLowLatency
from epcomm.engines.scratch import Scratch
from epcomm.engines.sections import Sections, as_rows, gather_rows
from epcomm.errors import UnsupportedConfig
from epcomm.group import Group
from epcomm.handle import DispatchHandle
from epcomm.slab import HostSlabs
from epcomm.topology import Topology

_DISPATCH = define_call("dispatch", AGREED_ROWS + AGREED_TOPK, OWN_TOKENS)
_DISPATCH_AGAIN = define_call("dispatch with a handle", ("handle", *AGREED_ROWS))
_COMBINE = define_call("combine", AGREED_SUMS)

#: Bytes of fp32 sums that combine keeps in cache at a time.
_CHUNK_BYTES = 1 << 18


@dataclass(frozen=True, eq=False)
class _Routing:
    """A handle's record.

    Attributes:
        counts: ``[num_ranks, num_ranks]`` rows from source to receiver.
        source_tokens: For each source rank, the tokens it sends here, ascending.
        slots: ``[num_ranks, num_tokens]`` row of each of this rank's tokens on each rank; where
            the token does not go, the row after that rank's last.
        num_staged: Tokens of each rank.
    """

    counts: routing.Ints
    source_tokens: tuple[routing.Ints, ...]
    slots: routing.Ints
    num_staged: routing.Ints


class HostEngine:
    """See `epcomm.engines.base.Engine`. Construction is collective.

    Args:
        group: The ranks, all on one host.
        topology: Their nodes.
        num_bytes: Bytes to reserve for throughput calls; grows when a call needs more.
        num_low_latency_bytes: The same for low-latency calls.
        shm_dir: See `HostSlabs`.
        timeout_s: Deadline of every wait, in seconds.
        can_mask: Whether low-latency calls mask ranks that do not answer.
        buffer_id: Marks the handles of this engine's Buffer.
        names: What errors call the ranks, where these are some of a larger group.
    """

    name = "host"
    makes_layout_in_dispatch = False

    def __init__(
        self,
        group: Group,
        topology: Topology,
        num_bytes: int,
        num_low_latency_bytes: int,
        shm_dir: str | None,
        timeout_s: float,
        can_mask: bool,
        buffer_id: int,
        names: Sequence[int] | None = None,
    ) -> None:
        if topology.num_nodes > 1:
            raise UnsupportedConfig(
                f"the group spans {topology.num_nodes} nodes {topology.node_of_rank}, and the host "
                "engine moves rows inside one. Use one Buffer a node, on comm.Split_type("
                "MPI.COMM_TYPE_SHARED), or unset EPCOMM_RANKS_PER_NODE."
            )
        self._group = group
        self._topology = topology
        self._shm_dir = shm_dir
        self._timeout_s = timeout_s
        self._buffer_id = buffer_id
        self._num_dispatches = 0
        self._scratch = Scratch()
        self._board = Board(group, group.size, shm_dir, timeout_s, names)
        self._slabs = HostSlabs(group, [num_bytes] * group.size, shm_dir, timeout_s)
        self._low_latency = HostLowLatency(
            group, self._board, num_low_latency_bytes, shm_dir, timeout_s, can_mask, self._scratch
        )

    def slab_bytes(self) -> int:
        """See `Engine.slab_bytes`."""
        return self._slabs.num_bytes[self._group.rank] + self._low_latency.slab_bytes()

    def active(self) -> AbstractContextManager[None]:
        """See `Engine.active`."""
        return nullcontext()

    def begin(self, order: StreamOrder) -> None:
        """See `Engine.begin`: calls are done when they return, so there is nothing to order."""

    def end(self, order: StreamOrder, keep: Any) -> None:
        """See `Engine.end`."""

    def synchronize(self) -> None:
        """See `Engine.synchronize`."""

    def comm_stream(self) -> None:
        """See `Engine.comm_stream`."""

    def make_layout(self, topk_idx: ArrayView, num_experts: int, allocate: Allocate) -> LayoutViews:
        """See `Engine.make_layout`."""
        return make_layout(topk_idx, num_experts, self._topology, allocate)

    # --- dispatch ------------------------------------------------------------------------------

    def dispatch(self, request: DispatchRequest) -> DispatchResult:
        """See `Engine.dispatch`."""
        if request.handle is not None:
            return self._dispatch_again(request, request.handle)
        layout = request.layout
        assert layout is not None  # the Buffer gives one of the two
        mask = layout.is_token_in_rank.numpy()
        per_rank = layout.num_tokens_per_rank.numpy()
        per_expert = layout.num_tokens_per_expert.numpy()
        choices = None if request.topk is None else request.topk.idx
        check_layout(mask, per_rank, per_expert, choices)
        if request.into is None:  # a part's counts are those of the whole
            check_pairs(choices, per_expert)
        values = dispatch_values(request, len(per_expert))
        said, counts = self._board.agree(_DISPATCH, values, per_rank.astype(np.int64))
        check_worst_tokens(counts.sum(axis=0), said["num_worst_tokens"])
        staged = self._stage_dispatch(request, said["num_tokens"], mask, per_expert)
        me = self._group.rank
        source_tokens = tuple(
            np.flatnonzero(sections.view(slab, "mask")[me])
            for sections, slab in zip(staged, self._slabs.views, strict=True)
        )
        record = self._make_routing(counts, source_tokens, mask, said["num_tokens"])
        num_recv_tokens = int(counts[:, me].sum())
        self._num_dispatches += 1
        handle = DispatchHandle(
            buffer_id=self._buffer_id,
            serial=self._num_dispatches,
            num_tokens=len(mask),
            num_recv_rows=request.num_worst_tokens or num_recv_tokens,
            num_recv_tokens=num_recv_tokens,
            routing=record,
        )
        out = self._gather(request, handle, staged, len(per_expert))
        return DispatchResult(
            data=out.data,
            scales=out.scales,
            topk=out.topk,
            num_recv_tokens_per_expert=[]
            if request.num_worst_tokens
            else self._count_experts(staged, len(per_expert), request.expert_alignment),
            handle=handle,
            num_recv_tokens_per_source=tuple(counts[:, me].tolist()),
        )

    def _dispatch_again(self, request: DispatchRequest, handle: DispatchHandle) -> DispatchResult:
        values = {**row_values(request), "handle": handle.serial}
        self._board.agree(_DISPATCH_AGAIN, values)
        staged = self._stage_dispatch(request, handle.routing.num_staged, None, None)
        out = self._gather(request, handle, staged, 0)
        return DispatchResult(out.data, out.scales, None, [], handle)

    def _stage_dispatch(
        self,
        request: DispatchRequest,
        num_tokens: routing.Ints,
        mask: routing.Bools | None,
        per_expert: npt.NDArray[np.int32] | None,
    ) -> list[Sections]:
        """Copy all that travels into this rank's slab; return where it lies on every rank."""
        parts: dict[str, npt.NDArray[Any]] = {"data": request.data.numpy()}
        if request.scales is not None:
            parts["scales"] = request.scales.numpy()
        if request.topk is not None:
            parts["topk_idx"] = request.topk.idx.numpy()
            parts["topk_weights"] = request.topk.weights.numpy()
        staged = []
        for count in num_tokens.tolist():
            spec = {name: ((count, *part.shape[1:]), part.dtype) for name, part in parts.items()}
            if mask is not None and per_expert is not None:
                spec["mask"] = ((self._group.size, count), mask.dtype)
                spec["per_expert"] = (per_expert.shape, per_expert.dtype)
            staged.append(Sections(spec))
        if mask is not None and per_expert is not None:
            parts |= {"mask": mask.T, "per_expert": per_expert}
        self._grow([sections.end for sections in staged])
        me = self._group.rank
        for name, part in parts.items():
            np.copyto(staged[me].view(self._slabs.views[me], name), part)
        self._board.post_staged()
        self._board.wait_staged("dispatch: staged rows")
        return staged

    def _make_routing(
        self,
        counts: routing.Ints,
        source_tokens: tuple[routing.Ints, ...],
        mask: routing.Bools,
        num_staged: routing.Ints,
    ) -> _Routing:
        first = routing.first_positions(counts)[self._group.rank]
        positions = routing.final_positions(mask, first).T
        spare_row = counts.sum(axis=0)[:, None]
        slots = np.ascontiguousarray(np.where(positions < 0, spare_row, positions))
        return _Routing(counts, source_tokens, slots, num_staged)

    def _gather(
        self,
        request: DispatchRequest,
        handle: DispatchHandle,
        staged: Sequence[Sections],
        num_experts: int,
    ) -> DispatchInto:
        """Gather all that was staged for this rank; return where it lies."""
        out = request.into or _allocate_outputs(request, handle)
        self._gather_part("data", out.data, out, handle, staged)
        if out.scales is not None:
            self._gather_part("scales", out.scales, out, handle, staged)
        if out.topk is not None:
            self._gather_part("topk_idx", out.topk.idx, out, handle, staged)
            self._gather_part("topk_weights", out.topk.weights, out, handle, staged)
            self._make_local(out.topk, out, handle, num_experts)
            if request.into is None:
                out.topk.idx.numpy()[handle.num_recv_tokens :] = -1
        return out

    def _gather_part(
        self,
        name: str,
        out: ArrayView,
        into: DispatchInto,
        handle: DispatchHandle,
        staged: Sequence[Sections],
    ) -> None:
        """Gather one staged array's rows from all sources to their final positions."""
        out_rows = as_rows(out.numpy())
        tokens_of = handle.routing.source_tokens
        sources = zip(staged, self._slabs.views, tokens_of, into.first_rows, strict=True)
        for sections, slab, tokens, begin in sources:
            end = begin + len(tokens)
            gather_rows(as_rows(sections.view(slab, name)), tokens, out_rows[begin:end])

    def _make_local(
        self, topk: TopK, into: DispatchInto, handle: DispatchHandle, num_experts: int
    ) -> None:
        """Make the choices of received rows local ones."""
        idx, weights = topk.idx.numpy(), topk.weights.numpy()
        num_local = num_experts // self._group.size
        for begin, tokens in zip(into.first_rows, handle.routing.source_tokens, strict=True):
            end = begin + len(tokens)
            local = idx[begin:end]
            local -= self._group.rank * num_local
            elsewhere = (local < 0) | (local >= num_local)
            local[elsewhere] = -1
            weights[begin:end][elsewhere] = 0.0

    def _count_experts(
        self, staged: Sequence[Sections], num_experts: int, alignment: int
    ) -> list[int]:
        num_local = num_experts // self._group.size
        begin = self._group.rank * num_local
        total = sum(
            sections.view(slab, "per_expert")[begin : begin + num_local].astype(np.int64)
            for sections, slab in zip(staged, self._slabs.views, strict=True)
        )
        assert isinstance(total, np.ndarray)
        return [routing.round_up(count, alignment) for count in total.tolist()]

    # --- combine -------------------------------------------------------------------------------

    def combine(self, request: CombineRequest) -> CombineResult:
        """See `Engine.combine`."""
        record: _Routing = request.handle.routing
        data = request.data.numpy()
        weights = None if request.topk_weights is None else request.topk_weights.numpy()
        self._board.agree(_COMBINE, combine_values(request))
        staged = self._stage_combine(data, weights, record.counts, request.first_rows)
        biases = [bias.numpy() for bias in request.biases]
        out = request.into or _allocate_sums(request)
        slots = [*record.slots, *(further.slots for further in request.further)]
        # Infinities and NaNs are the caller's own values, as on a GPU: no warnings.
        with np.errstate(all="ignore"):
            rows = self._staged_rows("data", staged)
            rows += [as_rows(further.data) for further in request.further]
            self._sum(rows, slots, biases, out.data.numpy())
            if out.topk_weights is not None:
                rows = self._staged_rows("weights", staged)
                for further in request.further:
                    assert further.topk_weights is not None  # all rows have weights, or none
                    rows.append(as_rows(further.topk_weights))
                self._sum(rows, slots, [], out.topk_weights.numpy())
        return out

    def _stage_combine(
        self,
        data: npt.NDArray[Any],
        weights: npt.NDArray[Any] | None,
        counts: routing.Ints,
        first_rows: tuple[int, ...] | None,
    ) -> list[Sections]:
        """Copy this rank's rows into its slab, and after the last a spare row of minus zeros."""
        parts = {"data": data} if weights is None else {"data": data, "weights": weights}
        staged = [
            Sections(
                {name: ((count + 1, part.shape[1]), part.dtype) for name, part in parts.items()}
            )
            for count in counts.sum(axis=0).tolist()
        ]
        self._grow([sections.end for sections in staged])
        me = self._group.rank
        ends = [0, *np.cumsum(counts[:, me]).tolist()]
        for name, part in parts.items():
            rows = staged[me].view(self._slabs.views[me], name)
            if first_rows is None:
                np.copyto(rows[: ends[-1]], part[: ends[-1]])
            else:
                for first, (begin, end) in zip(first_rows, itertools.pairwise(ends), strict=True):
                    np.copyto(rows[begin:end], part[first : first + end - begin])
            # NOTE: x + -0.0 is x for every x, 0.0 and -0.0 included; 0.0 would not do.
            rows[ends[-1]] = -0.0
        self._board.post_staged()
        self._board.wait_staged("combine: staged rows")
        return staged

    def _staged_rows(self, name: str, staged: Sequence[Sections]) -> list[npt.NDArray[Any]]:
        return [
            as_rows(sections.view(slab, name))
            for sections, slab in zip(staged, self._slabs.views, strict=True)
        ]

    def _sum(
        self,
        sources: Sequence[npt.NDArray[Any]],
        slots: Sequence[routing.Ints],
        biases: Sequence[npt.NDArray[Any]],
        out: npt.NDArray[Any],
    ) -> None:
        """Sum the sources' rows of each token in fp32, in order from the biases; round once."""
        num_tokens, width = out.shape
        chunk = max(1, _CHUNK_BYTES // (4 * width))
        sums = self._scratch.take("sums", (chunk, width), np.dtype(np.float32))
        rows = self._scratch.take("rows", (chunk, width), out.dtype)
        whole_rows = as_rows(rows)
        for begin in range(0, num_tokens, chunk):
            end = min(begin + chunk, num_tokens)
            total, part = sums[: end - begin], rows[: end - begin]
            for i, bias in enumerate(biases):
                _add(total, bias[begin:end], is_first=i == 0)
            for rank, (source, slot) in enumerate(zip(sources, slots, strict=True)):
                gather_rows(source, slot[begin:end], whole_rows[: end - begin])
                _add(total, part, is_first=rank == 0 and not biases)
            if not biases:
                # The sum starts from 0.0, which only shows where all that is added is -0.0.
                np.add(total, np.float32(0.0), out=total)
            out[begin:end] = total

    # --- slabs ---------------------------------------------------------------------------------

    def _grow(self, needed: Sequence[int]) -> None:
        """Make every rank's slab large enough. Collective where it grows: all see all needs."""
        have = self._slabs.num_bytes
        if all(need <= size for need, size in zip(needed, have, strict=True)):
            return
        sizes = [
            max(size, routing.round_up(need, 1 << 20))
            for need, size in zip(needed, have, strict=True)
        ]
        self._slabs = HostSlabs(self._group, sizes, self._shm_dir, self._timeout_s)

    def local_memory(self, is_low_latency: bool) -> ArrayView:
        """See `Engine.local_memory`."""
        if is_low_latency:
            return self._low_latency.local_memory()
        return view_numpy(self._slabs.views[self._group.rank])

    # --- low latency ---------------------------------------------------------------------------

    def low_latency_dispatch(self, request: LowLatencyDispatchRequest) -> LowLatencyDispatchResult:
        """See `Engine.low_latency_dispatch`."""
        return self._low_latency.dispatch(request)

    def low_latency_combine(self, request: LowLatencyCombineRequest) -> Callable[[], None]:
        """See `Engine.low_latency_combine`."""
        return self._low_latency.combine(request)

    def next_combine_buffer(self, shape: LowLatencyShape) -> ArrayView:
        """See `Engine.next_combine_buffer`."""
        return self._low_latency.next_combine_buffer(shape)

    def copy_masks(self, out: ArrayView) -> None:
        """See `Engine.copy_masks`."""
        out.numpy()[...] = self._board.masked

    def set_masked(self, rank: int, is_masked: bool) -> None:
        """See `Engine.set_masked`."""
        self._board.masked[rank] = is_masked

    def fail(self, missed: int) -> None:
        """See `NodeEngine.fail`."""
        self._board.fail(missed)

    def check_failed(self, phase: str) -> None:
        """See `NodeEngine.check_failed`."""
        self._board.check_failed(phase)

    def close(self, is_collective: bool) -> None:
        """See `Engine.close`."""
        self._board.close()
        self._slabs.close()
        self._low_latency.close()
        self._scratch.clear()


def _allocate_outputs(request: DispatchRequest, handle: DispatchHandle) -> DispatchInto:
    """Make the outputs of a dispatch; the sources' rows lie one after the other."""

    def make(source: ArrayView) -> ArrayView:
        return request.allocate((handle.num_recv_rows, source.shape[1]), source.dtype)

    num_tokens = [len(tokens) for tokens in handle.routing.source_tokens]
    return DispatchInto(
        data=make(request.data),
        scales=make(request.scales) if request.scales else None,
        topk=TopK(make(request.topk.idx), make(request.topk.weights)) if request.topk else None,
        first_rows=(0, *itertools.accumulate(num_tokens[:-1])),
    )


def _allocate_sums(request: CombineRequest) -> CombineResult:
    def make(source: ArrayView) -> ArrayView:
        return request.allocate((request.handle.num_tokens, source.shape[1]), source.dtype)

    weights = request.topk_weights
    return CombineResult(make(request.data), None if weights is None else make(weights))


def _add(total: npt.NDArray[np.float32], part: npt.NDArray[Any], is_first: bool) -> None:
    """Add to a sum, or begin it."""
    if is_first:
        np.copyto(total, part)
    else:
        np.add(total, part, out=total)
