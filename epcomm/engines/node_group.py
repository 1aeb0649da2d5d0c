"""The ranks of a node of a larger group, as the node's engine sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from epcomm.errors import CommTimeout
from epcomm.group import Group


class NodeGroup:
    """The ranks of a node; MPI between nodes moves on while they wait for each other.

    Args:
        group: The ranks.
        names: Their numbers in the whole group, for errors.
        progress: Lets MPI move on.
    """

    def __init__(self, group: Group, names: Sequence[int], progress: Callable[[], None]) -> None:
        self._group = group
        self._names = names
        self._progress = progress
        self.rank = group.rank
        self.size = group.size

    def allgather(
        self, obj: Any, *, timeout_s: float | None = None, phase: str = "allgather"
    ) -> list[Any]:
        """See `Group.allgather`."""
        try:
            return self._group.allgather(obj, timeout_s=timeout_s, phase=phase)
        except CommTimeout as error:
            peers = [self._names[index] for index in error.peers]
            me = self._names[error.rank]
            raise CommTimeout(error.phase, me, peers, error.timeout_s) from None

    def barrier(self, *, timeout_s: float | None = None, phase: str = "barrier") -> None:
        """See `Group.barrier`."""
        self.allgather(None, timeout_s=timeout_s, phase=phase)

    def split(self, color: int) -> Group:
        """See `Group.split`."""
        return self._group.split(color)

    def check(self) -> None:
        """See `Group.check`."""
        self._group.check()
        self._progress()
