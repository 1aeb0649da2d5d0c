"""How the ranks of several nodes begin a call: what `Board` is for those of one host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from epcomm import routing
from epcomm.board import Call, check_agreement
from epcomm.engines.node_group import NodeGroup
from epcomm.errors import CommTimeout
from epcomm.group import Group
from epcomm.topology import Topology

#: Words of a header before the counts: the call, and its values.
_CALL_WORDS = 24


class RailBoard:
    """Keeps ranks in step, and holds them to the same arguments.

    Args:
        rail_group: The ranks of this rank's rail, by node.
        node_group: The ranks of this rank's node.
        topology: The nodes.
        timeout_s: Deadline of the wait for the rail, in seconds.
        grace_s: By so much longer it waits for its node.
    """

    def __init__(
        self,
        rail_group: Group,
        node_group: NodeGroup,
        topology: Topology,
        timeout_s: float,
        grace_s: float,
    ) -> None:
        self._rail_group, self._node_group = rail_group, node_group
        self._topology = topology
        self._rail, self._ranks = topology.rail(), topology.ranks_of(topology.node)
        self._timeout_s, self._grace_s = timeout_s, grace_s

    def agree(
        self, call: Call, values: Mapping[str, int], counts: npt.NDArray[Any] | None = None
    ) -> tuple[dict[str, routing.Ints], routing.Ints]:
        """Exchange values and counts; hold all ranks to the same arguments. Collective.

        First along the rail, then inside the node: a rank exchanges messages with as many ranks as
        there are nodes, and ranks of a node.

        Returns:
            Each value ``[num_ranks]`` by name, and the counts ``[num_ranks, num_ranks]``.
        """
        num_ranks = len(self._topology.node_of_rank)
        names = call.agreed + call.own
        header = np.zeros(_CALL_WORDS + num_ranks, np.int64)
        header[: 1 + len(names)] = call.code, *(values[name] for name in names)
        if counts is not None:
            header[_CALL_WORDS:] = counts
        phase = f"{call.name}: arrival"
        on_rail = self._hear_rail(header)
        by_index = self._hear_node(on_rail, phase)
        headers = np.empty((num_ranks, len(header)), np.int64)
        for rank, of_rail in zip(self._ranks, by_index, strict=True):
            if isinstance(of_rail, list):
                is_mine = rank == self._topology.rank
                detail = "" if is_mine else f"rank {rank} of this node gave up waiting for it"
                raise CommTimeout(phase, self._topology.rank, of_rail, self._timeout_s, detail)
        for index, of_rail in enumerate(by_index):
            for node, one in enumerate(of_rail):
                headers[self._topology.ranks_of(node)[index]] = one
        check_agreement(call, range(num_ranks), headers)
        by_name = {name: headers[:, 1 + i] for i, name in enumerate(names)}
        return by_name, headers[:, _CALL_WORDS:]

    def _hear_rail(self, header: routing.Ints) -> npt.NDArray[Any] | list[int]:
        """Return the headers of the rail by node, or the ranks that did not come."""
        try:
            # The phase is the same whatever the call is: ranks that make different ones must meet.
            said = self._rail_group.allgather(
                header, timeout_s=self._timeout_s, phase="rails: arrival"
            )
        except CommTimeout as error:
            return [self._rail[node] for node in error.peers]
        return np.stack(said)

    def _hear_node(self, mine: Any, phase: str) -> list[Any]:
        try:
            return self._node_group.allgather(
                mine, timeout_s=self._timeout_s + self._grace_s, phase="rails: arrival in the node"
            )
        except CommTimeout as error:
            raise CommTimeout(phase, error.rank, error.peers, error.timeout_s) from None
