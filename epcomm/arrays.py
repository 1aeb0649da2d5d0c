"""Arrays of any framework, reduced to what an engine needs: pointer, shape, strides and dtype."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from epcomm.errors import InvalidArgument

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT8_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
FLOAT8_E5M2 = np.dtype(ml_dtypes.float8_e5m2)

#: Every dtype that crosses epcomm's interface. Ranks tell each other a dtype by its index here.
DTYPES: tuple[np.dtype[Any], ...] = tuple(
    np.dtype(dtype)
    for dtype in (
        *(np.bool_, np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64),
        *(np.uint64, np.float16, np.float32, np.float64, BFLOAT16, FLOAT8_E4M3, FLOAT8_E5M2),
        *(ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2fnuz, ml_dtypes.float8_e8m0fnu),
    )
)


DTYPE_INDEX: dict[np.dtype[Any], int] = {dtype: index for index, dtype in enumerate(DTYPES)}
#: Their names: NumPy puts a dtype's name together anew each time it is asked.
DTYPE_NAME: dict[np.dtype[Any], str] = {dtype: dtype.name for dtype in DTYPES}


@dataclass(frozen=True)
class Device:
    """Where an array lives.

    Attributes:
        kind: ``"cpu"`` or ``"cuda"``.
        index: Number of the GPU; 0 for the CPU.
    """

    kind: str
    index: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


CPU = Device("cpu")


@cache
def gpu(index: int) -> Device:
    """Return the device of a GPU, by its number."""
    return Device("cuda", index)


class ArrayView(NamedTuple):
    """An array without its framework.

    Attributes:
        ptr: Address of the first element.
        shape: Extent of each dimension.
        strides: Bytes between neighbours of each dimension.
        dtype: NumPy dtype (ml_dtypes for bf16 and fp8).
        device: Where the memory is.
        is_readonly: Whether it must not be written.
        owner: The array that owns the memory; alive as long as this view is.
    """

    ptr: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]
    device: Device
    is_readonly: bool
    owner: Any

    @property
    def num_bytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in row-major order without gaps."""
        shape, strides = self.shape, self.strides
        step = self.dtype.itemsize
        for axis in range(len(shape) - 1, -1, -1):
            if strides[axis] != step and shape[axis] > 1:
                return 0 in shape
            step *= shape[axis]
        return True

    def is_all_of(self, array: npt.NDArray[Any]) -> bool:
        """Return whether the view is that of a whole NumPy array."""
        return (self.ptr, self.shape, self.strides, self.dtype) == (
            array.ctypes.data,
            array.shape,
            array.strides,
            array.dtype,
        )

    def numpy(self) -> npt.NDArray[Any]:
        """Return a CPU array's memory as a NumPy array that keeps the owner alive. No copy."""
        owner = self.owner
        if isinstance(owner, np.ndarray) and self.is_all_of(owner):
            return owner
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        memory = _Memory(self)
        return np.asarray(memory).view(self.dtype).reshape(self.shape)


class _Memory:
    """Raw memory for NumPy's array interface, which knows neither bf16 nor fp8."""

    def __init__(self, view: ArrayView) -> None:
        self._view = view
        raw = np.dtype((np.void, view.dtype.itemsize))
        self.__array_interface__ = {
            "version": 3,
            "data": (view.ptr, view.is_readonly),
            "shape": view.shape,
            "strides": view.strides,
            "typestr": raw.str,
        }


def packed_strides(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, ...]:
    """Return the strides, in bytes, of a row-major array without gaps."""
    strides = []
    step = dtype.itemsize
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


def view_numpy(array: npt.NDArray[Any], owner: Any = None) -> ArrayView:
    """Return the view of a NumPy array. ``owner`` defaults to the array itself."""
    return ArrayView(
        ptr=array.ctypes.data,
        shape=array.shape,
        strides=array.strides,
        dtype=array.dtype,
        device=CPU,
        is_readonly=not array.flags.writeable,
        owner=array if owner is None else owner,
    )


