"""The rounds of the stream and graph programs: sets of inputs, and what each must give.

Each rank's experts multiply rows with the rank's factor, in f32: one rounding, the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle
from common import Array, choose_experts, rng_of

HIDDEN, NUM_TOPK, NUM_LOCAL, NUM_TOKENS = 256, 4, 4, 48
#: Coprime with the rounds between checks, so that every set is checked.
NUM_SETS = 7


def factor_of(rank: int) -> float:
    """Return what the experts of a rank multiply rows with."""
    return float(np.float32(0.7 + 1.3 * rank))


def num_tokens_of(rank: int) -> int:
    """Return the tokens of a rank, other ones on each."""
    return NUM_TOKENS - 5 * rank


@dataclass(frozen=True)
class RoundSet:
    """One rank's inputs, and what it must get; NumPy."""

    x: Array
    topk_idx: Array
    topk_weights: Array
    recv_x: Array
    recv_topk_idx: Array
    recv_topk_weights: Array
    combined_x: Array
    combined_weights: Array


def round_sets(key: str, me: int, num_ranks: int, *, same_routes: bool) -> list[RoundSet]:
    """Return the sets of one rank: other rows in each, and other routes unless they are fixed."""
    return [
        _round_set(key, number, 0 if same_routes else number, me, num_ranks)
        for number in range(NUM_SETS)
    ]


def _round_set(key: str, number: int, route: int, me: int, num_ranks: int) -> RoundSet:
    num_experts = NUM_LOCAL * num_ranks
    xs, idx, weights = [], [], []
    for rank in range(num_ranks):
        num_tokens = num_tokens_of(rank)
        rng = rng_of(key, "routes", route, rank)
        idx.append(choose_experts("some", rng, num_tokens, NUM_TOPK, num_experts, num_ranks))
        weights.append(rng.standard_normal((num_tokens, NUM_TOPK), np.float32))
        rng = rng_of(key, "rows", number, rank)
        xs.append(rng.standard_normal((num_tokens, HIDDEN), np.float32))
    origins = oracle.arrivals(idx, num_experts, me)
    recv_idx, recv_weights = oracle.received_topk(
        oracle.pick(idx, origins), oracle.pick(weights, origins), num_experts, num_ranks, me
    )
    results = [xs[me] * np.float32(factor_of(rank)) for rank in range(num_ranks)]
    return RoundSet(
        x=xs[me],
        topk_idx=idx[me],
        topk_weights=weights[me],
        recv_x=oracle.pick(xs, origins),
        recv_topk_idx=recv_idx,
        recv_topk_weights=recv_weights,
        combined_x=oracle.combine(results, idx[me], num_experts),
        combined_weights=np.where(idx[me] >= 0, weights[me], np.float32(0)),
    )


def layout_arguments(layout: tuple[Any, ...]) -> dict[str, Any]:
    """Return what dispatch takes of `Buffer.get_dispatch_layout`'s result."""
    per_rank, _, per_expert, in_rank, _ = layout
    return {
        "num_tokens_per_rank": per_rank,
        "num_tokens_per_expert": per_expert,
        "is_token_in_rank": in_rank,
    }
