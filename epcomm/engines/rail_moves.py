"""What moves rows between nodes, as the rails engine sees it; one kind for each place of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from epcomm.arrays import ArrayView
from epcomm.engines.base import (
    Allocate,
    CombineRequest,
    CombineResult,
    DispatchInto,
    DispatchRequest,
    LayoutViews,
    TopK,
)
from epcomm.engines.rail_routes import RailRoutes
from epcomm.rail_link import Bytes, RailLink


class Moves(Protocol):
    """What depends on where rows are.

    `host_rail_moves` has it for the CPU's memory, `device_rail_moves` for GPUs.
    """

    def empty(self, num_bytes: int) -> Bytes:
        """Return memory for the rows that MPI sends and receives."""
        ...

    def empty_on_host(self, num_bytes: int) -> Bytes | None:
        """Return memory for what the host itself sends; None where `empty` gives such."""
        ...

    def view_memory(self, memory: Bytes) -> ArrayView:
        """View what `empty` gave."""
        ...

    def make_layout(self, topk_idx: ArrayView, num_experts: int, allocate: Allocate) -> LayoutViews:
        """See `Engine.make_layout`."""
        ...

    def fetch(self, layout: LayoutViews, topk: TopK | None) -> tuple[LayoutViews, ArrayView | None]:
        """Return the layout, but for tokens by node, and the choices in memory of the host."""
        ...

    def put(self, array: npt.NDArray[Any], view: ArrayView) -> None:
        """Copy an array of the host to one where rows are."""
        ...

    def check(self, request: DispatchRequest | CombineRequest, max_tokens: int = 0) -> None:
        """Raise InvalidArgument if the node's engine would, before anything is sent.

        Args:
            request: The call.
            max_tokens: Most tokens of any rank, as far as known.
        """
        ...

    def dispatch(
        self,
        link: RailLink,
        request: DispatchRequest,
        routes: RailRoutes,
        pairs: Sequence[npt.NDArray[np.int32]] | None,
        out: DispatchInto,
    ) -> npt.NDArray[np.int64]:
        """Send, receive and spread all rows.

        Args:
            link: The way to the rail peers.
            request: The call.
            routes: Where rows go; with ``pairs`` the record of a new handle, to be completed.
            pairs: By node, the rail peer's choices of each of this node's experts; None where the
                handle is an earlier dispatch's.
            out: The outputs, without ``first_rows``; rows behind the last that arrives get no
                choices.

        Returns:
            Pairs that arrive for each local expert; with a handle nothing of worth.
        """
        ...

    def combine(
        self, link: RailLink, request: CombineRequest, routes: RailRoutes, out: CombineResult
    ) -> None:
        """Sum in the node and send, receive and sum here, all rows."""
        ...

    def close(self) -> None:
        """Let go of the staging memory."""
        ...
