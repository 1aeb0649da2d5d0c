"""The by-value structs of the kernels, as NumPy dtypes. The kernels assert that sizes agree."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from epcomm.cuda_layout import (
    AGREED,
    HEADER_WORDS,
    MAX_LOCAL_EXPERTS,
    MAX_LOW_LATENCY_BLOCKS,
    MAX_RANKS,
)

_PTR = np.uint64

SLAB_LAYOUT = np.dtype(
    [
        ("base", _PTR, (MAX_RANKS,)),
        ("lists_offset", np.uint64),
        ("flags_offset", np.uint64),
        ("stage_flags_offset", np.uint64),
        ("stage_offset", np.uint64),
        ("slots_offset", np.uint64),
        ("stage_bytes", np.uint64),
        ("slot_bytes", np.uint64),
        ("list_tokens", np.uint32),
        ("flag_units", np.uint32),
        ("stage_flag_units", np.uint32),
        ("padding", np.uint32),
    ],
    align=True,
)

FAILURE_RECORD = np.dtype(
    [
        ("failure", np.int32),
        ("phase", np.int32),
        ("peer", np.int32),
        ("expected", np.uint32),
        ("seen", np.uint32),
        ("field", np.int32),
        ("values", np.int32, (MAX_RANKS,)),
    ],
    align=True,
)

#: Bytes of CallState, device memory that only kernels touch.
CALL_STATE_BYTES = 24

CALL = np.dtype(
    [
        ("slabs", SLAB_LAYOUT),
        ("state", _PTR),
        ("record", _PTR),
        ("timeout_ns", np.uint64),
        ("rank", np.uint32),
        ("header", np.int32, (HEADER_WORDS,)),
    ],
    align=True,
)

#: Bytes of CALL before the header of a call.
CALL_BYTES: int = CALL.fields["header"][1] if CALL.fields else 0
#: The header, and so the rest of CALL: what ranks agree in, tokens of this rank, num_worst_tokens,
#: and zeros.
_NUM_HEADER_VALUES = len(AGREED) + 2
HEADER = struct.Struct(
    f"={_NUM_HEADER_VALUES}i{CALL.itemsize - CALL_BYTES - 4 * _NUM_HEADER_VALUES}x"
)

HOST_SUMMARY = np.dtype(
    [
        ("ticket", np.uint64),
        ("num_recv", np.int32),
        ("max_tokens", np.int32),
        ("expert_counts", np.int32, (MAX_LOCAL_EXPERTS,)),
    ],
    align=True,
)

ROUTE_SUMMARY = np.dtype(
    [(name, np.uint32) for name in ("num_recv", "num_remote", "is_valid", "max_tokens")], align=True
)

LAYOUT = np.dtype(
    [
        ("topk_idx", _PTR),
        ("num_tokens_per_rank", _PTR),
        ("num_tokens_per_expert", _PTR),
        ("is_token_in_rank", _PTR),
        ("record", _PTR),
        ("num_tokens", np.uint32),
        ("num_topk", np.uint32),
        ("num_experts", np.uint32),
        ("is_64_bit", np.uint32),
    ],
    align=True,
)

AGREE = np.dtype([("call", CALL)], align=True)

ROUTE = np.dtype(
    [
        ("call", CALL),
        ("is_token_in_rank", _PTR),
        ("num_tokens_per_expert", _PTR),
        ("topk_idx", _PTR),
        ("positions", _PTR),
        ("work", _PTR),
        ("counts", _PTR),
        ("summary", _PTR),
        ("host", _PTR),
        ("ticket", np.uint64),
        ("num_tokens", np.uint32),
        ("num_experts", np.uint32),
        ("num_worst_tokens", np.uint32),
        ("num_topk", np.uint32),
        ("is_64_bit", np.uint32),
        ("makes_layout", np.uint32),
    ],
    align=True,
)

DISPATCH = np.dtype(
    [
        ("call", CALL),
        ("rows", _PTR),
        ("scales", _PTR),
        ("topk_idx", _PTR),
        ("topk_weights", _PTR),
        ("recv_rows", _PTR),
        ("recv_scales", _PTR),
        ("recv_topk_idx", _PTR),
        ("recv_topk_weights", _PTR),
        ("num_out_rows", np.uint32),
        ("launch", np.uint32),
        ("positions", _PTR),
        ("work", _PTR),
        ("summary", _PTR),
        ("scales_token_stride", np.int64),
        ("scales_stride", np.int64),
        ("num_tokens", np.uint32),
        ("row_bytes", np.uint32),
        ("num_scales", np.uint32),
        ("num_topk", np.uint32),
        ("is_64_bit", np.uint32),
        ("num_worst_tokens", np.uint32),
        ("first_expert", np.int32),
        ("num_local_experts", np.int32),
        ("staged_row_bytes", np.uint32),
        ("padding", np.uint32),
    ],
    align=True,
)

COMBINE = np.dtype(
    [
        ("call", CALL),
        ("rows", _PTR),
        ("weights", _PTR),
        ("bias", _PTR, (2,)),
        ("out_rows", _PTR),
        ("out_weights", _PTR),
        ("positions", _PTR),
        ("counts", _PTR),
        ("summary", _PTR),
        ("further_rows", _PTR),
        ("further_weights", _PTR),
        ("further_places", _PTR),
        ("num_tokens", np.uint32),
        ("row_bytes", np.uint32),
        ("num_topk", np.uint32),
        ("unit_rows", np.uint32),
        ("num_further", np.uint32),
        ("padding", np.uint32),
    ],
    align=True,
)

#: What a block of low-latency kernels remembers.
LOW_LATENCY_BLOCK_STATE = np.dtype(
    [
        ("epoch", np.uint32),
        ("padding", np.uint32),
        ("slot_epoch", np.uint32, (2,)),
        ("slot_masked", np.uint32, (2,)),
        ("slot_received", np.uint32, (2,)),
    ],
    align=True,
)

#: Device memory that a rank's low-latency calls count in.
LOW_LATENCY_STATE = np.dtype(
    [
        ("num_finished_blocks", np.uint32),
        ("has_failed", np.uint32),
        ("waited_us", np.uint32, (MAX_RANKS,)),
        ("verdicts", np.uint64, (MAX_RANKS,)),
        ("shown_ns", np.uint64),
        ("sign_seen_ns", np.uint64, (MAX_RANKS,)),
        ("padding", np.uint64, (2,)),
        ("blocks", LOW_LATENCY_BLOCK_STATE, (MAX_LOW_LATENCY_BLOCKS,)),
    ],
    align=True,
)

LOW_LATENCY_SHAPE = np.dtype(
    [
        (name, np.uint32)
        for name in (
            *("kind", "num_max_tokens", "hidden", "num_experts", "num_topk", "format"),
            *("num_tokens", "num_parts"),
        )
    ],
    align=True,
)

LOW_LATENCY_CALL = np.dtype(
    [
        ("base", _PTR, (MAX_RANKS,)),
        ("rows_bytes", np.uint64),
        ("shape", LOW_LATENCY_SHAPE),
        ("state", _PTR),
        ("record", _PTR),
        ("masks", _PTR),
        ("ticket", _PTR),
        ("wait_stats", _PTR),
        ("timeout_ns", np.uint64),
        ("rank", np.uint32),
        ("phases", np.uint32),
        ("can_mask", np.uint32),
        ("padding", np.uint32),
    ],
    align=True,
)

LOW_LATENCY_DISPATCH = np.dtype(
    [
        ("call", LOW_LATENCY_CALL),
        ("rows", _PTR),
        ("topk_idx", _PTR),
        ("recv_rows", _PTR),
        ("recv_scales", _PTR),
        ("recv_count", _PTR),
        ("src_info", _PTR),
        ("layout_range", _PTR),
        ("recv_stats", _PTR),
        ("is_64_bit", np.uint32),
        ("num_scales", np.uint32),
    ],
    align=True,
)

LOW_LATENCY_COMBINE = np.dtype(
    [
        ("call", LOW_LATENCY_CALL),
        ("rows", _PTR),
        ("topk_idx", _PTR),
        ("topk_weights", _PTR),
        ("layout_range", _PTR),
        ("out", _PTR),
        ("is_64_bit", np.uint32),
        ("padding", np.uint32),
    ],
    align=True,
)


def _codes(dtype: np.dtype[Any]) -> str:
    """Return struct's codes of all fields, nested ones and subarrays spread out."""
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return _codes(base) * int(np.prod(shape, dtype=int))
    if dtype.fields is None:
        return dtype.char.replace("L", "Q").replace("l", "q")
    return "".join(_codes(dtype.fields[name][0]) for name in dtype.names or ())


