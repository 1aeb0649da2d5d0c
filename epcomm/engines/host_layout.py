"""Layouts on the host: made of a rank's choices, and checked before rows move along them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from epcomm import routing
from epcomm.arrays import ArrayView
from epcomm.engines.base import Allocate, LayoutViews
from epcomm.errors import InvalidArgument
from epcomm.topology import Topology


def make_layout(
    topk_idx: ArrayView, num_experts: int, topology: Topology, allocate: Allocate
) -> LayoutViews:
    """Count where one rank's tokens go."""
    idx = topk_idx.numpy()
    _check_expert_ids(idx, num_experts)
    made = routing.make_layout(idx, num_experts, topology.node_of_rank)

    def give(array: npt.NDArray[Any]) -> ArrayView:
        view = allocate(array.shape, array.dtype)
        view.numpy()[...] = array
        return view

    per_node = give(made.num_tokens_per_node) if topology.num_nodes > 1 else None
    return LayoutViews(
        num_tokens_per_rank=give(made.num_tokens_per_rank),
        num_tokens_per_node=per_node,
        num_tokens_per_expert=give(made.num_tokens_per_expert),
        is_token_in_rank=give(made.is_token_in_rank),
    )


def _check_expert_ids(idx: npt.NDArray[Any], num_experts: int) -> None:
    if idx.size and (idx.min() < -1 or idx.max() >= num_experts):
        raise InvalidArgument(
            f"topk_idx holds values from {idx.min()} to {idx.max()}; they must be expert ids from "
            f"0 to {num_experts - 1}, or -1 for no choice."
        )


def check_layout(
    mask: routing.Bools,
    per_rank: npt.NDArray[np.int32],
    per_expert: npt.NDArray[np.int32],
    choices: ArrayView | None,
) -> None:
    """Raise InvalidArgument unless layout arrays and choices fit each other."""
    true_counts = mask.sum(axis=0)
    if (true_counts != per_rank).any():
        raise InvalidArgument(
            f"num_tokens_per_rank is {per_rank.tolist()} but is_token_in_rank has "
            f"{true_counts.tolist()} tokens a rank; pass both from one get_dispatch_layout."
        )
    if choices is not None:
        _check_expert_ids(choices.numpy(), len(per_expert))


def check_pairs(choices: ArrayView | None, per_expert: npt.NDArray[np.int32]) -> None:
    """Raise InvalidArgument unless choices are those that a layout was made of."""
    if choices is None:
        return
    idx = choices.numpy()
    pairs = np.bincount(idx[idx >= 0], minlength=len(per_expert))
    wrong = np.flatnonzero(pairs != per_expert)
    if len(wrong):
        expert = int(wrong[0])
        raise InvalidArgument(
            f"num_tokens_per_expert[{expert}] is {per_expert[expert]}, but topk_idx chooses expert "
            f"{expert} {pairs[expert]} times; pass the topk_idx that the layout was made of."
        )


def check_worst_tokens(arriving: routing.Ints, num_worst_tokens: routing.Ints) -> None:
    """Raise InvalidArgument if more rows arrive at some rank than it has room for.

    All ranks see all numbers, so all raise alike and nothing is sent.
    """
    over = np.flatnonzero((num_worst_tokens > 0) & (arriving > num_worst_tokens))
    if len(over):
        rank = int(over[0])
        raise InvalidArgument(
            f"num_worst_tokens is {num_worst_tokens[rank]} on rank {rank}, but {arriving[rank]} "
            f"rows arrive there; it must be at least that. The sum of all ranks' tokens is "
            "always enough."
        )
