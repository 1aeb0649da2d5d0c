"""From the CUDA sources to libraries for the CPU."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from epcomm.jit.kernels import KernelSpec
from epcomm.jit.sources import source_dir

HERE = Path(__file__).parent
_RUNTIME = ("runtime.cpp", "copies.cpp")
_FLAGS = ("-std=c++20", "-g1", "-fPIC", "-shared", "-pthread", "-fmax-errors=3")
# NOTE: no contraction, as the kernels say what is rounded and when.
_KERNEL_FLAGS = ("-O1", "-ffp-contract=off", "-fvisibility=hidden")


class EmulatorError(RuntimeError):
    """A kernel did what no kernel may do: see `fail` in runtime.h."""


class Toolchain:
    """Compiles kernels, each once, and launches them.

    Args:
        cache: Folder where libraries stay for later runs.
        sources: The CUDA sources.
        is_sanitized: Whether ThreadSanitizer watches; it must be loaded before Python is.
    """

    def __init__(
        self, cache: Path, sources: Path | None = None, *, is_sanitized: bool = False
    ) -> None:
        self.sources = source_dir() if sources is None else sources
        self._cache = cache
        self._is_sanitized = is_sanitized
        self._kernels: dict[tuple[str, tuple[tuple[str, int], ...]], ctypes.CDLL] = {}
        self._lock = threading.Lock()

    def compile(self, specs: Iterable[KernelSpec]) -> None:
        """Compile kernels side by side."""
        _ = self._runtime
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self._kernel, specs))

    def launch(
        self,
        spec: KernelSpec,
        *,
        num_blocks: int,
        num_threads: int,
        params: npt.NDArray[np.void],
        shared_bytes: int = 0,
        seed: int,
        rank: int,
    ) -> None:
        """Run a kernel to its end.

        Args:
            spec: The kernel; compiled at its first use.
            num_blocks: Blocks of the grid; all run at once.
            num_threads: Threads of a block, a multiple of 32.
            params: The one by-value argument, zero-dimensional.
            shared_bytes: Dynamic shared memory of a block.
            seed: Draws the order of threads and copies.
            rank: Whose kernel it is; a rank's kernels run one after another.

        Raises:
            EmulatorError: This kernel, or one that runs beside it, did what no kernel may do.
        """
        runtime = self._runtime  # before any kernel, whose functions are found in it
        kernel = self._kernel(spec)
        message = runtime.emulator_launch(
            kernel.emulated_entry,
            kernel.emulated_shared_memory,
            params.ctypes.data_as(ctypes.c_void_p),
            num_blocks,
            num_threads,
            shared_bytes,
            ctypes.c_uint64(seed),
            rank,
        )
        if message is not None:
            raise EmulatorError(f"{spec.name}.cu: {message.decode()}")

    def stop(self) -> None:
        """End all launches, which raise `EmulatorError`."""
        self._runtime.emulator_stop()

    def reset(self) -> None:
        """Forget a failure; no launch may be running."""
        self._runtime.emulator_reset()

    @cached_property
    def _runtime(self) -> ctypes.CDLL:
        flags = ["-O2", *(["-DEMULATOR_TSAN"] if self._is_sanitized else [])]
        path = self._library("runtime", [*flags, *(str(HERE / name) for name in _RUNTIME)], HERE)
        # Kernels find the runtime's functions among the global ones.
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        library.emulator_launch.restype = ctypes.c_char_p
        return library

    def _kernel(self, spec: KernelSpec) -> ctypes.CDLL:
        key = spec.name, spec.constants
        with self._lock:
            if key in self._kernels:
                return self._kernels[key]
        flags = [
            *_KERNEL_FLAGS,
            *(["-fsanitize=thread"] if self._is_sanitized else []),
            f"-I{self.sources}",
            *("-include", "cuda_words.h"),
            f'-DEMULATED_SOURCE="kernels/{spec.name}.cu"',
            f"-DEMULATED_KERNEL={spec.function}",
            *(f"-D{name}={value}u" for name, value in spec.constants),
            str(HERE / "entry.cpp"),
        ]
        library = ctypes.CDLL(str(self._library(spec.name, flags, HERE, self.sources)))
        with self._lock:
            return self._kernels.setdefault(key, library)

    def _library(self, name: str, flags: Sequence[str], *inputs: Path) -> Path:
        """Compile a library unless the cache has it."""
        command = ["g++", *_FLAGS, f"-I{HERE / 'include'}", *flags]
        digest = hashlib.sha256(f"{_compiler_version()} {command}".encode())
        for folder in inputs:
            digest.update(_contents(folder))
        path = self._cache / f"{name}-{digest.hexdigest()[:20]}.so"
        if not path.exists():
            new = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
            done = subprocess.run([*command, "-o", str(new)], capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            new.rename(path)
        return path


@cache
def _compiler_version() -> str:
    command = ["g++", "-dumpfullversion"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _contents(folder: Path) -> bytes:
    paths = sorted(path for kind in ("h", "cpp", "cu", "cuh") for path in folder.rglob(f"*.{kind}"))
    return b"\0".join(str(path.relative_to(folder)).encode() + path.read_bytes() for path in paths)


def pointer(array: npt.NDArray[Any] | None) -> int:
    """Return an array's address, 0 for None."""
    return 0 if array is None else array.ctypes.data
