"""From top-k choices to a layout and to every row's final position. NumPy; the kernels' oracle.

Rows lie on the receiver by source rank ascending, then by source token ascending. That order
follows from the counts alone, so it is known before a row moves and is the same in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one rank go.

    Attributes:
        num_tokens_per_rank: ``[num_ranks] int32``; a token counts once a rank.
        num_tokens_per_node: ``[num_nodes] int32``; a token counts once a node.
        num_tokens_per_expert: ``[num_experts] int32``; a token counts once for each choice.
        is_token_in_rank: ``[num_tokens, num_ranks] bool``.
    """

    num_tokens_per_rank: npt.NDArray[np.int32]
    num_tokens_per_node: npt.NDArray[np.int32]
    num_tokens_per_expert: npt.NDArray[np.int32]
    is_token_in_rank: Bools


def make_layout(
    topk_idx: npt.NDArray[Any], num_experts: int, node_of_rank: Sequence[int]
) -> Layout:
    """Count where the tokens of one rank go.

    Args:
        topk_idx: ``[num_tokens, num_topk]`` int32 or int64 global expert ids, -1 for no choice.
        num_experts: Experts over all ranks, a multiple of the number of ranks.
        node_of_rank: Node of each rank.
    """
    num_tokens = topk_idx.shape[0]
    num_ranks = len(node_of_rank)
    experts_per_rank = num_experts // num_ranks
    # Floor division takes -1 to -1: column -1 is a spare one that collects "no choice".
    spare = np.zeros((num_tokens, num_ranks + 1), bool)
    np.put_along_axis(spare, topk_idx // experts_per_rank, True, axis=1)
    is_token_in_rank = np.ascontiguousarray(spare[:, :num_ranks])
    nodes = np.asarray(node_of_rank)
    per_node = [
        np.count_nonzero(is_token_in_rank[:, nodes == node].any(axis=1))
        for node in range(int(nodes.max()) + 1)
    ]
    chosen = topk_idx[topk_idx >= 0]
    return Layout(
        num_tokens_per_rank=is_token_in_rank.sum(axis=0, dtype=np.int32),
        num_tokens_per_node=np.array(per_node, np.int32),
        num_tokens_per_expert=np.bincount(chosen, minlength=num_experts).astype(np.int32),
        is_token_in_rank=is_token_in_rank,
    )


def first_positions(counts: Ints) -> Ints:
    """Return where each source's rows begin on each receiver.

    Args:
        counts: ``[num_ranks, num_ranks]`` rows from source (first index) to receiver.

    Returns:
        The same shape: the sum over all lower sources.
    """
    return np.cumsum(counts, axis=0) - counts


def final_positions(is_token_in_rank: Bools, first: Ints) -> Ints:
    """Return the final position of every row that one rank sends.

    Args:
        is_token_in_rank: ``[num_tokens, num_ranks]`` of the sender.
        first: ``[num_ranks]`` the sender's row of `first_positions`.

    Returns:
        ``[num_tokens, num_ranks] int64`` row index on the receiver, -1 where the token does not go.
    """
    within = np.cumsum(is_token_in_rank, axis=0, dtype=np.int64) - 1
    return np.where(is_token_in_rank, first + within, -1)


def round_up(count: int, multiple: int) -> int:
    """Return the smallest multiple that is not below a count."""
    return -(-count // multiple) * multiple
