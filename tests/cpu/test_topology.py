"""Which ranks share a node, and the environment variable that overrides it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from ranks import fail_common as common

from epcomm import Buffer, RankMismatch, SingleGroup, UnsupportedConfig, env, run_threads, topology
from epcomm.topology import Topology, discover, from_hosts, host_identity

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def ranks_per_node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Set EPCOMM_RANKS_PER_NODE for this test."""

    def set_to(text: str) -> None:
        monkeypatch.setenv("EPCOMM_RANKS_PER_NODE", text)
        env.settings.cache_clear()

    yield set_to
    monkeypatch.undo()
    env.settings.cache_clear()


def test_one_host_is_one_node() -> None:
    found = from_hosts(1, ["a", "a", "a"], [None] * 3)
    assert found == Topology(1, (0, 0, 0))
    assert (found.num_nodes, found.node, found.ranks_of(0)) == (1, 0, (0, 1, 2))


def test_nodes_are_numbered_by_their_lowest_rank() -> None:
    found = from_hosts(3, ["b", "a", "b", "c", "a"], [None] * 5)
    assert found.node_of_rank == (0, 1, 0, 2, 1)
    assert (found.num_nodes, found.node) == (3, 2)
    assert [found.ranks_of(node) for node in range(3)] == [(0, 2), (1, 4), (3,)]


@pytest.mark.parametrize(
    ("count", "nodes"),
    [(1, (0, 1, 2, 3, 4)), (2, (0, 0, 1, 1, 2)), (3, (0, 0, 0, 1, 1)), (9, (0, 0, 0, 0, 0))],
)
def test_number_goes_before_hosts(count: int, nodes: tuple[int, ...]) -> None:
    assert from_hosts(0, ["a", "b", "a", "b", "a"], [count] * 5).node_of_rank == nodes


def test_ranks_that_disagree_on_the_number() -> None:
    with pytest.raises(RankMismatch) as caught:
        from_hosts(0, ["a"] * 3, [2, 2, 4])
    assert "rank 0 has 2, rank 1 has 2, rank 2 has 4" in str(caught.value)


def test_this_host_is_one_node() -> None:
    assert host_identity() == host_identity()
    assert host_identity().strip()

    def fn(group: Any) -> Topology:
        return discover(group, env.Settings())

    assert run_threads(fn, 3) == [Topology(rank, (0, 0, 0)) for rank in range(3)]


def test_hosts_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that name different hosts are in different nodes, and no Buffer spans them."""
    import threading

    def host_of_thread() -> str:
        return "host " + threading.current_thread().name[-1]

    monkeypatch.setattr(topology, "host_identity", host_of_thread)

    def fn(group: Any) -> str:
        assert discover(group, env.Settings()).node_of_rank == (0, 1, 2)
        with pytest.raises(UnsupportedConfig) as caught:
            Buffer(group, timeout_s=5.0)
        return str(caught.value)

    for message in run_threads(fn, 3):
        assert "spans 3 nodes (0, 1, 2)" in message


def test_rail() -> None:
    hosts = ["a", "b", "a", "c", "b", "c"]
    assert [from_hosts(rank, hosts, [None] * 6).rail() for rank in range(6)] == [
        *((0, 1, 3), (0, 1, 3), (2, 4, 5), (0, 1, 3), (2, 4, 5), (2, 4, 5)),
    ]


def test_order_of_nodes() -> None:
    nodes = [from_hosts(rank, ["a"] * 4, [1] * 4) for rank in range(4)]
    assert nodes[1].nodes_after() == [2, 3, 0]
    assert nodes[1].nodes_before() == [0, 3, 2]
    # In each round as many messages leave a node as come: what one sends, the other receives.
    for mine in nodes:
        for k, node in enumerate(mine.nodes_after()):
            assert nodes[node].nodes_before()[k] == mine.node


def test_nodes_of_different_numbers_of_ranks_are_refused() -> None:
    with pytest.raises(UnsupportedConfig) as caught:
        from_hosts(0, ["a"] * 7, [3] * 7).rail()
    assert "node 0 has 3 (0, 1, 2), node 2 has 1 (6,)" in str(caught.value)
    assert "start as many on each" in str(caught.value)


def test_split_by_node() -> None:
    def fn(group: Any) -> tuple[int, int, int]:
        node = from_hosts(group.rank, ["a"] * 5, [2] * 5)
        part = node.split_by_node(group)
        found = part.allgather(group.rank)
        assert tuple(found) == node.ranks_of(node.node)
        return node.node, part.rank, part.size

    assert run_threads(fn, 5) == [(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2), (2, 0, 1)]


def test_threads_of_several_nodes_are_refused_and_one_buffer_a_node_works(
    ranks_per_node: Any,
) -> None:
    ranks_per_node("2")

    def fn(group: Any) -> str:
        with pytest.raises(UnsupportedConfig) as caught:
            Buffer(group, timeout_s=5.0)
        nodes = discover(group, env.settings())
        buffer = Buffer(nodes.split_by_node(group), timeout_s=5.0)
        assert (buffer.rank, buffer.group_size) == (group.rank % 2, 2)
        common.check_round(buffer, 0)
        common.check_low_latency_round(buffer, 1)
        return str(caught.value)

    (message,) = set(run_threads(fn, 4))
    assert "the group spans 2 nodes (0, 0, 1, 1)" in message
    assert "rows cross between nodes by MPI, which a ThreadGroup is not" in message
    assert "Pass an mpi4py communicator; or use one Buffer a node" in message
    assert "unset EPCOMM_RANKS_PER_NODE" in message


@pytest.mark.parametrize("text", ["3", "8"])
def test_number_that_makes_one_node(ranks_per_node: Any, text: str) -> None:
    ranks_per_node(text)

    def fn(group: Any) -> None:
        buffer = Buffer(group, timeout_s=5.0)
        assert buffer.get_dispatch_layout(common.make_inputs(0, 0, 3)[1], 6)[1] is None
        common.check_round(buffer, 0)

    run_threads(fn, 3)


def test_single_rank_is_one_node(ranks_per_node: Any) -> None:
    ranks_per_node("1")
    common.check_round(Buffer(SingleGroup()), 0)
