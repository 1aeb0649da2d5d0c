"""GPU arrays that are copied through host memory: no peer access is needed, nor one node."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import contract
import numpy as np
import pytest
from gpus import ON_CPU, PROGRAMS, Digests, digests_in, frames, gpus_up_to, need
from launch import Result, run_threads_of

from epcomm import Buffer, InvalidArgument, SingleGroup, UnsupportedConfig

Mpiexec = Callable[..., Result]

TIMEOUT_S = 170.0
pytestmark = pytest.mark.timeout(180)
kinds = pytest.mark.parametrize("kind", list(PROGRAMS))
streamed = pytest.mark.parametrize("frame", ["cupy", "torch-cuda"])


def want(frame: str, kind: str) -> Digests:
    """Return the digests of two ranks with arrays in CPU memory, in this process."""
    return {name: contract.run_as_threads(name, 2, ON_CPU[frame]) for name in PROGRAMS[kind]}


def check_two_ranks(mpiexec: Mpiexec, frame: str, kind: str, env: dict[str, str]) -> None:
    need(frame)
    arguments = (frame, "--engine", "staged", *PROGRAMS[kind])
    result = mpiexec("gpu_contract", 2, *arguments, timeout_s=TIMEOUT_S, env=env)
    assert digests_in(result, kind, 2) == want(frame, kind)


@pytest.mark.gpu(1)
@kinds
@frames
def test_two_ranks_on_one_gpu(mpiexec: Mpiexec, frame: str, kind: str) -> None:
    check_two_ranks(mpiexec, frame, kind, {"CUDA_VISIBLE_DEVICES": gpus_up_to(1)})


@pytest.mark.gpu(2)
@kinds
@pytest.mark.parametrize("frame", ["cupy"])
def test_two_gpus(mpiexec: Mpiexec, frame: str, kind: str) -> None:
    check_two_ranks(mpiexec, frame, kind, {})


@pytest.mark.gpu(1)
@kinds
@pytest.mark.parametrize("frame", ["cupy"])
def test_threads_on_the_default_stream(frame: str, kind: str) -> None:
    need(frame)
    arguments = (frame, "--threads", 2, "--engine", "staged", *PROGRAMS[kind])
    result = run_threads_of("gpu_contract", 2, *arguments, timeout_s=TIMEOUT_S)
    assert digests_in(result, kind, 2) == want(frame, kind)


@pytest.mark.gpu(1)
def test_between_nodes(mpiexec: Mpiexec) -> None:
    arguments = ("cupy", "--engine", "staged", *PROGRAMS["throughput"])
    mpiexec("gpu_contract", 4, *arguments, timeout_s=TIMEOUT_S, env={"EPCOMM_RANKS_PER_NODE": "2"})


@pytest.mark.gpu(1)
@pytest.mark.parametrize("options", [[], ["--wait-elsewhere"]], ids=["same", "elsewhere"])
@streamed
def test_consumers_behind_the_event(mpiexec: Mpiexec, frame: str, options: list[str]) -> None:
    need(frame)
    arguments = (frame, "--engine", "staged", "--rounds", 200, *options)
    mpiexec("gpu_streams", 2, *arguments, timeout_s=TIMEOUT_S)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("frame", ["cupy"])
def test_random_rounds(mpiexec: Mpiexec, frame: str) -> None:
    need(frame)
    arguments = ("--frame", frame, "--engine", "staged", "--seconds", 10)
    mpiexec("gpu_soak", 2, *arguments, timeout_s=TIMEOUT_S)


@pytest.fixture
def buffer() -> Iterator[Buffer]:
    made = Buffer(SingleGroup(), engine="host", device=0)
    yield made
    made.destroy()


@pytest.mark.gpu(1)
def test_a_capture_is_refused_and_goes_on(buffer: Buffer) -> None:
    import cupy

    with cupy.cuda.Device(0), cupy.cuda.Stream(non_blocking=True) as stream:
        idx, sums = cupy.zeros((4, 1), np.int64), cupy.zeros(3)
        sums += 1  # compiles
        stream.synchronize()
        stream.begin_capture()
        try:
            with pytest.raises(UnsupportedConfig, match="CUDA graph"):
                buffer.get_dispatch_layout(idx, 1)
            sums += 1
        finally:
            graph = stream.end_capture()
        graph.launch(stream)
        assert sums.get().tolist() == [2.0] * 3
        per_rank, *_ = buffer.get_dispatch_layout(idx, 1)
        assert per_rank.get().tolist() == [4]


@pytest.mark.gpu(1)
def test_arrays_in_cpu_memory_are_told_the_remedy(buffer: Buffer) -> None:
    idx = np.zeros((4, 1), np.int64)
    with pytest.raises(InvalidArgument, match="EPCOMM_ENGINE=host"):
        buffer.get_dispatch_layout(idx, 1)
    on_cpu = Buffer(SingleGroup(), engine="host")
    assert on_cpu.get_dispatch_layout(idx, 1)[0].tolist() == [4]
    on_cpu.destroy()


@pytest.mark.gpu(1)
def test_names(buffer: Buffer) -> None:
    assert "host+staged engine" in repr(buffer)
    auto = Buffer(SingleGroup(), engine="auto")
    assert "cuda engine" in repr(auto)
    auto.destroy()
