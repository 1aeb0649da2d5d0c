"""The frameworks that contract programs run with: NumPy data in, and what came out as NumPy.

Nothing else in tests/ranks knows a framework. To add one, or one's arrays on another device, write
a class like `NumpyFrame` and list it in `FRAMES`.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from epcomm.arrays import ArrayView

Array = npt.NDArray[Any]

#: How the scales of a pair may lie in memory.
MEMORY_ORDERS = ("rows", "columns", "gaps", "expanded")


def arrange(values: Array, order: str) -> Array:
    """Copy ``[num_rows, num_columns]`` into one of `MEMORY_ORDERS`; "expanded" repeats column 0."""
    if order == "columns":
        return np.array(values.T, order="C").T
    if order == "gaps":
        wide = np.zeros((values.shape[0], 2 * values.shape[1] + 1), values.dtype)
        wide[:, 1::2] = values
        return wide[:, 1::2]
    if order == "expanded":
        column = np.array(values[:, :1])
        steps = (column.strides[0], 0)
        return np.lib.stride_tricks.as_strided(column, values.shape, steps)
    return np.array(values, order="C")


class NumpyFrame:
    """NumPy arrays on the CPU. Inputs are read-only, so that writing one fails."""

    name = "numpy"
    #: Module and class of epcomm's adapter, whose outputs are poisoned.
    adapter = ("epcomm.frameworks.numpy", "NumpyFramework")
    #: Whether arrays can be written after they were returned.
    is_mutable = True
    #: Whether arrays tell their strides.
    has_strides = True

    def dtype(self, wanted: Any) -> np.dtype[Any]:
        """Return the dtype that arrays of this framework can have in place of a wanted one."""
        return np.dtype(wanted)

    def make(self, values: Array, order: str = "rows") -> Any:
        """Return an input with these values."""
        array = arrange(values, order)
        array.flags.writeable = False
        return array

    @property
    def writable(self) -> NumpyFrame:
        """The frame of arrays that epcomm or the caller writes: another one where not mutable."""
        return self

    def make_writable(self, values: Array) -> Any:
        """Return an array that epcomm is to write."""
        return np.array(values, order="C")

    def numpy(self, array: Any) -> Array:
        """Return the values."""
        return np.asarray(array)

    def owns(self, array: Any, dtype: np.dtype[Any]) -> bool:
        """Return whether an output of this dtype is of this framework, and on its device."""
        return type(array) is np.ndarray

    def strides(self, array: Any) -> tuple[int, ...]:
        """Return the strides in elements."""
        return tuple(step // array.dtype.itemsize for step in array.strides)

    def overwrite(self, array: Any) -> None:
        """Fill a writable array with poison, after what is queued on the current stream."""
        poison(self.numpy(array))

    def fill(self, array: Any, values: Array) -> None:
        """Write values into a writable array, after what is queued on the current stream."""
        self.numpy(array)[...] = values

    def synchronize(self) -> None:
        """Wait until all that this rank's device was given is done."""

    def set_up(self, rank: int) -> None:
        """Choose a rank's device, in the rank's own thread, before its first Buffer."""

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Set up the framework for arrays of this kind, in all threads, and restore it."""
        yield

    @contextmanager
    def own_stream(self) -> Iterator[None]:
        """Make a new stream the current one of this thread, where the framework can."""
        yield

    def gpu(self) -> int:
        """Return the number of the rank's GPU."""
        return _current_gpu()


