"""Which rows cross between nodes and where they lie, for rows on GPUs: the record of a handle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from epcomm.arrays import ArrayView
from epcomm.engines.base import LayoutViews
from epcomm.engines.rail_routes import RailRoutes, node_experts
from epcomm.handle import DispatchHandle
from epcomm.routing import Ints
from epcomm.topology import Topology

#: Copies arrays to the GPU; each view owns the memory there.
Upload = Callable[[dict[str, npt.NDArray[Any]]], dict[str, ArrayView]]


class Run(NamedTuple):
    """Neighbouring rows: the first, and how many."""

    first: int
    num_rows: int


@dataclass(eq=False)
class Part:
    """The rows that come here from one node; from the own node, all this rank's.

    Attributes:
        num_rows: Rows of the rail peer that come here; of this rank, all its tokens.
        runs: Where the rows of the node's ranks lie among all that arrive here: one run where these
            ranks are neighbours.
        layout: Of the rail peer's rows inside this node.
        handle: What the node's engine returned for them.
    """

    num_rows: int
    runs: list[Run]
    layout: LayoutViews
    handle: DispatchHandle | None = None

    @property
    def num_recv(self) -> int:
        """Rows of the node that arrive here."""
        return sum(run.num_rows for run in self.runs)


@dataclass(frozen=True, eq=False)
class DeviceRoutes:
    """A handle's record; arrays are on the GPU.

    Attributes:
        parts: By node.
        outgoing: By node, ``[n] int64`` this rank's tokens that go there.
        going: By node, the chunks in which they do.
        coming: By node, the chunks in which the rail peer's rows come here.
        numbers: By node, the experts' numbers there, see `node_experts`.
        first_sums: By node, the row of its first sum when all other nodes' are there.
        num_sums: Rows of all other nodes' sums.
        places: ``[num_tokens, num_nodes - 1] int32`` rows of each token's sums, nodes ascending;
            -1 for none.
    """

    parts: list[Part]
    outgoing: list[ArrayView]
    going: list[list[Run]]
    coming: list[list[Run]]
    numbers: list[ArrayView]
    first_sums: dict[int, int]
    num_sums: int
    places: ArrayView

    @property
    def longest_chunk(self) -> int:
        """Rows of the longest chunk, whichever way it goes."""
        chunks = [run for runs in (*self.going, *self.coming) for run in runs]
        return max((run.num_rows for run in chunks), default=0)


def make_device_routes(
    topology: Topology,
    routes: RailRoutes,
    pairs: Sequence[npt.NDArray[np.int32]],
    num_experts: int,
    upload: Upload,
) -> DeviceRoutes:
    """Make the record of a dispatch.

    Args:
        topology: The nodes.
        routes: The same for any rows.
        pairs: By node, the rail peer's choices of each of this node's experts.
        num_experts: Experts over all ranks.
        upload: Copies to the GPU.
    """
    nodes, own = range(topology.num_nodes), topology.node
    chunk = routes.num_chunk_tokens
    others = [node for node in nodes if node != own]
    places = np.full((int(routes.num_tokens[topology.rank]), len(others)), -1, np.int32)
    first_sums, num_sums = {}, 0
    for i, node in enumerate(others):
        crossed = routes.outgoing[node]
        places[crossed, i] = num_sums + np.arange(len(crossed))
        first_sums[node] = num_sums
        num_sums += len(crossed)
    masks = [
        routes.in_node[node] if node == own else routes.in_node[node][routes.incoming[node]]
        for node in nodes
    ]
    arrays: dict[str, npt.NDArray[Any]] = {"places": places}
    for node in nodes:
        arrays |= {
            f"outgoing {node}": routes.outgoing[node].astype(np.int64),
            f"numbers {node}": node_experts(topology, num_experts, node),
            f"per rank {node}": masks[node].sum(axis=0, dtype=np.int32),
            f"per expert {node}": pairs[node],
            f"mask {node}": masks[node],
        }
    views = upload(arrays)
    return DeviceRoutes(
        parts=[
            Part(
                num_rows=len(masks[node]),
                runs=find_runs(topology.ranks_of(node), routes.num_arriving),
                layout=LayoutViews(
                    num_tokens_per_rank=views[f"per rank {node}"],
                    num_tokens_per_node=None,
                    num_tokens_per_expert=views[f"per expert {node}"],
                    is_token_in_rank=views[f"mask {node}"],
                ),
            )
            for node in nodes
        ],
        outgoing=[views[f"outgoing {node}"] for node in nodes],
        going=[_chunks(0 if node == own else len(routes.outgoing[node]), chunk) for node in nodes],
        coming=[_chunks(0 if node == own else len(masks[node]), chunk) for node in nodes],
        numbers=[views[f"numbers {node}"] for node in nodes],
        first_sums=first_sums,
        num_sums=num_sums,
        places=views["places"],
    )


def find_runs(ranks: Sequence[int], num_arriving: Ints) -> list[Run]:
    """Return where some ranks' rows lie among those of all ranks."""
    first = np.cumsum(num_arriving) - num_arriving
    runs: list[Run] = []
    for rank in ranks:
        begin, count = int(first[rank]), int(num_arriving[rank])
        if runs and sum(runs[-1]) == begin:
            runs[-1] = Run(runs[-1].first, runs[-1].num_rows + count)
        elif count or not runs:
            runs.append(Run(begin, count))
    return runs


def _chunks(num_rows: int, num_chunk_rows: int) -> list[Run]:
    return [
        Run(first, min(num_chunk_rows, num_rows - first))
        for first in range(0, num_rows, num_chunk_rows)
    ]
