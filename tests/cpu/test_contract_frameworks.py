"""The call contract with torch and JAX arrays on the CPU: the same bits, in the same framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import contract
import ml_dtypes
import numpy as np
import pytest
from launch import Result

from epcomm import Buffer, Group, run_threads


@pytest.mark.parametrize("frame", ["torch", "jax", "jax64"])
@pytest.mark.parametrize("program", contract.PROGRAMS)
def test_with_two_ranks_as_threads(program: str, frame: str) -> None:
    contract.need(frame)
    contract.run_as_threads(program, 2, frame)


@pytest.mark.parametrize("frame", ["torch", "jax"])
@pytest.mark.parametrize("num_ranks", [1, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("program", contract.PROGRAMS)
def test_with_other_numbers_of_ranks(program: str, num_ranks: int, frame: str) -> None:
    contract.need(frame)
    contract.run_as_threads(program, num_ranks, frame)


@pytest.mark.parametrize("program", contract.PROGRAMS)
def test_torch_and_numpy_get_the_same_bits(program: str) -> None:
    contract.need("torch")
    assert contract.run_as_threads(program, 2, "torch") == contract.run_as_threads(program, 2)


@pytest.mark.parametrize("frame", ["torch", "jax"])
@pytest.mark.parametrize("program", contract.PROGRAMS)
def test_under_mpi_with_the_same_bits(
    mpiexec: Callable[..., Result], program: str, frame: str
) -> None:
    contract.need(frame)
    digests = contract.run_under_mpi(mpiexec, program, 2, frame)
    assert digests == contract.run_as_threads(program, 2, frame)


def test_torch_inputs_that_require_grad() -> None:
    """Under no_grad they are taken like others, and what comes out requires none."""
    torch = pytest.importorskip("torch", reason="torch is not installed")

    def run(group: Group) -> None:
        buffer = Buffer(group, engine="host", timeout_s=30)
        x = torch.full((4, 16), group.rank + 1.0, dtype=torch.bfloat16, requires_grad=True)
        weights = torch.ones((4, 2), requires_grad=True)
        idx = torch.tensor([[0, 1]] * 4)
        with torch.no_grad():
            recv_x, _, recv_weights, _, handle, _ = buffer.dispatch(
                x, topk_idx=idx, topk_weights=weights, num_experts=2
            )
            combined_x, combined_weights, _ = buffer.combine(recv_x, handle, recv_weights)
        for array in (recv_x, recv_weights, combined_x, combined_weights):
            assert not array.requires_grad
        assert torch.equal(combined_x, 2 * x.detach())
        assert torch.equal(combined_weights, weights.detach())
        buffer.destroy()

    run_threads(run, 2)


def test_jax_64_bits_in_one_thread_only() -> None:
    """``jax.enable_x64`` holds in a thread; outputs follow the thread that calls."""
    jax = pytest.importorskip("jax", reason="jax is not installed")

    def run(group: Group) -> Any:
        buffer = Buffer(group, engine="host", timeout_s=30)
        with jax.enable_x64(True):
            idx = jax.numpy.zeros((3, 1), "int64")
            x = jax.numpy.ones((3, 16), ml_dtypes.bfloat16)
            weights = jax.numpy.ones((3, 1), "float32")
            _, recv_idx, *_ = buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_experts=1)
        buffer.destroy()
        return recv_idx

    (recv_idx,) = run_threads(run, 1)
    assert isinstance(recv_idx, jax.Array)
    assert recv_idx.dtype == np.int64
