"""The call contract on the host engine, NumPy arrays: 1 to 8 ranks, as threads and as processes."""

from __future__ import annotations

from collections.abc import Callable

import contract
import pytest
from launch import Result

LAUNCHES = [
    pytest.param(program, num_ranks, id=f"{program.removeprefix('contract_')}-{num_ranks}")
    for program in contract.PROGRAMS
    for num_ranks in range(1, 9)
]


@pytest.mark.parametrize(("program", "num_ranks"), LAUNCHES)
def test_with_ranks_as_threads(program: str, num_ranks: int) -> None:
    contract.run_as_threads(program, num_ranks)


@pytest.mark.parametrize(("program", "num_ranks"), LAUNCHES)
def test_under_mpi_with_the_same_bits(
    mpiexec: Callable[..., Result], program: str, num_ranks: int
) -> None:
    digests = contract.run_under_mpi(mpiexec, program, num_ranks)
    assert digests == contract.run_as_threads(program, num_ranks)


def test_digests_tell_ranks_apart() -> None:
    """Equal digests mean something: other inputs give others, the same inputs the same."""
    digests = contract.run_as_threads("contract_training", 3)
    assert len(set(digests)) == 3
    assert contract.run_as_threads.__wrapped__("contract_training", 3) == digests
