"""The sums of a low-latency combine on the host engine: which rows, and in what order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from epcomm.arrays import BFLOAT16
from epcomm.engines.base import CombinePrecision, LowLatencyCombineRequest, LowLatencyShape
from epcomm.engines.scratch import Scratch
from epcomm.engines.sections import as_rows, gather_rows

#: The rows that a rank stages for combine, ``[num_local, num_recv_rows, hidden]``, and its ranges.
Staged = tuple[npt.NDArray[Any], npt.NDArray[np.int64]]

_FLOAT32 = np.dtype(np.float32)
_CHUNK_TOKENS = 64


def sum_tokens(
    request: LowLatencyCombineRequest,
    idx: npt.NDArray[np.int64],
    rank: int,
    sources: Sequence[Staged],
    masked: npt.NDArray[Any],
    scratch: Scratch,
) -> None:
    """Sum every token's rows, weighted, in fp32; round once, into ``request.out``.

    Args:
        request: The call.
        idx: ``[num_tokens, num_topk]``, its choices.
        rank: This rank.
        sources: What each rank has staged.
        masked: ``[num_ranks]``, not 0 for a rank whose rows do not count.
        scratch: Memory that calls use again.
    """
    shape = request.shape
    weights, out = request.topk_weights.numpy(), request.out.numpy()
    rank_of = np.where(idx < 0, -1, idx // shape.num_local_experts)
    rank_of[np.isin(rank_of, np.flatnonzero(masked))] = -1
    row_of = _rows_at_experts(idx, shape, rank, sources, rank_of)
    for begin in range(0, len(idx), _CHUNK_TOKENS):
        part = slice(begin, min(begin + _CHUNK_TOKENS, len(idx)))
        pick = _Pick(rank_of[part], row_of[part], weights[part], sources, shape.hidden, scratch)
        by_rank = request.precision is CombinePrecision.RANK
        # Infinities and NaNs are the caller's own values, as on a GPU: no warnings.
        with np.errstate(all="ignore"):
            out[part] = pick.sum_by_rank() if by_rank else pick.sum_by_choice()


def _rows_at_experts(
    idx: npt.NDArray[np.int64],
    shape: LowLatencyShape,
    rank: int,
    sources: Sequence[Staged],
    rank_of: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Return the row of every choice in its expert rank's ``[num_local * num_recv_rows]``."""
    begin = np.zeros(shape.num_experts, np.int64)
    for peer, source in enumerate(sources):
        at = slice(peer * shape.num_local_experts, (peer + 1) * shape.num_local_experts)
        begin[at] = source[1][:, rank] >> 32
    # The n-th of this rank's tokens that choose an expert has the n-th of its rows there.
    flat = idx.ravel()
    order = np.argsort(flat, kind="stable")
    ordered = flat[order]
    within = np.empty_like(flat)
    within[order] = np.arange(len(flat)) - np.searchsorted(ordered, ordered)
    local = np.maximum(idx, 0) % shape.num_local_experts
    rows = local * shape.num_recv_rows + begin[np.maximum(idx, 0)] + within.reshape(idx.shape)
    return np.where(rank_of < 0, 0, rows)


class _Pick:
    """A few tokens' choices, and the rows that they name."""

    def __init__(
        self,
        rank_of: npt.NDArray[np.int64],
        row_of: npt.NDArray[np.int64],
        weights: npt.NDArray[np.float32],
        sources: Sequence[Staged],
        hidden: int,
        scratch: Scratch,
    ) -> None:
        self._rank_of, self._row_of, self._weights = rank_of, row_of, weights
        self._sources = sources
        self._hidden = hidden
        self._scratch = scratch

    def _take(self, name: str, num_rows: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        return self._scratch.take(name, (num_rows, self._hidden), dtype)

    def _zeros(self, name: str) -> npt.NDArray[np.float32]:
        zeros = self._take(name, len(self._rank_of), _FLOAT32)
        zeros[...] = 0.0
        return zeros

    def _add(self, total: npt.NDArray[np.float32], rank: int, choice: int) -> bool:
        """Add the weighted rows of one choice that lie on one rank; tell whether there are any."""
        tokens = np.flatnonzero(self._rank_of[:, choice] == rank)
        if not len(tokens):
            return False
        rows = self._take("choice rows", len(tokens), BFLOAT16)
        weighted = self._take("choice sums", len(tokens), _FLOAT32)
        before = self._take("choice sums before", len(tokens), _FLOAT32)
        source = self._sources[rank][0].reshape(-1, self._hidden)
        gather_rows(as_rows(source), self._row_of[tokens, choice], as_rows(rows))
        np.copyto(weighted, rows)
        weighted *= self._weights[tokens, choice, None]
        np.take(total, tokens, axis=0, out=before, mode="clip")
        weighted += before
        total[tokens] = weighted
        return True

    def sum_by_choice(self) -> npt.NDArray[np.float32]:
        """Sum over the choices, ascending."""
        total = self._zeros("token sums")
        for choice in range(self._rank_of.shape[1]):
            for rank in range(len(self._sources)):
                self._add(total, rank, choice)
        return total

    def sum_by_rank(self) -> npt.NDArray[np.float32]:
        """Sum each rank's choices, round that to bf16 as the wire does, and sum the ranks."""
        total = self._zeros("token sums")
        on_wire = self._take("wire rows", len(total), BFLOAT16)
        for rank in range(len(self._sources)):
            share = self._zeros("rank sums")
            found = [self._add(share, rank, k) for k in range(self._rank_of.shape[1])]
            if any(found):
                np.copyto(on_wire, share, casting="unsafe")
                np.copyto(share, on_wire)
                total += share
        return total
