"""The frameworks that contract programs run with: NumPy data in, and what came out as NumPy.

Nothing else in tests/ranks knows a framework. To add one, or one's arrays on another device, write
a class like `NumpyFrame` and list it in `FRAMES`.
"""

from __future__ import annotations

import ctypes
import importlib
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
    #: Whether arrays can be written after they were returned: hooks, out=, zero copy.
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

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Set up the framework for arrays of this kind, in all threads, and restore it."""
        yield


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

    def make_writable(self, values: Array) -> Any:
        return np.array(values, order="C")  # JAX arrays cannot be written; NumPy's are taken

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


FRAMES: dict[str, type[NumpyFrame]] = {
    frame.name: frame for frame in (NumpyFrame, TorchFrame, JaxFrame, Jax64Frame)
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

    def make_poisoned(*args: Any, **options: Any) -> ArrayView:
        view: ArrayView = make(*args, **options)
        if view.device.kind == "cpu":
            ctypes.memset(view.ptr, poison_byte(view.dtype), view.num_bytes)
        else:
            import cupy

            cupy.cuda.runtime.memset(view.ptr, poison_byte(view.dtype), view.num_bytes)
            cupy.cuda.runtime.deviceSynchronize()
        return view

    adapter.empty = make_poisoned
    try:
        with frame.in_use():
            yield
    finally:
        adapter.empty = make
