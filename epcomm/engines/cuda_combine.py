"""From a combine to its call's header, its outputs, and what combine.cu is launched with."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

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
        agreed: What ranks agree in, but for the call and the handle.
        row_bytes: Bytes of a row.
        slot_row_bytes: Bytes of a row and its weights, as they cross.
        num_topk: Weights that travel with a row.
        unit_rows: Rows that a warp sends under one flag.
        spec: The kernel.
        num_threads: Threads of a block.
        shared_bytes: Dynamic shared memory of a block.
    """

    agreed: tuple[int, ...]
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
    num_topk = 0 if weights is None else weights.shape[1]
    has_further = request.further_sums is not None
    return _sum_form_of(num_ranks, has_bulk, data.shape[1], data.dtype, num_topk, has_further)


@lru_cache(maxsize=256)
def _sum_form_of(
    num_ranks: int,
    has_bulk: bool,
    hidden: int,
    dtype: np.dtype[Any],
    num_topk: int,
    has_further: bool,
) -> SumForm:
    """Return the form of a combine; a model's layers share a few of them."""
    agreed = Agreed(call=0, handle=0, hidden=hidden, dtype=DTYPE_INDEX[dtype], num_topk=num_topk)
    row_bytes = hidden * dtype.itemsize
    unit_rows = cuda_tuning.unit_rows(row_bytes)
    shape = cuda_tuning.combine_shape(num_ranks, row_bytes, has_further)
    ring_bytes = cuda_tuning.ring_bytes(
        shape.num_send_warps, shape.num_stages, unit_rows * row_bytes
    )
    has_bulk = has_bulk and ring_bytes <= cuda_tuning.MAX_RING_BYTES
    return SumForm(
        agreed=agreed[2:],
        row_bytes=row_bytes,
        slot_row_bytes=cuda_layout.slot_row_bytes(row_bytes, num_topk),
        num_topk=num_topk,
        unit_rows=unit_rows,
        spec=kernels.combine_spec(num_ranks, has_bulk, DTYPE_NAME[dtype], shape, has_further),
        num_threads=shape.num_threads,
        shared_bytes=ring_bytes if has_bulk else 0,
    )


def combine_header(request: CombineRequest, form: SumForm) -> bytes:
    """Return the header of a call."""
    index, handle = cuda_failures.CALL_INDEX["combine"], request.handle
    return cuda_params.HEADER.pack(index, handle.serial, *form.agreed, handle.num_tokens, 0)


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
) -> bytes:
    """Return the kernel's argument.

    Args:
        call: See `cuda_params.pack`.
        header: See there.
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
    bias_ptrs = (*[bias.ptr for bias in request.biases], 0, 0)[:2]
    arrays = (request.data.ptr, weights_in, *bias_ptrs, out.data.ptr, weights_out)
    routes = (tables.positions, tables.counts, tables.summary)
    sizes = (request.handle.num_tokens, form.row_bytes, form.num_topk, form.unit_rows)
    values = arrays + routes + further_in + sizes + (num_further, 0)
    return cuda_params.pack(cuda_params.COMBINE, call, header, values)
