"""What CUDA is told at a launch: a driver stands in that reads arguments as CUDA does."""

from __future__ import annotations

import ctypes
import threading
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from epcomm import gpus
from epcomm.jit import compile as jit_compile
from epcomm.jit import launch as jit_launch
from epcomm.jit.kernels import KernelSpec

SPEC = KernelSpec("kernel", (("kSize", 4),))
STREAM = SimpleNamespace(ptr=77)
NUM_THREADS = 4
ARGUMENT_BYTES = 24
KIB = 1024


class FakeKernel:
    """Stands for a cupy.RawKernel.

    Attributes:
        kernel: Its function; each is another one.
    """

    def __init__(self, number: int) -> None:
        self.kernel = SimpleNamespace(ptr=number)
        self.max_dynamic_shared_size_bytes = 0


class FakeCupy:
    """Stands for CuPy.

    Attributes:
        device: The GPU that is current in all threads.
        with_context: Threads in which a context is current.
        launches: What launches told, and the argument.
        kernels: What was compiled.
        meeting: Where launches wait for one another, once CUDA has been called.
    """

    def __init__(self) -> None:
        self.device = 0
        self.with_context: set[int] = set()
        self.launches: list[tuple[int | bytes, ...]] = []
        self.kernels: list[FakeKernel] = []
        self.meeting = threading.Barrier(1)
        self.cuda = SimpleNamespace(
            runtime=SimpleNamespace(getDevice=lambda: self.device, setDevice=self.set_device),
            driver=SimpleNamespace(launchKernel=self.launch_kernel),
        )

    def set_device(self, device: int) -> None:
        assert device == self.device
        self.with_context.add(threading.get_ident())

    def launch_kernel(self, *args: int) -> None:
        *told, pointers, extra = args
        assert threading.get_ident() in self.with_context
        assert extra == 0
        self.meeting.wait(10)
        pointer = ctypes.c_void_p.from_address(pointers).value
        assert pointer is not None
        self.launches.append((*told, ctypes.string_at(pointer, ARGUMENT_BYTES)))

    def compile(self, spec: KernelSpec) -> FakeKernel:
        self.kernels.append(FakeKernel(1000 + len(self.kernels)))
        return self.kernels[-1]


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeCupy:
    made = FakeCupy()
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    for module in (gpus, jit_launch):
        monkeypatch.setattr(module, "load_cupy", lambda: made)
    monkeypatch.setattr(jit_launch, "_threads", cache(jit_launch._Thread))
    monkeypatch.setattr(jit_compile, "_compile", made.compile)
    monkeypatch.setattr(jit_compile, "_loaded", {})
    return made


def launch(argument: bytes, shared_bytes: int = 0) -> None:
    grid = {"num_blocks": 20, "num_threads": 512, "shared_bytes": shared_bytes}
    jit_launch.launch(SPEC, stream=STREAM, params=argument, **grid)


def test_cuda_finds_the_argument(cupy: FakeCupy) -> None:
    arguments = [bytes([number] * ARGUMENT_BYTES) for number in (1, 2)]
    for argument in arguments:
        launch(argument, 100)
    told = (1000, 20, 1, 1, 512, 1, 1, 100, STREAM.ptr)
    assert cupy.launches == [(*told, argument) for argument in arguments]
    assert len(cupy.kernels) == 1


def test_threads_launch_at_the_same_time(cupy: FakeCupy) -> None:
    """CUDA may read an argument when other threads have set theirs; each has a context."""
    cupy.meeting = threading.Barrier(NUM_THREADS)
    arguments = [bytes([number] * ARGUMENT_BYTES) for number in range(NUM_THREADS)]
    threads = [threading.Thread(target=launch, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(launched[-1] for launched in cupy.launches) == arguments
    assert len(cupy.kernels) == 1


def test_blocks_get_more_shared_memory_without_another_compilation(cupy: FakeCupy) -> None:
    for shared_kib, allowed_kib in ((0, 48), (64, 64), (200, 200), (100, 200)):
        launch(bytes(ARGUMENT_BYTES), shared_kib * KIB)
        (kernel,) = cupy.kernels
        assert kernel.max_dynamic_shared_size_bytes == allowed_kib * KIB


def test_threads_that_need_different_shared_memory_get_the_most(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second waits until the first has compiled, and takes nothing from it."""
    second = threading.Thread(target=launch, args=(bytes(ARGUMENT_BYTES), 64 * KIB))

    def compile_first(spec: KernelSpec) -> FakeKernel:
        second.start()
        time.sleep(0.1)
        return cupy.compile(spec)

    monkeypatch.setattr(jit_compile, "_compile", compile_first)
    launch(bytes(ARGUMENT_BYTES), 200 * KIB)
    second.join()
    assert [kernel.max_dynamic_shared_size_bytes for kernel in cupy.kernels] == [200 * KIB]
    assert len(cupy.launches) == 2


def test_each_gpu_has_functions_of_its_own(cupy: FakeCupy) -> None:
    for cupy.device in (0, 1, 0):
        launch(bytes(ARGUMENT_BYTES))
    assert [launched[0] for launched in cupy.launches] == [1000, 1001, 1000]
