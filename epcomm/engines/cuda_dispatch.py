"""From a dispatch to its call's header, its outputs, and what dispatch.cu is launched with."""

from __future__ import annotations

from enum import Enum
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from epcomm import cuda_layout
from epcomm.arrays import DTYPE_INDEX, ArrayView
from epcomm.cuda_layout import NUM_STAGE_WARPS, WORD_BYTES, Agreed
from epcomm.engines import cuda_failures, cuda_params, cuda_tuning
from epcomm.engines.agreed_values import NO_ARRAY
from epcomm.engines.base import DispatchRequest, TopK
from epcomm.engines.cuda_routes import Tables
from epcomm.jit import kernels


class Form(NamedTuple):
    """What follows from the forms of a dispatch's arrays, however many tokens there are.

    Attributes:
        agreed: What ranks agree in, but for the call and the handle.
        staged: Bytes of a row and all that travels with it.
        row_bytes: Bytes of a row.
        num_scales: Scales of a row.
        num_topk: Choices that travel with a row.
        is_64_bit: Whether choices are int64.
        spec: The kernel.
        num_threads: Threads of a block.
        shared_bytes: Dynamic shared memory of a block.
    """

    agreed: tuple[int, ...]
    staged: int
    row_bytes: int
    num_scales: int
    num_topk: int
    is_64_bit: bool
    spec: kernels.KernelSpec
    num_threads: int
    shared_bytes: int


def form_of(request: DispatchRequest, num_experts: int, num_ranks: int, has_bulk: bool) -> Form:
    """Return the form of a dispatch.

    Args:
        request: The call.
        num_experts: Experts over all ranks; 0 with a handle.
        num_ranks: Ranks of the group.
        has_bulk: Whether the GPU has bulk copies.
    """
    data, scales, topk = request.data, request.scales, request.topk
    return _form_of(
        *(num_ranks, has_bulk),
        *(data.shape[1], data.dtype),
        *((scales.shape[1], scales.dtype) if scales is not None else (0, None)),
        *((topk.idx.shape[1], topk.idx.dtype) if topk is not None else (0, None)),
        *(num_experts, request.expert_alignment),
    )


