"""How the demo's token rows reach their experts and come back: with epcomm, or not at all.

`EpExchange` is what a framework would write around `epcomm.training`: four calls, each followed by
the wait for its event. `LocalExchange` is the same for one rank that holds every expert.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

from epcomm import training
from epcomm.group import Group

# Arrays of whatever namespace the demo was given: no type is common to NumPy and CuPy.
Array = Any


@dataclass
class Routed:
    """The rows that reached the experts of this rank.

    Attributes:
        rows: [num_rows, hidden], one row for each token that chose an expert here.
        expert_idx: [num_rows, topk] int64, local expert, or -1 where the choice is elsewhere.
        weights: [num_rows, topk], 0 where the choice is elsewhere.
        num_pairs_per_expert: (row, choice) pairs of each local expert.
        handle: what the exchange needs to bring results back; opaque to the model.
    """

    rows: Array
    expert_idx: Array
    weights: Array
    num_pairs_per_expert: list[int]
    handle: Any = None


class Exchange(Protocol):
    """How rows reach the experts and come back: four moves, each the mirror of another."""

    def dispatch(self, x: Array, topk_idx: Array, topk_weights: Array) -> Routed:
        """Take tokens [T, H] to the ranks of their experts."""

    def combine(self, rows: Array, routed: Routed) -> Array:
        """Bring expert results back to their tokens and sum them: [T, H]."""

    def combine_backward(self, grad: Array, routed: Routed) -> Array:
        """Take the gradient of `combine`'s result to the rows: [num_rows, H]."""

    def dispatch_backward(
        self, grad_rows: Array, grad_weights: Array, routed: Routed
    ) -> tuple[Array, Array]:
        """Bring the rows' gradients back: [T, H] for the tokens and [T, topk] for the weights."""


class LocalExchange:
    """The exchange of a single rank that holds all experts: nothing moves."""

    def __init__(self, xp: Any, num_experts: int) -> None:
        self._xp = xp
        self._num_experts = num_experts

    def dispatch(self, x: Array, topk_idx: Array, topk_weights: Array) -> Routed:
        """Leave tokens where they are."""
        counts = self._xp.bincount(topk_idx.reshape(-1), minlength=self._num_experts).tolist()
        return Routed(x, topk_idx, topk_weights, counts)

    def combine(self, rows: Array, routed: Routed) -> Array:
        """Leave results where they are."""
        return rows

    def combine_backward(self, grad: Array, routed: Routed) -> Array:
        """Leave gradients where they are."""
        return grad

    def dispatch_backward(
        self, grad_rows: Array, grad_weights: Array, routed: Routed
    ) -> tuple[Array, Array]:
        """Leave gradients where they are."""
        return grad_rows, grad_weights


class EpExchange:
    """The exchange between ranks: rank `r` holds experts `r * L` to `(r + 1) * L - 1`.

    Collective, as are all its calls.

    Attributes:
        num_rows_to_rank: rows this rank dispatched to each rank, tokens and gradients together.
        dispatch_s, combine_s: seconds spent in each, the wait for slower ranks included.

    Args:
        xp: array namespace.
        group: the ranks.
        num_experts: experts of all ranks; a multiple of the number of ranks.
        hidden: elements of a row of float32.
        engine: what `Buffer` takes as engine.
    """

    def __init__(
        self, xp: Any, group: Group, num_experts: int, hidden: int, engine: str | None = None
    ) -> None:
        self._xp = xp
        self._num_experts = num_experts
        self._ranks = xp.arange(group.size)
        self.row_bytes = training.get_hidden_bytes(xp.empty((1, hidden), xp.float32))
        self.num_rows_to_rank = xp.zeros(group.size, xp.int64)
        self.dispatch_s = 0.0
        self.combine_s = 0.0
        training.get_buffer(group, self.row_bytes, engine=engine)

    def dispatch(self, x: Array, topk_idx: Array, topk_weights: Array) -> Routed:
        """Take each token to every rank that holds one of its experts."""
        owners = topk_idx // (self._num_experts // len(self._ranks))
        num_rows = (owners[:, :, None] == self._ranks).any(axis=1).sum(axis=0)
        self.num_rows_to_rank += num_rows
        begin = time.perf_counter()
        rows, expert_idx, weights, counts, handle, event = training.dispatch_forward(
            x, topk_idx, topk_weights, self._num_experts
        )
        self._finish(event)
        self.dispatch_s += time.perf_counter() - begin
        return Routed(rows, expert_idx, weights, counts, (handle, num_rows))

    def combine(self, rows: Array, routed: Routed) -> Array:
        """Bring the experts' results back and sum them by token."""
        begin = time.perf_counter()
        combined, event = training.combine_forward(rows, routed.handle[0])
        self._finish(event)
        self.combine_s += time.perf_counter() - begin
        return combined

    def combine_backward(self, grad: Array, routed: Routed) -> Array:
        """Take the tokens' gradients the way that `dispatch` took the tokens."""
        handle, num_rows = routed.handle
        self.num_rows_to_rank += num_rows
        begin = time.perf_counter()
        grad_rows, event = training.combine_backward(grad, handle)
        self._finish(event)
        self.dispatch_s += time.perf_counter() - begin
        return grad_rows

    def dispatch_backward(
        self, grad_rows: Array, grad_weights: Array, routed: Routed
    ) -> tuple[Array, Array]:
        """Bring the rows' gradients back the way that `combine` brought results."""
        begin = time.perf_counter()
        grad, grad_topk_weights, event = training.dispatch_backward(
            grad_rows, grad_weights, routed.handle[0]
        )
        self._finish(event)
        self.combine_s += time.perf_counter() - begin
        return grad, grad_topk_weights

    def _finish(self, event: Any) -> None:
        event.current_stream_wait()
        if hasattr(self._xp, "cuda"):
            # A device runs on behind the host's back; without this the clock would see launches.
            self._xp.cuda.get_current_stream().synchronize()


def to_host(xp: Any, array: Array) -> Array:
    """Return a NumPy array with the same values; NumPy's own arrays as they are."""
    return xp.asnumpy(array) if hasattr(xp, "asnumpy") else array