def empty_aligned(
    shape: tuple[int, ...], dtype: np.dtype[Any], alignment: int = 64
) -> npt.NDArray[Any]:
    """Return an uninitialised, row-major NumPy array whose first byte is aligned."""
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(num_bytes + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


# --- DLPack -------------------------------------------------------------------------------------
# Only what is needed to read a capsule; https://dmlc.github.io/dlpack/latest/c_api.html

_DEVICE_KINDS = {1: "cpu", 2: "cuda", 3: "cpu", 13: "cuda"}  # 3 is pinned host, 13 managed memory

_DLPACK_DTYPES: dict[tuple[int, int], np.dtype[Any]] = {
    **{(0, 8 * n): np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    **{(1, 8 * n): np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    **{(2, 8 * n): np.dtype(f"f{n}") for n in (2, 4, 8)},
    (4, 16): BFLOAT16,
    (6, 8): np.dtype(np.bool_),
    (10, 8): FLOAT8_E4M3,
    (11, 8): np.dtype(ml_dtypes.float8_e4m3fnuz),
    (12, 8): FLOAT8_E5M2,
    (13, 8): np.dtype(ml_dtypes.float8_e5m2fnuz),
    (14, 8): np.dtype(ml_dtypes.float8_e8m0fnu),
}
_CODES = {dtype: code for code, dtype in _DLPACK_DTYPES.items()}


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _DLManagedTensorVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("dl_tensor", _DLTensor),
    ]


_READ_ONLY_FLAG = 1

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_capsule_is = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is.argtypes = [ctypes.py_object, ctypes.c_char_p]


def view_dlpack(array: Any, name: str) -> ArrayView:
    """Return the view of any array that speaks DLPack.

    The capsule is read but not consumed; it stays with the view, and frees itself with it.

    Args:
        array: An object with ``__dlpack__``.
        name: The argument's name, for the error.

    Raises:
        InvalidArgument: The array does not export itself, or has a dtype epcomm does not know.
    """
    try:
        try:
            capsule = array.__dlpack__(max_version=(1, 1))
        except TypeError:  # a producer from before DLPack 1.0
            capsule = array.__dlpack__()
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidArgument(f"{name} cannot be exported through DLPack: {error}") from error
    tensor, is_readonly = _tensor_in(capsule)
    return _read_tensor(tensor, is_readonly, (array, capsule), name)


def _tensor_in(capsule: Any) -> tuple[_DLTensor, bool]:
    """Return a capsule's tensor, and whether it is read-only."""
    if _capsule_is(capsule, b"dltensor_versioned"):
        versioned = _DLManagedTensorVersioned.from_address(
            _capsule_pointer(capsule, b"dltensor_versioned")
        )
        return versioned.dl_tensor, bool(versioned.flags & _READ_ONLY_FLAG)
    return _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor")), False


def _read_tensor(tensor: _DLTensor, is_readonly: bool, owner: Any, name: str) -> ArrayView:
    dtype = _DLPACK_DTYPES.get((tensor.code, tensor.bits))
    if dtype is None or tensor.lanes != 1:
        raise InvalidArgument(
            f"{name} has DLPack type code {tensor.code} with {tensor.bits} bits and "
            f"{tensor.lanes} lanes; epcomm takes bool, integers, f16, bf16, f32, f64 and fp8."
        )
    kind = _DEVICE_KINDS.get(tensor.device_type)
    if kind is None:
        raise InvalidArgument(
            f"{name} is on DLPack device type {tensor.device_type}; epcomm takes CPU and CUDA."
        )
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    strides = packed_strides(shape, dtype)
    if tensor.strides:
        strides = tuple(tensor.strides[i] * dtype.itemsize for i in range(tensor.ndim))
    return ArrayView(
        ptr=(tensor.data or 0) + tensor.byte_offset,
        shape=shape,
        strides=strides,
        dtype=dtype,
        device=gpu(tensor.device_id) if kind == "cuda" else CPU,
        is_readonly=is_readonly,
        owner=owner,
    )


class DLPackRetyped:
    """An array as one of another dtype of the same size, for libraries that do not know the dtype.

    Args:
        array: An array that exports itself through DLPack.
        dtype: What consumers are told.
    """

    def __init__(self, array: Any, dtype: np.dtype[Any]) -> None:
        self._array = array
        self._dtype = dtype

    def __dlpack_device__(self) -> Any:
        """Return the array's."""
        return self._array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        """Return the array's capsule with the other dtype in it."""
        capsule = self._array.__dlpack__(**options)
        tensor, _ = _tensor_in(capsule)
        tensor.code, tensor.bits = _CODES[self._dtype]
        return capsule
