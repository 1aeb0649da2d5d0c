"""The call contract on the cuda engine: CuPy, torch and JAX arrays, on 1 to 4 GPUs.

The digest of a rank is that of all outputs' bits, so it must not depend on how ranks are started,
on the framework, or on the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import contract
import pytest
from gpus import ON_CPU, PROGRAMS, Digests, digests_in, frames, gpus_up_to, need
from launch import Result, run_threads_of

TIMEOUT_S = 85.0


def runs(**sizes: tuple[int, ...]) -> pytest.MarkDecorator:
    """Parametrize with a kind of programs and a number of ranks."""
    kinds = {name.replace("_", "-"): numbers for name, numbers in sizes.items()}
    params = [
        pytest.param(kind, n, marks=pytest.mark.gpu(n), id=f"{kind}-{n}")
        for kind, numbers in kinds.items()
        for n in numbers
    ]
    return pytest.mark.parametrize(("kind", "num_ranks"), params)


pytestmark = pytest.mark.timeout(90)


@cache
def on_threads(frame: str, kind: str, num_ranks: int, num_gpus: int = 0) -> Digests:
    """Run all programs with ranks as threads of a new process; on all GPUs, or on some.

    As many blocks as calls ask for fit on a GPU for 6 ranks.
    """
    arguments = (frame, "--threads", num_ranks, *PROGRAMS[kind])
    # One queue for each stream: kernels of one rank must not stand behind those of another.
    env = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    if num_gpus:
        env["CUDA_VISIBLE_DEVICES"] = gpus_up_to(num_gpus)
    result = run_threads_of("gpu_contract", num_ranks, *arguments, timeout_s=TIMEOUT_S, env=env)
    return digests_in(result, kind, num_ranks)


def want(frame: str, kind: str, num_ranks: int) -> Digests:
    """Return the digests that the host engine gives, in this process."""
    if frame == "jax-cuda" and num_ranks != 2:
        return on_threads(frame, kind, num_ranks)  # JAX is slow on the CPU: one size will do
    programs = PROGRAMS[kind]
    return {name: contract.run_as_threads(name, num_ranks, ON_CPU[frame]) for name in programs}


@runs(throughput=(1, 2, 3, 4), low_latency=(1, 2, 3))
@frames
def test_with_ranks_as_threads(frame: str, kind: str, num_ranks: int) -> None:
    need(frame)
    assert on_threads(frame, kind, num_ranks) == want(frame, kind, num_ranks)


@runs(throughput=(1, 2, 3, 4), low_latency=(2, 4))
@frames
def test_under_mpi_with_the_same_bits(
    mpiexec: Callable[..., Result], frame: str, kind: str, num_ranks: int
) -> None:
    need(frame)
    result = mpiexec("gpu_contract", num_ranks, frame, *PROGRAMS[kind], timeout_s=TIMEOUT_S)
    assert digests_in(result, kind, num_ranks) == want(frame, kind, num_ranks)


@pytest.mark.parametrize(
    ("frame", "num_gpus", "num_ranks"),
    [
        pytest.param(frame, num_gpus, num_ranks, marks=pytest.mark.gpu(num_gpus))
        for frame, num_gpus, num_ranks in (
            *((frame, 1, 2) for frame in ON_CPU),
            ("cupy", 2, 3),
        )
    ],
)
@pytest.mark.parametrize("kind", list(PROGRAMS))
def test_ranks_that_share_gpus(
    mpiexec: Callable[..., Result], kind: str, frame: str, num_gpus: int, num_ranks: int
) -> None:
    """Processes take turns on a GPU, so every wait for a peer lasts a time slice."""
    need(frame)
    env = {"CUDA_VISIBLE_DEVICES": gpus_up_to(num_gpus)}
    arguments = ("gpu_contract", num_ranks, frame, *PROGRAMS[kind])
    result = mpiexec(*arguments, timeout_s=TIMEOUT_S, env=env)
    assert digests_in(result, kind, num_ranks) == want(frame, kind, num_ranks)


@pytest.mark.gpu(1)
@pytest.mark.parametrize(
    ("frame", "num_ranks"), [("cupy", 2), ("cupy", 4), ("cupy", 6), ("torch-cuda", 3)]
)
@pytest.mark.parametrize("kind", list(PROGRAMS))
def test_threads_that_share_a_gpu(frame: str, kind: str, num_ranks: int) -> None:
    need(frame)
    assert on_threads(frame, kind, num_ranks, 1) == want(frame, kind, num_ranks)
