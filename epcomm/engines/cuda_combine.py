"""From a combine to its call's header, its outputs, and what combine.cu is launched with."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from epcomm import cuda_layout
from epcomm.arrays import DTYPE_INDEX, DTYPE_NAME
from epcomm.cuda_layout import Agreed
from epcomm.engines import cuda_failures, cuda_params, cuda_tuning
from epcomm.engines.base import CombineRequest, CombineResult
from epcomm.engines.cuda_routes import Tables
from epcomm.jit import kernels


class SumForm(NamedTuple):
    """What follows from the forms of a combine's arrays, however many tokens there are.

    Attributes:
        row_bytes: Bytes of a row.
        slot_row_bytes: Bytes of a row and its weights, as they cross.
        num_topk: Weights that travel with a row.
        unit_rows: Rows that a warp sends under one flag.
        spec: The kernel.
        num_threads: Threads of a block.
        shared_bytes: Dynamic shared memory of a block.
    """

    row_bytes: int
    slot_row_bytes: int
    num_topk: int
    unit_rows: int
    spec: kernels.KernelSpec
    num_threads: int
    shared_bytes: int


def sum_form_of(request: CombineRequest, num_ranks: int, has_bulk: bool) -> SumForm:
    """Return the form of a combine.

    Args:
        request: The call.
        num_ranks: Ranks of the group.
        has_bulk: Whether the GPU has bulk copies.
    """
    data, weights = request.data, request.topk_weights
    num_topk = weights.shape[1] if weights is not None else 0
    row_bytes = data.shape[1] * data.dtype.itemsize
    has_further = request.further_sums is not None
    unit_rows = cuda_tuning.unit_rows(row_bytes)
    shape = cuda_tuning.combine_shape(num_ranks, row_bytes, has_further)
    ring_bytes = cuda_tuning.ring_bytes(
        shape.num_send_warps, shape.num_stages, unit_rows * row_bytes
    )
    has_bulk = has_bulk and ring_bytes <= cuda_tuning.MAX_RING_BYTES
    return SumForm(
        row_bytes=row_bytes,
        slot_row_bytes=cuda_layout.slot_row_bytes(row_bytes, num_topk),
        num_topk=num_topk,
        unit_rows=unit_rows,
        spec=kernels.combine_spec(num_ranks, has_bulk, DTYPE_NAME[data.dtype], shape, has_further),
        num_threads=shape.num_threads,
        shared_bytes=ring_bytes if has_bulk else 0,
    )


def combine_header(request: CombineRequest, form: SumForm) -> bytes:
    """Return the header of a call."""
    agreed = Agreed(
        call=cuda_failures.CALL_INDEX["combine"],
        handle=request.handle.serial,
        hidden=request.data.shape[1],
        dtype=DTYPE_INDEX[request.data.dtype],
        num_topk=form.num_topk,
    )
    return cuda_params.HEADER.pack(*agreed, request.handle.num_tokens, 0)


def make_sums(request: CombineRequest) -> CombineResult:
    """Make what a combine writes, unless the caller gives it."""
    if request.into is not None:
        return request.into
    data, weights, num_tokens = request.data, request.topk_weights, request.handle.num_tokens
    out_weights = None
    out = request.allocate((num_tokens, data.shape[1]), data.dtype)
    if weights is not None:
        out_weights = request.allocate((num_tokens, weights.shape[1]), weights.dtype)
    return CombineResult(out, out_weights)


def combine_params(
    call: bytes,
    header: bytes,
    request: CombineRequest,
    tables: Tables,
    form: SumForm,
    out: CombineResult,
) -> npt.NDArray[np.void]:
    """Return the kernel's argument.

    Args:
        call: CALL as bytes.
        header: The header as bytes.
        request: The call's arguments.
        tables: Routes of the dispatch that is undone.
        form: Of the call.
        out: Where it writes.
    """
    weights, further = request.topk_weights, request.further_sums
    weights_in = weights_out = 0
    if weights is not None and out.topk_weights is not None:
        weights_in, weights_out = weights.ptr, out.topk_weights.ptr
    further_in, num_further = (0, 0, 0), 0
    if further is not None:
        further_weights = 0 if further.topk_weights is None else further.topk_weights.ptr
        further_in = (further.data.ptr, further_weights, further.places.ptr)
        num_further = further.places.shape[1]
    bias_ptrs = [bias.ptr for bias in request.biases] + [0, 0]
    return cuda_params.pack(
        cuda_params.COMBINE,
        call,
        header,
        (
            *(request.data.ptr, weights_in, *bias_ptrs[:2], out.data.ptr, weights_out),
            *(tables.positions, tables.counts, tables.summary),
            *further_in,
            *(request.handle.num_tokens, form.row_bytes, form.num_topk, form.unit_rows),
            *(num_further, 0),
        ),
    )