class TorchFrame(NumpyFrame):
    """torch tensors on the CPU."""

    name = "torch"
    adapter = ("epcomm.frameworks.torch", "TorchFramework")

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._dtypes = {np.dtype(name): getattr(torch, name) for name in _SHARED_NAMES}
        self._dtypes[np.dtype(np.bool_)] = torch.bool

    def make(self, values: Array, order: str = "rows") -> Any:
        array = arrange(values, order)
        # torch.from_numpy knows no bf16 and no fp8: the bits go over as unsigned integers.
        raw = array.view(np.dtype(f"u{array.itemsize}"))
        return self._torch.from_numpy(raw).view(self._dtypes[array.dtype])

    def make_writable(self, values: Array) -> Any:
        return self.make(values)

    def numpy(self, array: Any) -> Array:
        dtype = {theirs: ours for ours, theirs in self._dtypes.items()}[array.dtype]
        raw = {1: self._torch.uint8, 2: self._torch.uint16, 4: self._torch.int32}
        bits = array.detach().view(raw.get(dtype.itemsize, self._torch.int64))
        return bits.numpy().view(dtype)

    def owns(self, array: Any, dtype: np.dtype[Any]) -> bool:
        return isinstance(array, self._torch.Tensor) and array.device.type == "cpu"

    def strides(self, array: Any) -> tuple[int, ...]:
        return tuple(array.stride())


class JaxFrame(NumpyFrame):
    """JAX arrays on the CPU, with 64-bit types or without."""

    name = "jax"
    adapter = ("epcomm.frameworks.jax", "JaxFramework")
    is_mutable = False
    has_strides = False
    has_x64 = False

    def __init__(self) -> None:
        import jax

        self._jax = jax

    def dtype(self, wanted: Any) -> np.dtype[Any]:
        dtype = np.dtype(wanted)
        if self.has_x64 or dtype.itemsize < 8:
            return dtype
        return np.dtype(f"{dtype.kind}4")

    def make(self, values: Array, order: str = "rows") -> Any:
        device = self._jax.devices("cpu")[0]
        return self._jax.device_put(arrange(values, order), device)

    @property
    def writable(self) -> NumpyFrame:
        return NumpyFrame()

    def make_writable(self, values: Array) -> Any:
        return self.writable.make_writable(values)

    def owns(self, array: Any, dtype: np.dtype[Any]) -> bool:
        if self.dtype(dtype) != dtype:
            return type(array) is np.ndarray  # JAX cannot hold it
        return isinstance(array, self._jax.Array) and {
            device.platform for device in array.devices()
        } == {"cpu"}

    def strides(self, array: Any) -> tuple[int, ...]:
        raise TypeError("JAX arrays have no strides")

    @contextmanager
    def in_use(self) -> Iterator[None]:
        before = self._jax.config.jax_enable_x64
        self._jax.config.update("jax_enable_x64", self.has_x64)
        try:
            yield
        finally:
            self._jax.config.update("jax_enable_x64", before)


class Jax64Frame(JaxFrame):
    """JAX arrays on the CPU with 64-bit types."""

    name = "jax64"
    has_x64 = True


# --- on GPUs ------------------------------------------------------------------------------------
# Ranks take GPUs in turn, so that several share one where there are fewer.


def choose_gpu(rank: int) -> int:
    """Make a rank's GPU current in this thread, and return its number."""
    import cupy

    index = rank % int(cupy.cuda.runtime.getDeviceCount())
    cupy.cuda.Device(index).use()
    return index


