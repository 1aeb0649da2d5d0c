"""Routes on the GPU: what route.cu fills, and the record of a handle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import cupy

from epcomm.cuda_layout import WORD_BYTES
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
