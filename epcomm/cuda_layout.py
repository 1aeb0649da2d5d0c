"""What a GPU slab holds and where: the one table, from which kernels get their constants.

The fixed part comes first and never moves: cells, headers and expert counts. Behind it lie the
areas, whose sizes follow from the most tokens and the longest rows of a call.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from epcomm.engines.base import MAX_LOW_LATENCY_TOPK, LowLatencyShape
from epcomm.errors import UnsupportedConfig

MAX_RANKS = 8
MAX_LOCAL_EXPERTS = 2048
#: Of low-latency calls, whose blocks keep something of each expert in shared memory.
MAX_LOW_LATENCY_LOCAL_EXPERTS = 1024
HEADER_WORDS = 16
#: Bytes of a word: a place in a table, a weight, a scale.
WORD_BYTES = 4


class Agreed(NamedTuple):
    """Header words in which all ranks must agree, in order; dtypes are indices in ``DTYPES``."""

    call: int
    handle: int
    hidden: int
    dtype: int
    num_scales: int = 0
    scales_dtype: int = 0
    num_topk: int = 0
    topk_dtype: int = 0
    num_experts: int = 0
    expert_alignment: int = 0


AGREED = Agreed._fields
#: Most tokens a rank of low-latency calls.
MAX_LOW_LATENCY_TOKENS = 1024
#: Most blocks of a low-latency kernel: each has a record of its own.
MAX_LOW_LATENCY_BLOCKS = 512
#: Words of a low-latency call's header in which all ranks must agree, by name and in order.
LOW_LATENCY_AGREED = (
    "call",
    "num_max_dispatch_tokens_per_rank",
    "hidden",
    "num_experts",
    "num_topk",
    "fp8_format or combine_precision",
)
#: Warps of a block of dispatch that stage; as many tokens share a flag.
NUM_STAGE_WARPS = 16

_ALIGNMENT = 256
#: A staged row begins where 16-byte accesses may.
_ROW_ALIGNMENT = 16
#: Bytes of a cache line.
_LINE = 128


def _round_up(num_bytes: int, multiple: int = _ALIGNMENT) -> int:
    return -(-num_bytes // multiple) * multiple


def _fixed_offsets() -> tuple[dict[str, int], int]:
    sizes = {
        "kOffsetAbort": 8,
        "kOffsetArrival": MAX_RANKS * 8,
        "kOffsetHeaders": 2 * MAX_RANKS * HEADER_WORDS * 4,
        "kOffsetCounts": 2 * MAX_RANKS * MAX_RANKS * 8,
        "kOffsetExpertCounts": 2 * MAX_RANKS * MAX_LOCAL_EXPERTS * 4,
    }
    offsets, end = {}, 0
    for name, num_bytes in sizes.items():
        offsets[name] = end
        end += _round_up(num_bytes)
    return offsets, end


OFFSETS, FIXED_BYTES = _fixed_offsets()


@dataclass(frozen=True)
class Areas:
    """The areas of a slab, alike on all ranks.

    Attributes:
        num_ranks: Ranks of the group.
        stage_bytes: Bytes of each of the stage's two halves.
        slot_bytes: Bytes of each peer's slot.
        list_tokens: Tokens that each source may list.
    """

    num_ranks: int
    stage_bytes: int
    slot_bytes: int
    list_tokens: int

    @property
    def flag_units(self) -> int:
        """Units that each source may send in one combine: a unit has at least one row."""
        return self.list_tokens

    @property
    def stage_flag_units(self) -> int:
        """Units that each source may stage in one dispatch."""
        return -(-self.list_tokens // NUM_STAGE_WARPS)

    @property
    def lists_offset(self) -> int:
        """Byte where the lists begin."""
        return FIXED_BYTES

    @property
    def flags_offset(self) -> int:
        """Byte where the unit flags begin."""
        return self.lists_offset + _round_up(2 * self.num_ranks * self.list_tokens * 4)

    @property
    def stage_flags_offset(self) -> int:
        """Byte where the stage's flags begin."""
        return self.flags_offset + _round_up(MAX_RANKS * self.flag_units * 4)

    @property
    def stage_offset(self) -> int:
        """Byte where the stage begins; flags and all before it have to be zeroed."""
        return self.stage_flags_offset + _round_up(MAX_RANKS * self.stage_flag_units * 4)

    @property
    def slots_offset(self) -> int:
        """Byte where the slots begin."""
        return self.stage_offset + 2 * self.stage_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole slab."""
        return self.slots_offset + (self.num_ranks - 1) * self.slot_bytes

    def has_room_for(self, other: Areas) -> bool:
        """Return whether a call that needs the other areas fits into these."""
        return (
            self.stage_bytes >= other.stage_bytes
            and self.slot_bytes >= other.slot_bytes
            and self.list_tokens >= other.list_tokens
        )

    def merged_with(self, other: Areas) -> Areas:
        """Return the least areas that have room for either."""
        return Areas(
            self.num_ranks,
            max(self.stage_bytes, other.stage_bytes),
            max(self.slot_bytes, other.slot_bytes),
            max(self.list_tokens, other.list_tokens),
        )


def staged_row_bytes(row_bytes: int, num_scales: int, num_topk: int) -> int:
    """Return the bytes of a row of dispatch and all that travels with it.

    Args:
        row_bytes: Bytes of the row alone.
        num_scales: Scales of the row, a word each.
        num_topk: Choices that travel with the row, an index and a weight each; 0 with a handle.
    """
    num_bytes = row_bytes + (num_scales + 2 * num_topk) * WORD_BYTES
    # Whole lines cross faster; short rows would get too long for it.
    return _round_up(num_bytes, _LINE if num_bytes >= 32 * _LINE else _ROW_ALIGNMENT)


def slot_row_bytes(row_bytes: int, num_topk: int) -> int:
    """Return the bytes of a row of combine and its weights.

    Args:
        row_bytes: Bytes of the row alone.
        num_topk: Weights that travel with the row, 0 for none.
    """
    return row_bytes + num_topk * WORD_BYTES


@lru_cache(maxsize=256)
def areas_for(num_ranks: int, num_tokens: int, staged_row_bytes: int, slot_row_bytes: int) -> Areas:
    """Return the areas that calls of so many tokens a rank need.

    Args:
        num_ranks: Ranks of the group, at most 8.
        num_tokens: Most tokens that a rank passes.
        staged_row_bytes: See the function of that name.
        slot_row_bytes: See the function of that name.
    """
    if num_ranks > MAX_RANKS:
        raise UnsupportedConfig(
            f"the group has {num_ranks} ranks on one node; the cuda engine takes {MAX_RANKS}. Use "
            "engine='host', with device=i for arrays of GPU i."
        )
    return Areas(
        num_ranks,
        _round_up(num_tokens * staged_row_bytes),
        _round_up(num_tokens * slot_row_bytes),
        _round_up(num_tokens, 64),
    )


def constants(num_ranks: int) -> dict[str, int]:
    """Return the constants of this table for kernels of a group of so many ranks."""
    return {
        "kNumRanks": num_ranks,
        "kMaxRanks": MAX_RANKS,
        "kMaxLocalExperts": MAX_LOCAL_EXPERTS,
        "kNumAgreed": len(AGREED),
        "kNumStageWarps": NUM_STAGE_WARPS,
        **OFFSETS,
    }


# --- low latency -------------------------------------------------------------------------------
# A slab of its own: cells first, tables behind them, then the two slots' rows, which alone grow.

_HEADER_CELLS = 8
_ENTRY_BYTES = 16
#: Rows of at most so many bytes, of ranks with few tokens, cross as cells of a word and an epoch.
MAX_CELL_ROW_BYTES = 16384
MAX_CELL_TOKENS = 16
_CELL_ROW_STRIDE = MAX_CELL_ROW_BYTES // WORD_BYTES * 8


def _low_latency_offsets(num_ranks: int) -> dict[str, int]:
    entries = MAX_LOW_LATENCY_TOKENS * MAX_LOW_LATENCY_TOPK
    sizes = {
        "kOffsetLowLatencyAbort": 8,
        "kOffsetLowLatencyReceived": 2 * MAX_RANKS * 4,
        "kOffsetLowLatencySigns": MAX_RANKS * 8,
        "kOffsetLowLatencyHeaders": 2 * MAX_RANKS * _HEADER_CELLS * 8,
        "kOffsetLowLatencyFlags": 2 * MAX_LOW_LATENCY_TOPK * MAX_LOW_LATENCY_TOKENS * 4,
        "kOffsetLowLatencyTables": 2 * num_ranks * entries * _ENTRY_BYTES,
        "kOffsetLowLatencyCells": 2 * num_ranks * MAX_CELL_TOKENS * _CELL_ROW_STRIDE,
        "kOffsetLowLatencyRows": 0,
    }
    offsets, end = {}, 0
    for name, num_bytes in sizes.items():
        offsets[name] = end
        end += _round_up(num_bytes)
    return offsets


def low_latency_rows_offset(num_ranks: int) -> int:
    """Return the byte where the slots' rows begin; all before it has to be zeroed."""
    return _low_latency_offsets(num_ranks)["kOffsetLowLatencyRows"]