def _flat(values: Array, order: str) -> tuple[Array, int, tuple[int, ...]]:
    """Return the memory of an arranged array as one dimension, its first element, and strides."""
    arranged = arrange(values, order)
    steps = tuple(step // arranged.itemsize for step in arranged.strides)
    span = 1 + sum((extent - 1) * step for extent, step in zip(values.shape, steps, strict=True))
    raw = np.dtype(f"u{arranged.itemsize}")
    used = np.lib.stride_tricks.as_strided(arranged.view(raw), (span,), (raw.itemsize,))
    first = 1 if order == "gaps" else 0  # as `arrange` has it: not aligned to more than an element
    return np.concatenate([np.zeros(first, raw), used]), first, steps


class CupyFrame(NumpyFrame):
    """CuPy arrays on the rank's GPU. CuPy has no fp8: such rows travel as uint8."""

    name = "cupy"
    adapter = ("epcomm.frameworks.cupy", "CupyFramework")

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy

    def dtype(self, wanted: Any) -> np.dtype[Any]:
        dtype = np.dtype(wanted)
        return np.dtype(np.uint8) if "float8" in dtype.name else dtype

    def make(self, values: Array, order: str = "rows") -> Any:
        dtype = self.dtype(values.dtype)
        if values.size == 0:
            return self._cupy.empty(values.shape, dtype)
        if values.ndim != 2 or order == "rows":
            raw = np.ascontiguousarray(values).view(np.dtype(f"u{dtype.itemsize}"))
            return self._cupy.asarray(raw).view(dtype)
        flat, first, steps = _flat(values, order)
        strides = tuple(step * dtype.itemsize for step in steps)
        memory = self._cupy.asarray(flat).view(dtype)[first:]
        return self._cupy.lib.stride_tricks.as_strided(memory, values.shape, strides)

    def make_writable(self, values: Array) -> Any:
        return self.make(values)

    def numpy(self, array: Any) -> Array:
        if isinstance(array, np.ndarray):
            return array
        raw = np.dtype(f"u{array.dtype.itemsize}")
        return np.asarray(array.view(raw).get()).view(array.dtype)

    def owns(self, array: Any, dtype: np.dtype[Any]) -> bool:
        return isinstance(array, self._cupy.ndarray) and array.device.id == _current_gpu()

    def overwrite(self, array: Any) -> None:
        if array.size:
            stream = self._cupy.cuda.get_current_stream()
            array.data.memset_async(poison_byte(array.dtype), array.nbytes, stream)

    def fill(self, array: Any, values: Array) -> None:
        raw = np.dtype(f"u{array.dtype.itemsize}")
        array.view(raw)[...] = self._cupy.asarray(np.ascontiguousarray(values).view(raw))

    def synchronize(self) -> None:
        self._cupy.cuda.runtime.deviceSynchronize()

    def set_up(self, rank: int) -> None:
        choose_gpu(rank)

    @contextmanager
    def own_stream(self) -> Iterator[None]:
        with self._cupy.cuda.Stream(non_blocking=True):
            yield


class TorchCudaFrame(TorchFrame):
    """torch tensors on the rank's GPU."""

    name = "torch-cuda"

    def make(self, values: Array, order: str = "rows") -> Any:
        if values.ndim != 2 or order == "rows" or values.size == 0:
            return super().make(values).cuda()
        flat, first, steps = _flat(values, order)
        memory = super().make(flat.view(values.dtype)).cuda()
        return self._torch.as_strided(memory, values.shape, steps, first)

    def numpy(self, array: Any) -> Array:
        return super().numpy(array.detach().cpu())

    def owns(self, array: Any, dtype: np.dtype[Any]) -> bool:
        return (
            isinstance(array, self._torch.Tensor)
            and array.device.type == "cuda"
            and array.device.index == self._torch.cuda.current_device()
        )

    def overwrite(self, array: Any) -> None:
        if array.numel():  # empty ones have strides that view() refuses
            array.view(self._torch.uint8).fill_(poison_byte(self.numpy(array[:0]).dtype))

    def fill(self, array: Any, values: Array) -> None:
        array.copy_(self.make(values))

    def synchronize(self) -> None:
        self._torch.cuda.synchronize()

    def set_up(self, rank: int) -> None:
        self._torch.cuda.set_device(choose_gpu(rank))

    @contextmanager
    def own_stream(self) -> Iterator[None]:
        with self._torch.cuda.stream(self._torch.cuda.Stream()):
            yield


class JaxCudaFrame(JaxFrame):
    """JAX arrays on the rank's GPU, without 64-bit types."""

    name = "jax-cuda"

    def __init__(self) -> None:
        # Several processes, and other frameworks, share each GPU's memory with it.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        super().__init__()
        # JAX changes a thread's current GPU as it likes, so the rank's is remembered.
        self._gpu = threading.local()

    def make(self, values: Array, order: str = "rows") -> Any:
        device = next(
            device
            for device in self._jax.local_devices()
            if device.local_hardware_id == self._gpu.index
        )
        return self._jax.device_put(np.array(arrange(values, order), order="C"), device)

    @property
    def writable(self) -> NumpyFrame:
        import cupy

        cupy.cuda.Device(self._gpu.index).use()  # JAX may have changed it
        return CupyFrame()

    def numpy(self, array: Any) -> Array:
        import cupy

        return CupyFrame().numpy(array) if isinstance(array, cupy.ndarray) else np.asarray(array)

    def owns(self, array: Any, dtype: np.dtype[Any]) -> bool:
        if self.dtype(dtype) != dtype:
            return not isinstance(array, self._jax.Array)  # CuPy's: JAX cannot hold it
        return isinstance(array, self._jax.Array) and {
            (device.platform, device.local_hardware_id) for device in array.devices()
        } == {("gpu", self._gpu.index)}

    def synchronize(self) -> None:
        import cupy

        cupy.cuda.runtime.deviceSynchronize()

    def set_up(self, rank: int) -> None:
        self._jax.local_devices()
        choose_gpu(rank)
        self._gpu.index = _current_gpu()

    def gpu(self) -> int:
        return int(self._gpu.index)


def _current_gpu() -> int:
    import cupy

    return int(cupy.cuda.runtime.getDevice())


FRAMES: dict[str, type[NumpyFrame]] = {
    frame.name: frame
    for frame in (
        *(NumpyFrame, TorchFrame, JaxFrame, Jax64Frame),
        *(CupyFrame, TorchCudaFrame, JaxCudaFrame),
    )
}

_SHARED_NAMES = (
    *("uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
)

#: Every dtype that rows may have.
ROW_DTYPES: tuple[np.dtype[Any], ...] = (
    np.dtype(np.bool_),
    *(np.dtype(getattr(ml_dtypes, name, name)) for name in _SHARED_NAMES),
)


def poison_byte(dtype: np.dtype[Any]) -> int:
    """Return the byte that makes a NaN of any float, and of an integer nothing that is expected."""
    return 0xA5 if dtype.kind in "biu" else 0xFF


def poison(array: Array) -> Array:
    """Fill a NumPy array with poison, and return it."""
    array.reshape(-1).view(np.uint8)[...] = poison_byte(array.dtype)
    return array


@contextmanager
def poisoned_outputs(frame: NumpyFrame) -> Iterator[None]:
    """Use a framework; fill all memory that epcomm allocates for outputs with poison."""
    module, name = frame.adapter
    adapter = getattr(importlib.import_module(module), name)
    make = adapter.empty

    def make_poisoned(self: Any, *args: Any, **options: Any) -> ArrayView:
        view: ArrayView = make(self, *args, **options)
        if view.device.kind == "cpu":
            ctypes.memset(view.ptr, poison_byte(view.dtype), view.num_bytes)
        else:
            _fill_gpu(self, view, *args, **options)
        return view

    def _fill_gpu(
        self: Any, view: ArrayView, shape: Any, dtype: Any, device: Any, stream: int | None
    ) -> None:
        import cupy

        # Where the memory's last user was ordered, and then waited for: the call may run elsewhere.
        # JAX tells no stream; the default one will do.
        used = (self.current_stream(device) if stream is None else stream) or 0
        if view.num_bytes:
            byte = poison_byte(view.dtype)
            cupy.cuda.runtime.memsetAsync(view.ptr, byte, view.num_bytes, used)
        cupy.cuda.runtime.streamSynchronize(used)

    adapter.empty = make_poisoned
    try:
        with frame.in_use():
            yield
    finally:
        adapter.empty = make
