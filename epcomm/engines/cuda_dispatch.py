"""From a dispatch to its call's header, its outputs, and what dispatch.cu is launched with."""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

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


def num_experts_of(request: DispatchRequest) -> int:
    """Return the experts over all ranks of a dispatch; 0 with a handle."""
    if request.layout is not None:
        return request.layout.num_tokens_per_expert.shape[0]
    return request.num_experts


def form_of(request: DispatchRequest, num_experts: int, num_ranks: int, has_bulk: bool) -> Form:
    """Return the form of a dispatch.

    Args:
        request: The call.
        num_experts: Experts over all ranks; 0 with a handle.
        num_ranks: Ranks of the group.
        has_bulk: Whether the GPU has bulk copies.
    """
    data, scales, topk = request.data, request.scales, request.topk
    num_scales = num_topk = 0
    scales_dtype = topk_dtype = None
    if scales is not None:
        num_scales, scales_dtype = scales.shape[1], scales.dtype
    if topk is not None:
        num_topk, topk_dtype = topk.idx.shape[1], topk.idx.dtype
    return _form_of(
        num_ranks,
        has_bulk,
        data.shape[1],
        data.dtype,
        num_scales,
        scales_dtype,
        num_topk,
        topk_dtype,
        num_experts,
        request.expert_alignment,
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
    # NOTE: _replace takes three times as long.
    return ArrayView(view.ptr, (num_rows, *view.shape[1:]), *view[2:])


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


class Launch(IntEnum):
    """What a launch of dispatch.cu knows: see the enum there."""

    WHOLE = 0
    AHEAD = 1
    RESUMES = 2


class Move(NamedTuple):
    """A launch of dispatch.cu, but for its outputs.

    Attributes:
        request: The call.
        header: Of the call.
        form: Of the call.
        tables: Its routes; the GPU may still be filling them.
        num_blocks: Blocks of the grid.
        first_expert: The first of this rank's; 0 with a handle.
        num_local: Experts of a rank; 0 with a handle.
    """

    request: DispatchRequest
    header: bytes
    form: Form
    tables: Tables
    num_blocks: int
    first_expert: int = 0
    num_local: int = 0

    def params(self, call: bytes, outputs: Outputs, launch: Launch) -> bytes:
        """Return the kernel's argument.

        Args:
            call: See `cuda_params.pack`.
            outputs: Where it writes.
            launch: What the launch knows.
        """
        request, form, tables = self.request, self.form, self.tables
        data, scales, topk = request.data, request.scales, request.topk
        scales_in = scales_out = token_stride = scale_stride = 0
        if scales is not None and outputs.scales is not None:
            scales_in, scales_out = scales.ptr, outputs.scales.ptr
            token_stride, scale_stride = (stride // WORD_BYTES for stride in scales.strides)
        topk_in = topk_out = (0, 0)
        num_worst_tokens = 0
        if topk is not None and outputs.topk is not None:
            topk_in = topk.idx.ptr, topk.weights.ptr
            topk_out = outputs.topk.idx.ptr, outputs.topk.weights.ptr
            num_worst_tokens = request.num_worst_tokens
        sources = (data.ptr, scales_in, *topk_in)
        written = (outputs.data.ptr, scales_out, *topk_out, outputs.data.shape[0], launch)
        routes = (tables.positions, tables.work, tables.summary, token_stride, scale_stride)
        sizes = (data.shape[0], form.row_bytes, form.num_scales, form.num_topk, form.is_64_bit)
        rest = (num_worst_tokens, self.first_expert, self.num_local, form.staged, 0)
        values = sources + written + routes + sizes + rest
        return cuda_params.pack(cuda_params.DISPATCH, call, self.header, values)