def low_latency_constants(num_ranks: int) -> dict[str, int]:
    """Return the constants of low-latency slabs for kernels of a group of so many ranks."""
    return {
        "kMaxLowLatencyBlocks": MAX_LOW_LATENCY_BLOCKS,
        "kMaxLowLatencyTokens": MAX_LOW_LATENCY_TOKENS,
        "kMaxLowLatencyTopk": MAX_LOW_LATENCY_TOPK,
        "kMaxCellRowBytes": MAX_CELL_ROW_BYTES,
        "kMaxCellTokens": MAX_CELL_TOKENS,
        "kNumLowLatencyAgreed": len(LOW_LATENCY_AGREED),
        **_low_latency_offsets(num_ranks),
    }


def low_latency_rows_bytes(shape: LowLatencyShape, num_lines: int) -> int:
    """Return the bytes that a slot's rows need, as bf16: fp8 rows with their scales are shorter.

    Args:
        shape: Of the call.
        num_lines: Ranks, or the choices of a token where every expert's row crosses.
    """
    return _round_up(num_lines * shape.num_max_tokens * shape.hidden * 2)


def low_latency_region_bytes(shape: LowLatencyShape) -> int:
    """Return the bytes of both slots' rows with which calls of a shape never have to grow."""
    lines = max(shape.num_ranks, MAX_LOW_LATENCY_TOPK)
    return 2 * low_latency_rows_bytes(shape, lines)


def low_latency_slab_bytes(num_ranks: int, rows_bytes: int) -> int:
    """Return the bytes of a low-latency slab whose slots have so many bytes for rows."""
    return low_latency_rows_offset(num_ranks) + 2 * _round_up(rows_bytes)
