"""Between nodes: the call contract, chunks of any size, and nodes that are late or gone.

One host is split into nodes with EPCOMM_RANKS_PER_NODE; then nodes share no slab, and their rows
cross by MPI.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import contract
import pytest
from launch import Result

Mpiexec = Callable[..., Result]

#: Ranks, and how many of them count as a node.
NODES = [(4, 2), (4, 1), (6, 3), (6, 2), (8, 4)]
PROGRAMS = ("contract_dispatch", "contract_buffers", "contract_training")


def between_nodes(
    mpiexec: Mpiexec, program: str, num_ranks: int, ranks_per_node: int, *args: Any, **options: Any
) -> Result:
    env = {"EPCOMM_RANKS_PER_NODE": str(ranks_per_node)}
    return mpiexec(program, num_ranks, *args, env=env, **options)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), NODES)
def test_contract(mpiexec: Mpiexec, program: str, num_ranks: int, ranks_per_node: int) -> None:
    contract.run_under_mpi(
        *(mpiexec, program, num_ranks), programs=PROGRAMS, ranks_per_node=ranks_per_node
    )


@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), [(2, 1), (3, 1), (4, 2), (6, 3)])
def test_chunks_and_traffic(mpiexec: Mpiexec, num_ranks: int, ranks_per_node: int) -> None:
    between_nodes(mpiexec, "contract_rails", num_ranks, ranks_per_node)


def test_ranks_of_nodes_in_turn(mpiexec: Mpiexec) -> None:
    mpiexec("contract_rails", 4)


@pytest.mark.parametrize("place", ["routes", "rows", "sums"])
def test_slow_node_is_waited_for(mpiexec: Mpiexec, place: str) -> None:
    between_nodes(mpiexec, "rails_fail", 4, 2, "slow", place, timeout_s=30)


@pytest.mark.parametrize("place", ["routes", "rows", "sums"])
def test_stuck_node_ends_the_others(mpiexec: Mpiexec, place: str) -> None:
    between_nodes(mpiexec, "rails_fail", 4, 2, "stuck", place, timeout_s=30)


@pytest.mark.parametrize("place", ["routes", "rows", "sums"])
def test_a_refusal_in_the_middle_of_a_call_breaks_the_buffer(mpiexec: Mpiexec, place: str) -> None:
    between_nodes(mpiexec, "rails_fail", 4, 2, "refuses", place, timeout_s=30)


@pytest.mark.parametrize("who", ["node", "rank"])
def test_absent_ranks_are_named(mpiexec: Mpiexec, who: str) -> None:
    between_nodes(mpiexec, "rails_fail", 4, 2, "absent", who, timeout_s=30)


@pytest.mark.parametrize("place", ["routes", "rows", "sums"])
def test_killed_node_ends_the_others(mpiexec: Mpiexec, place: str) -> None:
    result = between_nodes(
        *(mpiexec, "rails_fail", 4, 2, "killed", place),
        timeout_s=30,
        check=False,
        outlives_s=5,
    )
    assert result.ok_ranks() == [0, 1], result


def test_unequal_nodes_are_refused(mpiexec: Mpiexec) -> None:
    between_nodes(mpiexec, "rails_fail", 4, 3, "unequal", timeout_s=30)


def test_low_latency_calls_are_refused(mpiexec: Mpiexec) -> None:
    between_nodes(mpiexec, "rails_fail", 4, 2, "refused", timeout_s=30)


@pytest.mark.parametrize(
    ("kind", "num_ranks", "ranks_per_node", "pointers"),
    [("torch", 4, 2, 0), ("torch", 4, 1, 1), ("cupy", 6, 2, 0), ("jax", 4, 2, 1)],
)
def test_contract_with_rows_on_gpus(
    mpiexec: Mpiexec, kind: str, num_ranks: int, ranks_per_node: int, pointers: int
) -> None:
    """The moves of GPU rows, on GPUs that are none; see ranks/fake_gpu.py."""
    env = {
        "EPCOMM_RANKS_PER_NODE": str(ranks_per_node),
        "EPCOMM_MPI_DEVICE_POINTERS": str(pointers),
    }
    mpiexec("fake_gpu", num_ranks, kind, "--rails", *PROGRAMS, env=env)


@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), [(4, 2), (3, 1), (6, 2)])
def test_rows_on_gpus_take_what_is_planned(
    mpiexec: Mpiexec, num_ranks: int, ranks_per_node: int
) -> None:
    between_nodes(
        *(mpiexec, "fake_gpu", num_ranks, ranks_per_node, "torch", "--rails", "planned_rails")
    )


def test_ranks_of_nodes_in_turn_with_rows_on_gpus(mpiexec: Mpiexec) -> None:
    mpiexec("fake_gpu", 4, "torch", "--rails", "contract_rails")


@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), [(3, 1), (4, 2)])
def test_chunks_with_rows_on_gpus(mpiexec: Mpiexec, num_ranks: int, ranks_per_node: int) -> None:
    arguments = ("torch", "--rails", "contract_rails")
    between_nodes(mpiexec, "fake_gpu", num_ranks, ranks_per_node, *arguments)


@pytest.mark.parametrize("place", ["rows", "sums"])
@pytest.mark.parametrize("what", ["slow", "stuck"])
def test_late_node_with_rows_on_gpus(mpiexec: Mpiexec, what: str, place: str) -> None:
    between_nodes(mpiexec, "rails_fail", 4, 2, what, place, "--fake-gpus", timeout_s=30)
