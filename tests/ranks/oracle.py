"""What every call must give, from all ranks' inputs: plain loops over tokens, ranks and choices.

Written from the call contract alone; it shares no code with epcomm. Arrays are NumPy's, with
ml_dtypes for bf16 and fp8. Lists "by rank" hold one entry for each rank, in order.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
#: Source rank and source token of a row.
Origin = tuple[int, int]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)


def ranks_of(choices: Sequence[int], num_local: int) -> list[int]:
    """Return the ranks that hold at least one chosen expert, ascending."""
    return sorted({expert // num_local for expert in choices if expert >= 0})


def round_to(values: npt.NDArray[np.float32], dtype: np.dtype[Any]) -> Array:
    """Round f32 to nearest, ties to even; bf16 by its bits."""
    if dtype != BFLOAT16:
        with np.errstate(all="ignore"):
            return values.astype(dtype)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    rounded[np.isnan(values)] = 0x7FC0
    return rounded.astype(np.uint16).view(BFLOAT16)


# --- dispatch and combine ----------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """See `Buffer.get_dispatch_layout`."""

    num_tokens_per_rank: Array
    num_tokens_per_node: Array
    num_tokens_per_expert: Array
    is_token_in_rank: Array


def layout(
    topk_idx: Array, num_experts: int, num_ranks: int, nodes: Sequence[int] | None = None
) -> Layout:
    """Count the tokens of one rank; nodes: of each rank, one node where None."""
    nodes = nodes or [0] * num_ranks
    per_rank = np.zeros(num_ranks, np.int32)
    per_node = np.zeros(max(nodes) + 1, np.int32)
    per_expert = np.zeros(num_experts, np.int32)
    in_rank = np.zeros((len(topk_idx), num_ranks), bool)
    for token, choices in enumerate(topk_idx.tolist()):
        holders = ranks_of(choices, num_experts // num_ranks)
        for rank in holders:
            per_rank[rank] += 1
            in_rank[token, rank] = True
        for node in {nodes[rank] for rank in holders}:
            per_node[node] += 1
        for expert in choices:
            if expert >= 0:
                per_expert[expert] += 1
    return Layout(per_rank, per_node, per_expert, in_rank)


def arrivals(topk_by_rank: Sequence[Array], num_experts: int, me: int) -> list[Origin]:
    """Return the origin of every row that one rank receives, in order."""
    num_local = num_experts // len(topk_by_rank)
    return [
        (source, token)
        for source, topk_idx in enumerate(topk_by_rank)
        for token, choices in enumerate(topk_idx.tolist())
        if me in ranks_of(choices, num_local)
    ]


def pick(by_rank: Sequence[Array], origins: Sequence[Origin]) -> Array:
    """Return the rows of some origins, stacked."""
    out = np.empty((len(origins), *by_rank[0].shape[1:]), by_rank[0].dtype)
    for row, (source, token) in enumerate(origins):
        out[row] = by_rank[source][token]
    return out


def received_topk(
    topk_idx: Array, topk_weights: Array, num_experts: int, num_ranks: int, me: int
) -> tuple[Array, Array]:
    """Make choices of received rows local ones: -1 and 0.0 where the expert is elsewhere."""
    num_local = num_experts // num_ranks
    idx, weights = np.full_like(topk_idx, -1), np.zeros_like(topk_weights)
    for row, choices in enumerate(topk_idx.tolist()):
        for k, expert in enumerate(choices):
            if expert >= 0 and expert // num_local == me:
                idx[row, k] = expert - me * num_local
                weights[row, k] = topk_weights[row, k]
    return idx, weights


def tokens_per_local_expert(
    topk_by_rank: Sequence[Array], num_experts: int, me: int, alignment: int
) -> list[int]:
    """Return the pairs of a token and one of its choices, a local expert each, rounded up."""
    num_local = num_experts // len(topk_by_rank)
    counts = [0] * num_local
    for topk_idx in topk_by_rank:
        for expert in topk_idx.ravel().tolist():
            if expert >= 0 and expert // num_local == me:
                counts[expert % num_local] += 1
    return [-(-count // alignment) * alignment for count in counts]


def combine(
    rows_by_rank: Sequence[Array],
    topk_idx: Array,
    num_experts: int,
    biases: Sequence[Array] = (),
    *,
    nodes: Sequence[int] | None = None,
    me: int = 0,
) -> Array:
    """Sum the ranks' rows of each of one rank's tokens.

    The rank's own node adds to the biases; then come the other nodes' sums, each rounded once.

    Args:
        rows_by_rank: ``[num_tokens, width]`` what each rank has for each of these tokens; where a
            token does not go, anything.
        topk_idx: The tokens' choices.
        num_experts: Experts over all ranks.
        biases: Up to two, ``[num_tokens, width]``.
        nodes: Node of each rank; one node where None.
        me: The rank whose tokens these are.
    """
    dtype, num_local = rows_by_rank[0].dtype, num_experts // len(rows_by_rank)
    nodes = nodes or [0] * len(rows_by_rank)
    totals = np.zeros(rows_by_rank[0].shape, np.float32)
    with np.errstate(all="ignore"):
        for token, choices in enumerate(topk_idx.tolist()):
            if biases:
                totals[token] = biases[0][token].astype(np.float32)
            for bias in biases[1:]:
                totals[token] = totals[token] + bias[token].astype(np.float32)
            holders = ranks_of(choices, num_local)
            for rank in holders:
                if nodes[rank] == nodes[me]:
                    totals[token] = totals[token] + rows_by_rank[rank][token].astype(np.float32)
            for node in sorted({nodes[rank] for rank in holders} - {nodes[me]}):
                share = np.zeros(totals.shape[1], np.float32)
                for rank in holders:
                    if nodes[rank] == node:
                        share = share + rows_by_rank[rank][token].astype(np.float32)
                totals[token] = totals[token] + round_to(share, dtype).astype(np.float32)
        return round_to(totals, dtype)


# --- fp8 ---------------------------------------------------------------------------------------

_E4M3_MAX = np.float32(448.0)
_SMALLEST_AMAX = np.float32(1e-4)
BLOCK = 128


def to_e4m3(values: npt.NDArray[np.float32]) -> Array:
    """Round to the nearest e4m3 value, ties to even, too large ones to 448."""
    size = np.minimum(np.abs(values), _E4M3_MAX)
    # Values from 2^e on are 2^(e - 3) apart, eight to the next power; those below 2^-6 as at it.
    exponent = np.maximum(np.frexp(size)[1] - 1, -6)
    steps = np.rint(np.ldexp(size, 3 - exponent)).astype(np.int32)
    code = np.where(size == 0, 0, 8 * (exponent + 6) + steps)
    return (code | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8).view(FLOAT8)


def cast_to_fp8(rows: Array, is_rounded: bool) -> tuple[Array, npt.NDArray[np.float32]]:
    """Cast ``[num_rows, hidden]``: e4m3, and the scale of every block of 128."""
    blocks = rows.astype(np.float32).reshape(len(rows), rows.shape[1] // BLOCK, BLOCK)
    amax = np.maximum(np.abs(blocks).max(axis=2, initial=0.0), _SMALLEST_AMAX)
    scales = (amax / _E4M3_MAX).astype(np.float32)
    factor = (_E4M3_MAX / amax).astype(np.float32)
    if is_rounded:
        mantissa, exponent = np.frexp(scales)  # mantissa in [0.5, 1)
        exponent = np.where(mantissa == 0.5, exponent - 1, exponent)
        scales = np.float32(2.0) ** exponent.astype(np.float32)
        factor = np.float32(2.0) ** -exponent.astype(np.float32)
    return to_e4m3(blocks * factor[:, :, None]).reshape(rows.shape), scales


def pack_ue8m0(scales: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """Pack the biased exponents of four neighbouring powers of two in a word, the first lowest."""
    words = np.zeros((len(scales), scales.shape[1] // 4), np.int64)
    for i in range(scales.shape[1]):
        biased = np.log2(scales[:, i].astype(np.float64)).astype(np.int64) + 127
        words[:, i // 4] |= biased << 8 * (i % 4)
    return words.astype(np.uint32).view(np.int32)


# --- low latency -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpertRows:
    """What one rank's local experts receive.

    Attributes:
        origins: For each local expert, the origin of its rows, in order.
        layout_range: ``[num_local, num_ranks] int64`` begin << 32 | count.
    """

    origins: list[list[Origin]]
    layout_range: Array


def expert_rows(
    topk_by_rank: Sequence[Array], num_experts: int, me: int, skipped: Container[int] = ()
) -> ExpertRows:
    """Return where every row of a low-latency dispatch lies; nothing comes from skipped ranks."""
    num_ranks = len(topk_by_rank)
    num_local = num_experts // num_ranks
    origins: list[list[Origin]] = [[] for _ in range(num_local)]
    ranges = np.zeros((num_local, num_ranks), np.int64)
    for source, topk_idx in enumerate(topk_by_rank):
        begins = [len(rows) for rows in origins]
        for token, choices in enumerate(topk_idx.tolist()) if source not in skipped else ():
            for expert in choices:
                if expert >= 0 and expert // num_local == me:
                    origins[expert % num_local].append((source, token))
        for local, rows in enumerate(origins):
            ranges[local, source] = begins[local] << 32 | len(rows) - begins[local]
    return ExpertRows(origins, ranges)


def low_latency_combine(
    rows_by_choice: Array,
    topk_idx: Array,
    topk_weights: Array,
    num_local: int,
    is_by_rank: bool,
    skipped: Container[int] = (),
) -> Array:
    """Sum the weighted rows of each of one rank's tokens.

    Args:
        rows_by_choice: ``[num_tokens, num_topk, hidden] bf16``: what the chosen expert made of each
            token; where there is no choice, anything.
        topk_idx: The tokens' choices.
        topk_weights: Their weights, f32.
        num_local: Experts of one rank.
        is_by_rank: Whether a rank's experts are summed and rounded to bf16 before ranks are.
        skipped: Ranks that give nothing.
    """
    with np.errstate(all="ignore"):
        totals = _low_latency_totals(
            rows_by_choice, topk_idx, topk_weights, num_local, is_by_rank, skipped
        )
    return round_to(totals, BFLOAT16)


def _low_latency_totals(
    rows_by_choice: Array,
    topk_idx: Array,
    topk_weights: Array,
    num_local: int,
    is_by_rank: bool,
    skipped: Container[int],
) -> npt.NDArray[np.float32]:
    totals = np.zeros((len(topk_idx), rows_by_choice.shape[2]), np.float32)
    for token, choices in enumerate(topk_idx.tolist()):
        weighted = [
            (expert // num_local, topk_weights[token, k] * _float32(rows_by_choice[token, k]))
            for k, expert in enumerate(choices)
            if expert >= 0 and expert // num_local not in skipped
        ]
        if not is_by_rank:
            for _, row in weighted:
                totals[token] = totals[token] + row
            continue
        for rank in ranks_of(choices, num_local):
            share = np.zeros(totals.shape[1], np.float32)
            for holder, row in weighted:
                if holder == rank:
                    share = share + row
            totals[token] = totals[token] + _float32(round_to(share, BFLOAT16))
    return totals


def _float32(values: Array) -> npt.NDArray[np.float32]:
    return values.astype(np.float32)


def difference(got: Array, want: Array) -> float:
    """Return 1 - 2<a,b> / (|a|² + |b|²) in float64: 0 for equal arrays."""
    a, b = got.astype(np.float64), want.astype(np.float64)
    norm = (a * a).sum() + (b * b).sum()
    return 0.0 if norm == 0 else float(1 - 2 * (a * b).sum() / norm)