@lru_cache(maxsize=256)
def _form_of(
    num_ranks: int,
    has_bulk: bool,
    hidden: int,
    dtype: np.dtype[Any],
    num_scales: int,
    scales_dtype: np.dtype[Any] | None,
    num_topk: int,
    topk_dtype: np.dtype[Any] | None,
    num_experts: int,
    expert_alignment: int,
) -> Form:
    """Return the form of a dispatch; a model's layers share a few of them."""
    agreed = Agreed(
        call=0,
        handle=0,
        hidden=hidden,
        dtype=DTYPE_INDEX[dtype],
        num_scales=num_scales,
        scales_dtype=NO_ARRAY if scales_dtype is None else DTYPE_INDEX[scales_dtype],
        num_topk=num_topk,
        topk_dtype=NO_ARRAY if topk_dtype is None else DTYPE_INDEX[topk_dtype],
        num_experts=num_experts,
        expert_alignment=expert_alignment,
    )
    row_bytes = hidden * dtype.itemsize
    staged = cuda_layout.staged_row_bytes(row_bytes, num_scales, num_topk)
    num_warps = cuda_tuning.dispatch_warps(staged)
    num_stages = cuda_tuning.dispatch_stages(staged)
    has_bulk = has_bulk and num_warps > 0
    return Form(
        agreed=agreed[2:],
        staged=staged,
        row_bytes=row_bytes,
        num_scales=num_scales,
        num_topk=num_topk,
        is_64_bit=topk_dtype is not None and topk_dtype.itemsize == 8,
        spec=kernels.dispatch_spec(num_ranks, has_bulk, num_stages),
        num_threads=32 * (NUM_STAGE_WARPS + (num_warps if has_bulk else NUM_STAGE_WARPS // 2)),
        shared_bytes=cuda_tuning.ring_bytes(num_warps, num_stages, staged) if has_bulk else 0,
    )


def dispatch_header(call: str, serial: int, request: DispatchRequest, form: Form) -> bytes:
    """Return the header of a call.

    Args:
        call: One of ``cuda_failures.CALLS``.
        serial: Of the handle; 0 without one.
        request: The call's arguments.
        form: Their form.
    """
    index = cuda_failures.CALL_INDEX[call]
    return cuda_params.HEADER.pack(
        index, serial, *form.agreed, request.data.shape[0], request.num_worst_tokens
    )


class Outputs(NamedTuple):
    """What a dispatch writes: `DispatchInto` without places in it."""

    data: ArrayView
    scales: ArrayView | None
    topk: TopK | None

    def leading(self, num_rows: int) -> Outputs:
        """Return the first rows: views of the same memory."""
        scales, topk = self.scales, self.topk
        return Outputs(
            _leading(self.data, num_rows),
            None if scales is None else _leading(scales, num_rows),
            None if topk is None else TopK(*(_leading(part, num_rows) for part in topk)),
        )


def _leading(view: ArrayView, num_rows: int) -> ArrayView:
    return view._replace(shape=(num_rows, *view.shape[1:]))


def make_outputs(request: DispatchRequest, num_rows: int) -> Outputs:
    """Make what a dispatch writes, for so many rows, unless the caller gives it."""
    if request.into is not None:
        return Outputs(request.into.data, request.into.scales, request.into.topk)
    data, scales, topk, allocate = request.data, request.scales, request.topk, request.allocate
    recv_scales = recv_topk = None
    recv = allocate((num_rows, data.shape[1]), data.dtype)
    if scales is not None:
        recv_scales = allocate((num_rows, scales.shape[1]), scales.dtype)
    if topk is not None:
        shape = (num_rows, topk.idx.shape[1])
        idx = allocate(shape, topk.idx.dtype)
        recv_topk = TopK(idx, allocate(shape, topk.weights.dtype))
    return Outputs(recv, recv_scales, recv_topk)


class Launch(Enum):
    """What a launch of dispatch.cu knows: see the enum there."""

    WHOLE = 0
    AHEAD = 1
    RESUMES = 2


class RowForecast:
    """How many rows will arrive, going by the last two dispatches of as many tokens and experts.

    Training and prefill repeat their shapes, and from call to call counts differ by little. Where
    they do not there is no forecast: callers keep arrays, and with them all of the memory.
    """

    def __init__(self) -> None:
        self._shape = (0, 0)
        self._counts: tuple[int, ...] = ()

    def num_rows(self, request: DispatchRequest) -> int:
        """Return for how many rows to make outputs; 0 where that is not known."""
        if self._shape != _shape_of(request) or len(self._counts) < 2:
            return 0
        least, most = sorted(self._counts)
        return most + most // 8 if most <= 2 * least else 0

    def note(self, request: DispatchRequest, num_recv: int) -> None:
        """Take note of how many rows arrived."""
        shape = _shape_of(request)
        before = self._counts[-1:] if shape == self._shape else ()
        self._shape, self._counts = shape, (*before, num_recv)


def _shape_of(request: DispatchRequest) -> tuple[int, int]:
    layout = request.layout
    num_experts = request.num_experts
    if layout is not None:
        num_experts = layout.num_tokens_per_expert.shape[0]
    return request.data.shape[0], num_experts


class Move(NamedTuple):
    """A launch of dispatch.cu, but for its outputs.

    Attributes:
        form: Of the call.
        num_blocks: Blocks of the grid.
        sources: Params in front of the outputs.
        rest: Params behind them.
    """

    form: Form
    num_blocks: int
    sources: bytes
    rest: bytes

    def params(
        self, call: bytes, header: bytes, outputs: Outputs, launch: Launch
    ) -> npt.NDArray[np.void]:
        """Return the kernel's argument.

        Args:
            call: CALL as bytes.
            header: The header as bytes.
            outputs: Where it writes.
            launch: What the launch knows.
        """
        scales_out = idx_out = weights_out = 0
        if outputs.scales is not None:
            scales_out = outputs.scales.ptr
        if outputs.topk is not None:
            idx_out, weights_out = outputs.topk.idx.ptr, outputs.topk.weights.ptr
        packed = cuda_params.DISPATCH_OUTPUTS.pack(
            *(outputs.data.ptr, scales_out, idx_out, weights_out),
            *(outputs.data.shape[0], launch.value),
        )
        return cuda_params.join(call, header, self.sources, packed, self.rest)


def prepare_move(
    request: DispatchRequest,
    tables: Tables,
    form: Form,
    num_local: int,
    rank: int,
    num_blocks: int,
) -> Move:
    """Decide all of dispatch.cu's launch but the outputs.

    Args:
        request: The call.
        tables: Its routes; the GPU may still be filling them.
        form: Of the call.
        num_local: Experts of a rank; 0 with a handle.
        rank: This rank.
        num_blocks: Blocks of the kernel.
    """
    data, scales, topk = request.data, request.scales, request.topk
    scales_in = token_stride = scale_stride = 0
    if scales is not None:
        scales_in = scales.ptr
        token_stride, scale_stride = (stride // WORD_BYTES for stride in scales.strides)
    idx_in = weights_in = num_worst_tokens = 0
    if topk is not None:
        idx_in, weights_in = topk.idx.ptr, topk.weights.ptr
        num_worst_tokens = request.num_worst_tokens
    rest = (
        *(tables.positions, tables.work, tables.summary),
        *(token_stride, scale_stride),
        *(data.shape[0], form.row_bytes),
        *(form.num_scales, form.num_topk, form.is_64_bit, num_worst_tokens),
        *(rank * num_local, num_local),
        *(form.staged, 0),
    )
    return Move(
        form=form,
        num_blocks=num_blocks,
        sources=cuda_params.DISPATCH_SOURCES.pack(data.ptr, scales_in, idx_in, weights_in),
        rest=cuda_params.DISPATCH_REST.pack(*rest),
    )
