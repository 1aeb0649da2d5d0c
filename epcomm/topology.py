"""Which ranks share a node."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from epcomm.env import Settings
from epcomm.errors import RankMismatch, UnsupportedConfig
from epcomm.group import Group


@dataclass(frozen=True)
class Topology:
    """The nodes of a group.

    Attributes:
        rank: This rank.
        node_of_rank: Node index of every rank; nodes are numbered by their lowest rank.
    """

    rank: int
    node_of_rank: tuple[int, ...]

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return max(self.node_of_rank) + 1

    @property
    def node(self) -> int:
        """This rank's node."""
        return self.node_of_rank[self.rank]

    def ranks_of(self, node: int) -> tuple[int, ...]:
        """Return the ranks of a node, ascending."""
        return tuple(rank for rank, other in enumerate(self.node_of_rank) if other == node)

    def nodes_after(self) -> list[int]:
        """Return the other nodes in turn: those of larger index, then the smaller ones."""
        return [(self.node + k) % self.num_nodes for k in range(1, self.num_nodes)]

    def nodes_before(self) -> list[int]:
        """Return the other nodes in the opposite order."""
        return self.nodes_after()[::-1]

    def rail(self) -> tuple[int, ...]:
        """Return, by node, the rank that has this rank's index there.

        Raises:
            UnsupportedConfig: Some nodes have more ranks than others.
        """
        nodes = [self.ranks_of(node) for node in range(self.num_nodes)]
        odd = [node for node, ranks in enumerate(nodes) if len(ranks) != len(nodes[0])]
        if odd:
            shown = ", ".join(
                f"node {node} has {len(nodes[node])} {nodes[node]}" for node in (0, *odd[:8])
            )
            raise UnsupportedConfig(
                f"nodes have different numbers of ranks: {shown}. Rows cross between ranks of the "
                "same index in their nodes, so all nodes must have as many: start as many on each."
            )
        index = nodes[self.node].index(self.rank)
        return tuple(ranks[index] for ranks in nodes)

    def split_by_node(self, group: Group) -> Group:
        """Return the group of this rank's node. Collective."""
        return group.split(self.node)


def host_identity() -> str:
    """Return what is the same for all ranks of this host, and for no rank of another.

    Not the host's name where there is better: containers of one host have names of their own.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def from_hosts(rank: int, hosts: Sequence[str], ranks_per_node: Sequence[int | None]) -> Topology:
    """Make the topology from what every rank says of itself.

    Args:
        rank: This rank.
        hosts: `host_identity` of every rank.
        ranks_per_node: ``Settings.ranks_per_node`` of every rank; overrides the hosts.

    Raises:
        RankMismatch: The ranks disagree on EPCOMM_RANKS_PER_NODE.
    """
    if len(set(ranks_per_node)) > 1:
        shown = ", ".join(f"rank {i} has {n}" for i, n in enumerate(ranks_per_node))
        raise RankMismatch(
            f"EPCOMM_RANKS_PER_NODE differs: {shown}. Set it to the same value on every rank."
        )
    if ranks_per_node[0] is not None:
        return Topology(rank, tuple(i // ranks_per_node[0] for i in range(len(hosts))))
    names = list(dict.fromkeys(hosts))
    return Topology(rank, tuple(names.index(host) for host in hosts))


def discover(group: Group, settings: Settings, timeout_s: float | None = None) -> Topology:
    """Find the nodes of a group. Collective.

    Args:
        group: The ranks.
        settings: This rank's.
        timeout_s: Deadline in seconds; None takes EPCOMM_TIMEOUT_S.
    """
    said = group.allgather(
        (host_identity(), settings.ranks_per_node),
        timeout_s=timeout_s,
        phase="finding the nodes",
    )
    return from_hosts(group.rank, [host for host, _ in said], [ranks for _, ranks in said])
