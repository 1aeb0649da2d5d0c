"""One small adapter for each framework; nothing else in epcomm knows a framework's name.

An adapter tells its own arrays, views them, and makes arrays of its framework for outputs. To
add a framework, write a module with a class that fulfils `Framework` and list it in `_ADAPTERS`.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from typing import Any, Protocol

import numpy as np

from epcomm.arrays import ArrayView, Device
from epcomm.errors import InvalidArgument


class Framework(Protocol):
    """What epcomm needs of a framework."""

    name: str
    #: Whether an array that callers hold may still be written.
    is_mutable: bool

    def owns(self, array: Any) -> bool:
        """Return whether the array is one of this framework's."""
        ...

    def view(self, array: Any, name: str) -> ArrayView:
        """Return an input's view, no copy.

        Raises:
            InvalidArgument: The array cannot be used as it is; the message tells the remedy.
        """
        ...

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: Device) -> ArrayView:
        """Return the view of new, writable, uninitialised, row-major memory for an output."""
        ...

    def finish(self, view: ArrayView) -> Any:
        """Return a view from `empty`, or one of a slab, as an array of this framework, no copy.

        The view's strides count: a transposed view gives a transposed array.
        """
        ...


#: Module of the framework, as it stands in sys.modules, and module and class of its adapter.
#: The first that owns an array serves it; anything else that speaks DLPack is served by the last.
_ADAPTERS: tuple[tuple[str, str, str], ...] = (
    ("numpy", "epcomm.frameworks.numpy", "NumpyFramework"),
    ("torch", "epcomm.frameworks.torch", "TorchFramework"),
    ("jax", "epcomm.frameworks.jax", "JaxFramework"),
    ("numpy", "epcomm.frameworks.dlpack", "DLPackFramework"),
)


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
    for needed, module, adapter_name in _ADAPTERS:
        # An array's framework is imported already; no other is imported for the asking.
        if needed in sys.modules:
            adapter = _adapter(module, adapter_name)
            if adapter.owns(array):
                return adapter
    raise InvalidArgument(
        f"{name} is a {type(array).__name__}; it must be a NumPy, torch, JAX or CuPy array, or "
        "anything else that has __dlpack__."
    )


def numpy_framework() -> Framework:
    """Return NumPy's adapter."""
    return _adapter("epcomm.frameworks.numpy", "NumpyFramework")


def framework_of_dtype(dtype: Any) -> tuple[Framework, np.dtype[Any]]:
    """Return the framework that a dtype object belongs to, and the dtype as NumPy's.

    Args:
        dtype: A ``torch.dtype``, or anything that ``numpy.dtype`` takes.

    Raises:
        InvalidArgument: It is neither.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(dtype, torch.dtype):
        from epcomm.frameworks.torch import numpy_dtype

        return _adapter("epcomm.frameworks.torch", "TorchFramework"), numpy_dtype(dtype, "dtype")
    try:
        return numpy_framework(), np.dtype(dtype)
    except TypeError as error:
        raise InvalidArgument(f"dtype is {dtype!r}; pass a NumPy or a torch dtype.") from error
