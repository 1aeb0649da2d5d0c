"""Routes on the GPU: what route.cu and layout.cu are launched with, and the record of a handle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import cupy

from epcomm.arrays import ArrayView
from epcomm.cuda_layout import WORD_BYTES
from epcomm.engines import cuda_params
from epcomm.engines.base import DispatchRequest, LayoutViews
from epcomm.routing import round_up

#: Where each table of routes begins, in bytes: as memory of its own would.
_TABLE_ALIGNMENT = 256


class Tables(NamedTuple):
    """What route.cu fills: addresses in one piece of device memory.

    Attributes:
        memory: Owns all of it.
        positions: ``[num_tokens, num_ranks] int32``.
        counts: ``[num_ranks, num_ranks] int32``.
        summary: RouteSummary.
        work: Rows to fetch, two words each.
    """

    memory: Any
    positions: int
    counts: int
    summary: int
    work: int


@dataclass(frozen=True, eq=False)
class Routing:
    """A handle's record.

    Attributes:
        tables: What route.cu filled.
        max_tokens: Most tokens of any rank; this rank's where only the device knows.
        is_exact: Whether ``max_tokens`` is known.
    """

    tables: Tables
    max_tokens: int
    is_exact: bool


def make_tables(num_tokens: int, num_ranks: int, most_work: int) -> Tables:
    """Return memory for the routes of a dispatch.

    Args:
        num_tokens: Tokens of this rank.
        num_ranks: Ranks of the group.
        most_work: Rows that there is room for in ``work``.
    """
    positions_bytes = round_up(num_tokens * num_ranks * WORD_BYTES, _TABLE_ALIGNMENT)
    counts_bytes = round_up(num_ranks * num_ranks * WORD_BYTES, _TABLE_ALIGNMENT)
    # One allocation, not four: the GPU waits for them.
    memory = cupy.cuda.alloc(
        positions_bytes + counts_bytes + _TABLE_ALIGNMENT + most_work * 2 * WORD_BYTES
    )
    positions = memory.ptr
    counts = positions + positions_bytes
    summary = counts + counts_bytes
    return Tables(memory, positions, counts, summary, work=summary + _TABLE_ALIGNMENT)


def layout_params(topk_idx: ArrayView, num_experts: int, layout: LayoutViews, record: int) -> bytes:
    """Return the argument of layout.cu.

    Args:
        topk_idx: The choices.
        num_experts: Experts over all ranks.
        layout: What it writes.
        record: Address of the FailureRecord.
    """
    values = (
        topk_idx.ptr,
        *(layout.num_tokens_per_rank.ptr, layout.num_tokens_per_expert.ptr),
        *(layout.is_token_in_rank.ptr, record),
        *(*topk_idx.shape, num_experts, int(topk_idx.dtype.itemsize == 8)),
    )
    return cuda_params.pack_all(cuda_params.LAYOUT, values)


def route_params(
    call: bytes,
    header: bytes,
    request: DispatchRequest,
    num_experts: int,
    tables: Tables,
    host: tuple[int, int],
) -> bytes:
    """Return the argument of route.cu.

    Args:
        call: See `cuda_params.pack`.
        header: See there.
        request: The call, with a layout or choices.
        num_experts: Experts over all ranks.
        tables: What it fills.
        host: Address of the HostSummary, and the ticket that it will carry.
    """
    layout, topk = request.layout, request.topk
    if layout is not None:
        inputs = (layout.is_token_in_rank.ptr, layout.num_tokens_per_expert.ptr, 0)
        form = (0, 0, 0)
    else:
        assert topk is not None  # the Buffer gives one of the two
        inputs = (0, 0, topk.idx.ptr)
        form = (topk.idx.shape[1], int(topk.idx.dtype.itemsize == 8), 1)
    routes = (tables.positions, tables.work, tables.counts, tables.summary)
    sizes = (request.data.shape[0], num_experts, request.num_worst_tokens)
    values = inputs + routes + host + sizes + form
    return cuda_params.pack(cuda_params.ROUTE, call, header, values)
