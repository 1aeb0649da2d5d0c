"""Compiling with CuPy at run time, and the same compiler without a GPU."""

from __future__ import annotations

import fcntl
import threading
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

from epcomm.env import kernel_cache_dir
from epcomm.errors import CompileError
from epcomm.gpus import current_gpu
from epcomm.jit.kernels import KernelSpec
from epcomm.jit.sources import source_dir, source_hash

#: What every kernel may use without asking.
_DEFAULT_SHARED_BYTES = 48 * 1024


class _Loaded(NamedTuple):
    """A kernel on a device.

    Attributes:
        function: What launches name it by.
        shared_bytes: Dynamic shared memory that a block may have.
        kernel: A cupy.RawKernel; the function is there as long as it is.
    """

    function: int
    shared_bytes: int
    kernel: Any


_lock = threading.Lock()
#: By device and spec; for good, as captured graphs may name any.
_loaded: dict[tuple[int, KernelSpec], _Loaded] = {}


def options_for(spec: KernelSpec) -> tuple[str, ...]:
    """Return the compiler's options for a kernel, architecture apart."""
    # Unsigned, as all that they are compared with in the kernels.
    defines = tuple(f"-D{name}={value}u" for name, value in spec.constants)
    # NOTE: CuPy's cache does not see headers found by -I; the hash of all sources is the key.
    return (
        "--std=c++17",
        f"-I{source_dir()}",
        f"-DEPCOMM_SOURCE_{source_hash()}",
        *defines,
    )


def load_function(spec: KernelSpec, shared_bytes: int) -> int:
    """Return the handle of a kernel for the current device, compiled where no cache has it.

    Args:
        spec: The kernel.
        shared_bytes: Dynamic shared memory of a block that it must be allowed.

    Raises:
        CompileError: The compiler refused; the message holds its log.
    """
    key = (current_gpu(), spec)
    loaded = _loaded.get(key)
    if loaded is None or loaded.shared_bytes < shared_bytes:
        with _lock, one_process_compiles(spec):
            loaded = _load(spec, max(shared_bytes, _DEFAULT_SHARED_BYTES), _loaded.get(key))
            _loaded[key] = loaded
    return loaded.function


def _load(spec: KernelSpec, shared_bytes: int, before: _Loaded | None) -> _Loaded:
    """Return a kernel whose blocks may have so much shared memory; more, if they might before."""
    kernel = _compile(spec) if before is None else before.kernel
    if before is not None:
        shared_bytes = max(shared_bytes, before.shared_bytes)
    kernel.max_dynamic_shared_size_bytes = shared_bytes
    return _Loaded(int(kernel.kernel.ptr), shared_bytes, kernel)


@contextmanager
def one_process_compiles(spec: KernelSpec) -> Iterator[None]:
    """Keep other processes waiting for this kernel, which they find in CuPy's disk cache then.

    Where the cache's folder cannot be written, every process compiles for itself.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            folder = kernel_cache_dir()
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((folder / "epcomm.lock").open("a"))
            # A byte of the file for each kernel; until it is closed, or this process ends.
            at = zlib.crc32(repr((spec.name, spec.constants)).encode())
            fcntl.lockf(file, fcntl.LOCK_EX, 1, at)
        yield


def _compile(spec: KernelSpec) -> Any:
    import cupy

    code = (source_dir() / "kernels" / f"{spec.name}.cu").read_text()
    # No name_expressions: CuPy finds extern "C" kernels in its disk cache every time.
    module = cupy.RawModule(code=code, options=options_for(spec), backend="nvrtc")
    try:
        return module.get_function(spec.function)
    except cupy.cuda.compiler.CompileException as error:
        constants = ", ".join(f"{name}={value}" for name, value in spec.constants)
        raise CompileError(
            f"kernel {spec.name}.cu did not compile with {constants}:\n{error}\nIs the CUDA "
            "toolkit of CuPy's wheel complete? pip install 'epcomm[cuda12]' or 'epcomm[cuda13]'."
        ) from error
