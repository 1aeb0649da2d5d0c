"""Low-latency calls of the host engine: fixed shapes, two slots, send and receive apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from epcomm.arrays import BFLOAT16, ArrayView, view_numpy
from epcomm.board import LOW_LATENCY_RECEIVED, LOW_LATENCY_SENT, Board, define_call
from epcomm.engines.base import (
    MAX_LOW_LATENCY_TOPK,
    Fp8Format,
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
    LowLatencyDispatchResult,
    LowLatencyShape,
)
from epcomm.engines.host_sums import sum_tokens
from epcomm.engines.low_latency_arrays import allocate_result, check_combine_buffer
from epcomm.engines.scratch import Scratch
from epcomm.engines.sections import Sections, as_rows, gather_rows
from epcomm.errors import InvalidArgument, TransportError
from epcomm.fp8 import cast_to_fp8, data_dtype, num_scales, scales_dtype
from epcomm.group import Group
from epcomm.slab import HostSlabs

_SHAPE = ("num_max_dispatch_tokens_per_rank", "hidden", "num_experts", "num_topk")
_DISPATCH = define_call("low_latency_dispatch", (*_SHAPE, "fp8_format"), ("num_tokens",))
_COMBINE = define_call("low_latency_combine", (*_SHAPE, "combine_precision"))

_NUM_SLOTS = 2
_CHUNK_TOKENS = 64


def region_bytes(shape: LowLatencyShape) -> int:
    """Return the bytes of both slots of one rank; each holds what dispatch or combine stages."""
    dispatch = _dispatch_sections(
        shape, Fp8Format.NONE, MAX_LOW_LATENCY_TOPK, shape.num_max_tokens, 0
    )
    return _NUM_SLOTS * max(dispatch.end, _combine_sections(shape, 0).end)


def _dispatch_sections(
    shape: LowLatencyShape, fp8: Fp8Format, num_topk: int, num_tokens: int, start: int
) -> Sections:
    spec: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
        "topk_idx": ((num_tokens, num_topk), np.dtype(np.int64)),
        "data": ((num_tokens, shape.hidden), data_dtype(fp8)),
    }
    if fp8 is not Fp8Format.NONE:
        spec["scales"] = ((num_tokens, num_scales(fp8, shape.hidden)), scales_dtype(fp8))
    return Sections(spec, start)


def _combine_sections(shape: LowLatencyShape, start: int) -> Sections:
    rows = (shape.num_local_experts, shape.num_recv_rows, shape.hidden)
    ranges = (shape.num_local_experts, shape.num_ranks)
    spec = {"data": (rows, BFLOAT16), "layout_range": (ranges, np.dtype(np.int64))}
    return Sections(spec, start)


class HostLowLatency:
    """The low-latency half of `HostEngine`.

    Calls use the two slots in turn. A rank sends call n + 2 only when it has received call n, and
    arrives at it only then, so no slot is written while a peer still reads it.

    Args:
        group: The ranks.
        board: The engine's board.
        num_bytes: Bytes to reserve; grows when a call needs more.
        shm_dir: See `HostSlabs`.
        timeout_s: Deadline of every wait, in seconds.
        can_mask: Whether ranks that do not answer are masked in place of failing.
        scratch: Memory for intermediate results.
    """

    def __init__(
        self,
        group: Group,
        board: Board,
        num_bytes: int,
        shm_dir: str | None,
        timeout_s: float,
        can_mask: bool,
        scratch: Scratch,
    ) -> None:
        self._group = group
        self._board = board
        self._shm_dir = shm_dir
        self._timeout_s = timeout_s
        self._can_mask = can_mask
        self._scratch = scratch
        self._num_calls = 0
        #: Numbers of the calls whose hook was not called yet.
        self._unreceived: set[int] = set()
        self._slabs = HostSlabs(group, [num_bytes] * group.size, shm_dir, timeout_s)

    def slab_bytes(self) -> int:
        """Return the bytes that this rank holds."""
        return self._slabs.num_bytes[self._group.rank]

    def local_memory(self) -> ArrayView:
        """See `Engine.local_memory`."""
        return view_numpy(self._slabs.views[self._group.rank])

    def close(self) -> None:
        """Let go of the memory."""
        self._slabs.close()

    # --- one call ------------------------------------------------------------------------------

    def _slot_start(self, call: int, shape: LowLatencyShape) -> int:
        # The slots divide what there is, so that a call of another shape uses the same two.
        half = self._slabs.num_bytes[self._group.rank] // _NUM_SLOTS
        return (call % _NUM_SLOTS) * (half // 64 * 64)

    def _check_unreceived(self, name: str) -> None:
        # The next call writes the slot of the one that was _NUM_SLOTS before it.
        if self._num_received() <= self._num_calls - _NUM_SLOTS:
            raise InvalidArgument(
                f"{name}: {len(self._unreceived)} earlier low-latency results wait for their hook, "
                f"and there are {_NUM_SLOTS} slots; call the oldest hook() first. Nothing was sent."
            )

    def _num_received(self) -> int:
        """Return the number of the last call up to which all were received here."""
        return min(self._unreceived) - 1 if self._unreceived else self._num_calls

    def _on_missing(self) -> Callable[[Sequence[int]], None] | None:
        return self._mask if self._can_mask else None

    def _mask(self, ranks: Sequence[int]) -> None:
        self._board.masked[list(ranks)] = True

    def _begin(self, name: str, shape: LowLatencyShape) -> int:
        """Make room, where needed, and return the number of this call."""
        needed = region_bytes(shape)
        if needed > self.slab_bytes():
            if self._board.masked.any():
                raise TransportError(
                    f"{name} needs {needed} bytes a rank, the Buffer has {self.slab_bytes()}, and "
                    "it cannot grow while a rank is masked: growing takes all ranks. Pass "
                    f"num_rdma_bytes={needed} when making the Buffer."
                )
            # Every rank comes to the same decision: the shape was agreed on. Results that wait for
            # their hook keep the old slabs.
            self._slabs = HostSlabs(
                self._group, [needed] * self._group.size, self._shm_dir, self._timeout_s
            )
        self._num_calls += 1
        self._unreceived.add(self._num_calls)
        return self._num_calls

    def _receiver(
        self, call: int, name: str, wait_stats: ArrayView | None, work: Callable[[], None]
    ) -> Callable[[], None]:
        """Return the function that waits for all ranks and then does its work, once."""
        state = {"is_done": False}

        def receive() -> None:
            if state["is_done"]:
                raise InvalidArgument(f"{name}: this hook was called before; call each hook once.")
            state["is_done"] = True
            stats = None if wait_stats is None else wait_stats.numpy()
            try:
                self._board.wait(
                    LOW_LATENCY_SENT, call, f"{name}: rows", self._on_missing(), waited_us=stats
                )
                work()
            finally:
                self._unreceived.discard(call)
                self._board.post(LOW_LATENCY_RECEIVED, self._num_received())
            if self._can_mask:
                self._board.check_in_step(name)

        return receive

    # --- dispatch ------------------------------------------------------------------------------

    def dispatch(self, request: LowLatencyDispatchRequest) -> LowLatencyDispatchResult:
        """See `Engine.low_latency_dispatch`."""
        name = "low_latency_dispatch"
        shape, fp8 = request.shape, request.fp8
        idx = request.topk_idx.numpy()
        _check_choices(idx, shape.num_experts)
        self._check_unreceived(name)
        values = {
            **_shape_values(shape, idx.shape[1]),
            "fp8_format": fp8.value,
            "num_tokens": len(idx),
        }
        # Before any peer is touched: without memory nothing has begun.
        result, scales_view = allocate_result(request)
        said, _ = self._board.agree(_DISPATCH, values, on_missing=self._on_missing())
        call = self._begin(name, shape)
        start = self._slot_start(call, shape)
        staged = [
            _dispatch_sections(shape, fp8, idx.shape[1], count, start)
            for count in said["num_tokens"].tolist()
        ]
        slab = self._slabs.views[self._group.rank]
        mine = staged[self._group.rank]
        mine.view(slab, "topk_idx")[...] = idx
        if fp8 is Fp8Format.NONE:
            np.copyto(mine.view(slab, "data"), request.data.numpy())
        else:
            data, scales = mine.view(slab, "data"), mine.view(slab, "scales")
            self._cast(request.data.numpy(), fp8, data, scales)
        self._board.post(LOW_LATENCY_SENT, call)
        slabs, masked = self._slabs.views, self._board.masked.copy()

        def work() -> None:
            self._gather(request, slabs, staged, masked, result, scales_view)

        receive = self._receiver(call, name, request.wait_stats, work)
        return LowLatencyDispatchResult(scales=scales_view, receive=receive, **result)

    def _cast(
        self,
        rows: npt.NDArray[Any],
        fp8: Fp8Format,
        out: npt.NDArray[Any],
        out_scales: npt.NDArray[Any],
    ) -> None:
        for begin in range(0, len(rows), _CHUNK_TOKENS):
            part = slice(begin, min(begin + _CHUNK_TOKENS, len(rows)))
            values = self._scratch.take("cast rows", rows[part].shape, np.dtype(np.float32))
            np.copyto(values, rows[part])
            cast_to_fp8(values, fp8, out[part], out_scales[part])

    def _gather(
        self,
        request: LowLatencyDispatchRequest,
        slabs: Sequence[npt.NDArray[np.uint8]],
        staged: Sequence[Sections],
        masked: npt.NDArray[np.bool_],
        result: dict[str, ArrayView],
        scales_view: ArrayView | None,
    ) -> None:
        """Fan the staged rows out to the local experts, by source rank, then token."""
        shape = request.shape
        first_expert = self._group.rank * shape.num_local_experts
        data, src_info = result["data"].numpy(), result["src_info"].numpy()
        src_info[...] = -1
        begin = np.zeros(shape.num_local_experts, np.int64)
        ranges = result["layout_range"].numpy()
        for rank, (sections, slab) in enumerate(zip(staged, slabs, strict=True)):
            counts = np.zeros(shape.num_local_experts, np.int64)
            # Masked when this was sent: no header came. Masked since: its rows did not come.
            if not (masked[rank] or self._board.masked[rank]):
                idx = sections.view(slab, "topk_idx")
                rows = as_rows(sections.view(slab, "data"))
                for expert, tokens in _tokens_by_expert(idx, first_expert, len(begin)):
                    at = slice(int(begin[expert]), int(begin[expert]) + len(tokens))
                    gather_rows(rows, tokens, as_rows(data[expert])[at])
                    src_info[expert, at] = tokens
                    if scales_view is not None:
                        scales = sections.view(slab, "scales")
                        scales_view.numpy()[expert, :, at] = scales[tokens].T
                    counts[expert] = len(tokens)
            ranges[:, rank] = begin << 32 | counts
            begin += counts
        result["recv_count"].numpy()[...] = begin
        if request.recv_stats is not None:
            stats = request.recv_stats.numpy()
            stats += begin.astype(stats.dtype)

    # --- combine -------------------------------------------------------------------------------

    def combine(self, request: LowLatencyCombineRequest) -> Callable[[], None]:
        """See `Engine.low_latency_combine`."""
        name = "low_latency_combine"
        shape = request.shape
        idx = request.topk_idx.numpy().astype(np.int64)
        _check_choices(idx, shape.num_experts)
        self._check_unreceived(name)
        values = {
            **_shape_values(shape, idx.shape[1]),
            "combine_precision": request.precision.value,
        }
        if request.is_zero_copy:
            self._check_zero_copy(request)
        self._board.agree(_COMBINE, values, on_missing=self._on_missing())
        call = self._begin(name, shape)
        sections = _combine_sections(shape, self._slot_start(call, shape))
        slab = self._slabs.views[self._group.rank]
        ranges = request.layout_range.numpy()
        sections.view(slab, "layout_range")[...] = ranges
        if not request.is_zero_copy:
            data, staged = request.data.numpy(), sections.view(slab, "data")
            for expert, count in enumerate((ranges & 0xFFFFFFFF).sum(axis=1).tolist()):
                np.copyto(staged[expert, :count], data[expert, :count])
        self._board.post(LOW_LATENCY_SENT, call)
        slabs = self._slabs.views

        def work() -> None:
            views = [
                (sections.view(slab, "data"), sections.view(slab, "layout_range")) for slab in slabs
            ]
            me, masked = self._group.rank, self._board.masked
            sum_tokens(request, idx, me, views, masked, self._scratch)

        return self._receiver(call, name, request.wait_stats, work)

    def next_combine_buffer(self, shape: LowLatencyShape) -> ArrayView:
        """See `Engine.next_combine_buffer`."""
        if region_bytes(shape) > self.slab_bytes():
            raise InvalidArgument(
                "the low-latency slots are too small for this handle's shape; dispatch with it "
                "first, on this Buffer."
            )
        name = "get_next_low_latency_combine_buffer"
        self._check_unreceived(name)
        # The caller writes it before the ranks meet in the call: wait for its last readers.
        self._board.wait(
            LOW_LATENCY_RECEIVED,
            self._num_calls + 1 - _NUM_SLOTS,
            f"{name}: peers' hooks",
            self._on_missing(),
        )
        sections = _combine_sections(shape, self._slot_start(self._num_calls + 1, shape))
        return view_numpy(sections.view(self._slabs.views[self._group.rank], "data"))

    def _check_zero_copy(self, request: LowLatencyCombineRequest) -> None:
        sections = _combine_sections(
            request.shape, self._slot_start(self._num_calls + 1, request.shape)
        )
        fits = sections.end <= self.slab_bytes()
        slab = self._slabs.views[self._group.rank]
        wanted = view_numpy(sections.view(slab, "data")).ptr if fits else 0
        check_combine_buffer(request.data, wanted)


def _tokens_by_expert(
    idx: npt.NDArray[np.int64], first_expert: int, num_local: int
) -> list[tuple[int, npt.NDArray[np.int64]]]:
    """Return, for each local expert that is chosen, its tokens ascending."""
    tokens, choices = np.nonzero((idx >= first_expert) & (idx < first_expert + num_local))
    experts = idx[tokens, choices] - first_expert
    order = np.argsort(experts, kind="stable")
    ends = np.cumsum(np.bincount(experts, minlength=num_local))
    parts = np.split(tokens[order], ends[:-1])
    return [(expert, part) for expert, part in enumerate(parts) if len(part)]


def _shape_values(shape: LowLatencyShape, num_topk: int) -> dict[str, int]:
    numbers = (shape.num_max_tokens, shape.hidden, shape.num_experts, num_topk)
    return dict(zip(_SHAPE, numbers, strict=True))


def _check_choices(idx: npt.NDArray[Any], num_experts: int) -> None:
    if not idx.size:
        return
    if idx.min() < -1 or idx.max() >= num_experts:
        raise InvalidArgument(
            f"topk_idx holds values from {idx.min()} to {idx.max()}; they must be expert ids from "
            f"0 to {num_experts - 1}, or -1 for no choice."
        )
    ordered = np.sort(idx, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        token = int(np.flatnonzero(twice.any(axis=1))[0])
        raise InvalidArgument(
            f"topk_idx[{token}] is {idx[token].tolist()}; low-latency calls have room for one row "
            "a (token, expert), so a token's choices must differ."
        )
