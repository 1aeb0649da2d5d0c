"""How kernels divide a GPU: numbers chosen by measurement, see docs/performance.md."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from epcomm.cuda_layout import MAX_LOW_LATENCY_TOKENS
from epcomm.jit.kernels import MAX_FETCH_WARPS, RING_LAG, CombineShape, LowLatencyGrid

#: Shared memory that a block's rings may take, in bytes.
MAX_RING_BYTES = 220 * 1024
#: Pieces that a warp keeps in flight: few of long rows, more of short ones.
STAGES = (2, 4)
#: Bytes that a send warp of combine moves at a time, unless a row is longer.
_UNIT_BYTES = 14336
_MAX_UNIT_ROWS = 64
_BARRIER_BYTES = 8
_NOTE_BYTES = 8
# Sums wait for memory, so many warps help; each rank's row in flight takes registers.
_COMBINE_THREADS = {1: 1024, 2: 1024, 3: 1024, 4: 1024, 5: 768}
_MANY_RANKS_THREADS = 640
# Adding other nodes' sums takes registers too; the network is slower than either.
_FURTHER_THREADS = 512

#: How blocks of low-latency calls divide their work. Rows of up to so many tokens cross as cells:
#: twice the bytes, which do not count yet, and no flag.
LOW_LATENCY_DISPATCH_GRID = LowLatencyGrid(
    num_groups=2,
    group_warps=4,
    receive_warps=8,
    batch_entries=1024,
    kept_entries=4096,
    cell_tokens=16,
)
LOW_LATENCY_COMBINE_GRID = replace(
    LOW_LATENCY_DISPATCH_GRID, num_groups=8, group_warps=2, receive_warps=0
)
#: Bytes that a warp moves in one access.
GRANULE_BYTES = 512


@cache
def ring_bytes(num_warps: int, num_stages: int, piece_bytes: int) -> int:
    """Return the shared memory of a block's rings."""
    num_notes = num_stages + RING_LAG
    return num_warps * (num_stages * (piece_bytes + _BARRIER_BYTES) + num_notes * _NOTE_BYTES)


@cache
def dispatch_stages(staged_row_bytes: int) -> int:
    """Return the rows that each fetching warp of dispatch keeps in flight."""
    return 2 if ring_bytes(MAX_FETCH_WARPS, 4, staged_row_bytes) > MAX_RING_BYTES else 4


@cache
def dispatch_warps(staged_row_bytes: int) -> int:
    """Return the warps of a block of dispatch that fetch; 0 where rows are too long for it."""
    stages = dispatch_stages(staged_row_bytes)
    return min(MAX_FETCH_WARPS, MAX_RING_BYTES // ring_bytes(1, stages, staged_row_bytes))


@cache
def unit_rows(row_bytes: int) -> int:
    """Return the rows that a send warp of combine moves at a time, under one flag."""
    return max(1, min(_MAX_UNIT_ROWS, _UNIT_BYTES // row_bytes))


@cache
def combine_shape(num_ranks: int, row_bytes: int, has_further: bool = False) -> CombineShape:
    """Return how a block of combine divides its work."""
    few, many = combine_shapes(num_ranks, has_further)
    piece = unit_rows(row_bytes) * row_bytes
    has_room = ring_bytes(many.num_send_warps, many.num_stages, piece) <= MAX_RING_BYTES
    return many if has_room else few


@cache
def combine_shapes(num_ranks: int, has_further: bool) -> tuple[CombineShape, ...]:
    """Return the shapes that `combine_shape` chooses from: for long and for short rows."""
    num_threads = _COMBINE_THREADS.get(num_ranks, _MANY_RANKS_THREADS)
    return tuple(
        CombineShape(
            num_threads=min(num_threads, _FURTHER_THREADS) if has_further else num_threads,
            num_send_warps=num_send_warps,
            num_stages=num_stages,
            sum_vecs=224,
            sum_tokens=4,
        )
        for num_send_warps, num_stages in ((3, 2), (4, 2))
    )


def low_latency_parts(
    row_bytes: int, num_rows: int, num_tokens: int, num_blocks: int, grid: LowLatencyGrid
) -> int:
    """Return the parts that rows are cut into, so that few rows keep many groups busy.

    Args:
        row_bytes: Bytes of a row as it crosses, scales apart.
        num_rows: Rows that a rank sends, about, however many ranks get each.
        num_tokens: Tokens of this rank.
        num_blocks: Blocks of the kernel.
        grid: How these divide their work.
    """
    granules = -(-row_bytes // GRANULE_BYTES)
    most = -(-granules // grid.group_warps)
    most = min(most, MAX_LOW_LATENCY_TOKENS // max(1, num_tokens))  # each part has a flag
    wanted = max(1, min(most, num_blocks * grid.num_groups // max(1, num_rows)))
    return -(-granules // -(-granules // wanted))
