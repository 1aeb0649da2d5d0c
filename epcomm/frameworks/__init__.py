"""One small adapter for each framework; nothing else in epcomm knows a framework's name.

An adapter tells its own arrays, views them, and makes arrays of its framework for outputs. To
add a framework, write a module with a class that fulfils `Framework` and list it in `_ADAPTERS`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from functools import cache
from typing import Any, Protocol

import numpy as np

from epcomm.arrays import DTYPE_INDEX, ArrayView, Device
from epcomm.errors import InvalidArgument, kind_of


class Framework(Protocol):
    """What epcomm needs of a framework."""

    name: str
    #: Whether an array that callers hold may still be written.
    is_mutable: bool
    #: Whether memory can be allocated for another stream than the current one, and freed safely.
    tracks_streams: bool
    #: Whether the framework's own work is ordered by a stream that callers can see. Where it is
    #: not, calls wait on the host: for inputs before, for outputs after.
    has_streams: bool

    def owns(self, array: Any) -> bool:
        """Return whether the array is one of this framework's, which goes by its type."""
        ...

    def view(self, array: Any, name: str) -> ArrayView:
        """Return an input's view, no copy.

        Raises:
            InvalidArgument: The array cannot be used as it is; the message tells the remedy.
        """
        ...

    def empty(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], device: Device, stream: int | None
    ) -> ArrayView:
        """Return the view of new, writable, uninitialised, row-major memory for an output.

        Args:
            shape: Its shape.
            dtype: Its dtype.
            device: Where.
            stream: Handle of the stream whose work may use it first, where that is not the
                current one; only where ``tracks_streams``.
        """
        ...

    def is_unchanged(self, view: ArrayView) -> bool:
        """Return whether a row-major view still is that of its owner; only where ``is_mutable``.

        The owner, an array of this framework, may have got another shape or other memory since.
        """
        ...

    def finish(self, view: ArrayView) -> Any:
        """Return a view from `empty`, or one of a slab, as an array of this framework, no copy.

        The view's strides count: a transposed view gives a transposed array.
        """
        ...

    def current_stream(self, device: Device) -> int | None:
        """Return the handle of the caller's current stream; None where there is none."""
        ...

    def wait_ready(self, arrays: Iterable[Any]) -> None:
        """Wait on the host until arrays hold their values; only where not ``has_streams``."""
        ...


#: Module of the framework, as it stands in sys.modules, and module and class of its adapter.
#: The first that owns an array serves it.
_ADAPTERS: tuple[tuple[str, str, str], ...] = (
    ("numpy", "epcomm.frameworks.numpy", "NumpyFramework"),
    ("torch", "epcomm.frameworks.torch", "TorchFramework"),
    ("jax", "epcomm.frameworks.jax", "JaxFramework"),
    ("cupy", "epcomm.frameworks.cupy", "CupyFramework"),
)

#: The adapter of each type whose arrays came by.
_adapter_of_type: dict[type, Framework] = {}


@cache
def _adapter(module: str, name: str) -> Framework:
    adapter: Framework = getattr(importlib.import_module(module), name)()
    return adapter


def framework_of(array: Any, name: str) -> Framework:
    """Return the adapter that serves an array.

    Args:
        array: The caller's argument.
        name: Its name, for the error.

    Raises:
        InvalidArgument: It is no array.
    """
    known = _adapter_of_type.get(type(array))
    if known is not None:
        return known
    for needed, module, adapter_name in _ADAPTERS:
        # An array's framework is imported already; no other is imported for the asking.
        if needed in sys.modules:
            adapter = _adapter(module, adapter_name)
            if adapter.owns(array):
                _adapter_of_type[type(array)] = adapter
                return adapter
    # Anything else that speaks DLPack; whether it does is asked of every object.
    foreign = _adapter("epcomm.frameworks.dlpack", "DLPackFramework")
    if foreign.owns(array):
        return foreign
    raise InvalidArgument(
        f"{name} is {kind_of(array)}; it must be a NumPy, torch, JAX or CuPy array, or "
        "anything else that has __dlpack__."
    )


def writable_framework(framework: Framework, device: Device) -> Framework:
    """Return the framework whose arrays stand in where callers write ones of a framework's.

    It is the framework itself, and NumPy or CuPy for one whose arrays are immutable.
    """
    return framework if framework.is_mutable else _framework_on(device)


def _framework_on(device: Device) -> Framework:
    if device.kind == "cuda":
        return _adapter("epcomm.frameworks.cupy", "CupyFramework")
    return _adapter("epcomm.frameworks.numpy", "NumpyFramework")


def framework_of_dtype(dtype: Any, device: Device) -> tuple[Framework, np.dtype[Any]]:
    """Return the framework that a dtype object belongs to, and the dtype as NumPy's.

    Args:
        dtype: A ``torch.dtype``, or anything that ``numpy.dtype`` takes.
        device: Where the memory is: for NumPy's dtypes, arrays on a GPU are CuPy's.

    Raises:
        InvalidArgument: It is neither.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(dtype, torch.dtype):
        from epcomm.frameworks.torch import numpy_dtype

        return _adapter("epcomm.frameworks.torch", "TorchFramework"), numpy_dtype(dtype, "dtype")
    try:
        found = np.dtype(dtype)
    except TypeError as error:
        raise InvalidArgument(f"dtype is {dtype!r}; pass a NumPy or a torch dtype.") from error
    if found not in DTYPE_INDEX:
        names = ", ".join(known.name for known in DTYPE_INDEX)
        raise InvalidArgument(f"dtype is {dtype!r}; it must be one of: {names}.")
    return _framework_on(device), found
