"""Which tokens cross between which nodes, chunk by chunk: NumPy alone, no messages.

A *chunk* is a range of token numbers, the same on every rank: chunk c of rank r holds tokens
``[c * num_tokens, (c + 1) * num_tokens)`` of r. So chunk c of all nodes' sums for a rank concerns
the same tokens, and adding them in the order of the nodes needs no other chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from epcomm.routing import Bools, Ints
from epcomm.topology import Topology


@dataclass(eq=False)
class RailRoutes:
    """A handle's record.

    Attributes:
        num_chunk_tokens: Tokens of a chunk.
        num_tokens: Tokens of each rank.
        num_arriving: Rows that arrive at this rank from each rank.
        num_chunks: Chunks of each node, those of its rank with the most tokens.
        outgoing: By node, this rank's tokens that go there, ascending.
        incoming: By node, the tokens of this rank's rail peer that come here, ascending.
        in_node: By node, ``[num_tokens of the rail peer, ranks of a node]``: where its tokens go
            in this node.
        of_moves: What moves the rows adds in the first dispatch, for calls with the handle:
            `host_rail_moves.ChunkRecords`, or `device_rail_routes.DeviceRoutes` of rows on GPUs.
    """

    num_chunk_tokens: int
    num_tokens: Ints
    num_arriving: Ints
    num_chunks: list[int]
    outgoing: list[Ints]
    incoming: list[Ints]
    in_node: list[Bools]
    of_moves: Any = None

    def tokens(self, num_tokens: int, chunk: int) -> slice:
        """Return a chunk's range of tokens, of a rank that has so many in all."""
        begin = min(chunk * self.num_chunk_tokens, num_tokens)
        return slice(begin, min(begin + self.num_chunk_tokens, num_tokens))

    def outgoing_in(self, node: int, chunk: int) -> Ints:
        """Return this rank's tokens of a chunk that go to a node."""
        return self._in_chunk(self.outgoing[node], chunk)

    def incoming_in(self, node: int, chunk: int) -> Ints:
        """Return the rail peer's tokens of a chunk that come here."""
        return self._in_chunk(self.incoming[node], chunk)

    def _in_chunk(self, tokens: Ints, chunk: int) -> Ints:
        bounds = np.array([chunk, chunk + 1]) * self.num_chunk_tokens
        begin, end = np.searchsorted(tokens, bounds)
        return tokens[begin:end]


def make_routes(
    topology: Topology,
    mask: Bools,
    in_node: list[Bools],
    num_tokens: Ints,
    num_arriving: Ints,
    num_chunk_tokens: int,
) -> RailRoutes:
    """Make the record of a dispatch.

    Args:
        topology: The nodes.
        mask: ``[num_tokens, num_ranks]`` where this rank's tokens go.
        in_node: See `RailRoutes`.
        num_tokens: Tokens of each rank.
        num_arriving: See `RailRoutes`.
        num_chunk_tokens: Tokens of a chunk.
    """
    nodes = [list(topology.ranks_of(node)) for node in range(topology.num_nodes)]
    most = [int(num_tokens[ranks].max()) for ranks in nodes]
    return RailRoutes(
        num_chunk_tokens=num_chunk_tokens,
        num_tokens=num_tokens,
        num_arriving=num_arriving,
        num_chunks=[-(-count // num_chunk_tokens) for count in most],
        outgoing=[np.flatnonzero(mask[:, ranks].any(axis=1)) for ranks in nodes],
        incoming=[np.flatnonzero(part.any(axis=1)) for part in in_node],
        in_node=in_node,
    )


def node_experts(topology: Topology, num_experts: int, node: int) -> npt.NDArray[Any]:
    """Number a node's experts as if there were no other node.

    Returns:
        ``[num_experts + 1] int64``: the number of each expert in the node, -1 where it is
        elsewhere. The last is -1 too, so that "no choice" (-1) leads there.
    """
    num_local = num_experts // len(topology.node_of_rank)
    numbers = np.full(num_experts + 1, -1, np.int64)
    for index, rank in enumerate(topology.ranks_of(node)):
        local = np.arange(num_local)
        numbers[rank * num_local + local] = index * num_local + local
    return numbers
