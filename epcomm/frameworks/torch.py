"""torch tensors."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import torch

from epcomm.arrays import CPU, DTYPES, ArrayView, Device, gpu
from epcomm.errors import InvalidArgument

# torch calls them as NumPy does; an older one has not all of them.
_TORCH_OF_NUMPY: dict[np.dtype[Any], torch.dtype] = {
    dtype: getattr(torch, dtype.name) for dtype in DTYPES if hasattr(torch, dtype.name)
}
_NUMPY_OF_TORCH = {theirs: ours for ours, theirs in _TORCH_OF_NUMPY.items()}


def numpy_dtype(dtype: torch.dtype, name: str) -> np.dtype[Any]:
    """Return NumPy's dtype for one of torch's, or raise InvalidArgument."""
    if dtype not in _NUMPY_OF_TORCH:
        raise InvalidArgument(f"{name} has dtype {dtype}, which epcomm does not carry.")
    return _NUMPY_OF_TORCH[dtype]


#: The handle of a GPU's current stream, without the object that torch makes of it; or None.
_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


@cache
def _torch_device(device: Device) -> torch.device:
    return torch.device(str(device))


@cache
def _external_stream(stream: int, index: int) -> torch.cuda.ExternalStream:
    return torch.cuda.ExternalStream(stream, index)


@cache
def _device_of(device: torch.device) -> Device | None:
    """Return epcomm's name for one of torch's devices; None where it takes no tensors."""
    if device.type not in ("cpu", "cuda"):
        return None
    return CPU if device.type == "cpu" else gpu(device.index or 0)


def _strides(tensor: torch.Tensor, dtype: np.dtype[Any]) -> tuple[int, ...]:
    """Return a tensor's strides in bytes."""
    itemsize = dtype.itemsize
    return tuple([step * itemsize for step in tensor.stride()])


class _CudaMemory:
    """Raw memory for torch's reader of the CUDA array interface, which knows no 16-bit formats."""

    def __init__(self, view: ArrayView) -> None:
        self._owner = view.owner
        self.__cuda_array_interface__ = {
            "version": 3,
            "data": (view.ptr, False),
            "shape": (view.num_bytes,),
            "typestr": "|u1",
        }


def _tensor_over(view: ArrayView) -> torch.Tensor:
    """Return a tensor over GPU memory that torch did not allocate."""
    raw = torch.as_tensor(_CudaMemory(view), device=str(view.device))
    return raw.view(_TORCH_OF_NUMPY[view.dtype]).view(view.shape)


def _data_ptr(tensor: torch.Tensor, name: str) -> int:
    try:
        ptr = 0 if type(tensor).__name__ == "FakeTensor" else tensor.data_ptr()
    except RuntimeError:  # wrapped by vmap, jvp and their like
        ptr = 0
    if ptr == 0 and tensor.numel():
        raise InvalidArgument(
            f"{name} has no memory: this call stands inside vmap, jvp, torch.compile or a fake "
            "mode, where there is no data yet. Call epcomm outside, on plain tensors."
        )
    return ptr


class TorchFramework:
    """See `epcomm.frameworks.Framework`."""

    name = "torch"
    is_mutable = True
    tracks_streams = True
    has_streams = True

    def owns(self, array: Any) -> bool:
        """Return whether it is a torch tensor."""
        return isinstance(array, torch.Tensor)

    def view(self, array: Any, name: str) -> ArrayView:
        """View an input."""
        if array.requires_grad and torch.is_grad_enabled():
            raise InvalidArgument(
                f"{name} requires grad, and epcomm's calls are not recorded for autograd. Call "
                f"inside torch.no_grad() or an autograd.Function, or pass {name}.detach()."
            )
        is_plain = array.layout is torch.strided and not array.is_nested
        device = _device_of(array.device)
        if not is_plain or device is None:
            kind = "nested" if array.is_nested else array.layout
            raise InvalidArgument(
                f"{name} is a {kind} tensor on {array.device}; epcomm takes strided tensors on cpu "
                "and cuda."
            )
        if array.is_conj() or array.is_neg():
            raise InvalidArgument(f"{name} is a lazy view; pass {name}.resolve_neg().")
        dtype = numpy_dtype(array.dtype, name)
        ptr = _data_ptr(array, name)
        return ArrayView(
            ptr, tuple(array.shape), _strides(array, dtype), dtype, device, False, array
        )

    def empty(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], device: Device, stream: int | None
    ) -> ArrayView:
        """Make memory for an output."""
        if stream is None:
            tensor = torch.empty(shape, dtype=_TORCH_OF_NUMPY[dtype], device=_torch_device(device))
        else:
            current = torch.cuda.current_stream(device.index)
            with torch.cuda.stream(_external_stream(stream, device.index)):
                tensor = torch.empty(
                    shape, dtype=_TORCH_OF_NUMPY[dtype], device=_torch_device(device)
                )
            # The caller uses it on the current stream, so only after that may it be reused.
            tensor.record_stream(current)
        ptr = _data_ptr(tensor, "output")
        return ArrayView(ptr, shape, _strides(tensor, dtype), dtype, device, False, tensor)

    def is_unchanged(self, view: ArrayView) -> bool:
        """Compare with what the tensor says now."""
        tensor = view.owner
        is_there = tensor.data_ptr() == view.ptr and tensor.shape == view.shape
        is_alike = tensor.dtype == _TORCH_OF_NUMPY[view.dtype] and tensor.is_contiguous()
        return bool(is_there and is_alike)

    def finish(self, view: ArrayView) -> Any:
        """Return the tensor."""
        if isinstance(view.owner, torch.Tensor):
            tensor = view.owner
        elif view.device.kind == "cuda":
            tensor = _tensor_over(view)
        else:  # memory of a slab
            raw = np.dtype(f"u{view.dtype.itemsize}")
            tensor = torch.from_numpy(view.numpy().view(raw)).view(_TORCH_OF_NUMPY[view.dtype])
        if tensor.shape != view.shape or _strides(tensor, view.dtype) != view.strides:
            itemsize = view.dtype.itemsize
            steps = tuple([step // itemsize for step in view.strides])
            # NOTE: a tensor of its own, not a view: torch forbids to write views in place that a
            # torch.autograd.Function returned.
            start = tensor.storage_offset() + (view.ptr - tensor.data_ptr()) // itemsize
            storage = tensor.untyped_storage()
            tensor = tensor.new_empty(0).set_(storage, start, view.shape, steps)
        return tensor

    def current_stream(self, device: Device) -> int | None:
        """Return the handle of the current stream; None on the CPU."""
        if device.kind == "cpu":
            return None
        if _raw_stream is not None:
            return int(_raw_stream(device.index))
        return int(torch.cuda.current_stream(device.index).cuda_stream)

    def wait_ready(self, arrays: Iterable[Any]) -> None:
        """Nothing to wait for: tensors are ordered by the stream."""