@cache
def _packer(dtype: np.dtype[Any], first: int) -> struct.Struct:
    """Return the packer of all fields but the first ones, nested ones spread out."""
    fields: Any = dtype.fields or {}
    names = (dtype.names or ())[first:]
    packer = struct.Struct("=" + "".join(_codes(fields[name][0]) for name in names))
    size, all_sizes = (sum(fields[name][0].itemsize for name in some) for some in (names, fields))
    if packer.size != size or all_sizes != dtype.itemsize:
        raise TypeError(f"struct {dtype.names} has padding; reorder or pad its fields")
    return packer


def pack_all(dtype: np.dtype[Any], values: Sequence[int]) -> bytes:
    """Return a kernel's argument from the values of all its fields, nested ones spread out."""
    return _packer(dtype, 0).pack(*values)


def pack(dtype: np.dtype[Any], call: bytes, header: bytes, values: Sequence[int]) -> bytes:
    """Return a kernel's argument.

    NOTE: filling a structured array field by field takes longer than launching the kernel.

    Args:
        dtype: AGREE, ROUTE, DISPATCH or COMBINE.
        call: The CALL_BYTES of CALL in front of the header.
        header: HEADER as bytes.
        values: Every field behind ``call``, in order, subarrays spread out.
    """
    return call + header + _packer(dtype, 1).pack(*values)
