"""JAX arrays, outside jit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.dlpack
import numpy as np

from epcomm.arrays import (
    ArrayView,
    Device,
    DLPackRetyped,
    empty_aligned,
    packed_strides,
    view_numpy,
)
from epcomm.errors import InvalidArgument, UnsupportedConfig


class JaxFramework:
    """See `epcomm.frameworks.Framework`."""

    name = "jax"
    is_mutable = False
    tracks_streams = False
    has_streams = False

    def owns(self, array: Any) -> bool:
        """Return whether it is a JAX array, a tracer included."""
        return isinstance(array, jax.Array)

    def view(self, array: Any, name: str) -> ArrayView:
        """View an input; always read-only."""
        if isinstance(array, jax.core.Tracer):
            raise InvalidArgument(
                f"{name} is a tracer: this call stands inside jit, grad or vmap, where there is "
                "no data yet. Call epcomm outside, on concrete arrays."
            )
        if array.is_deleted():
            raise InvalidArgument(f"{name} was donated or deleted; pass a live array.")
        devices = array.devices()
        if len(devices) != 1:
            raise InvalidArgument(
                f"{name} is spread over {len(devices)} devices; pass the shard of this rank: "
                f"{name}.addressable_shards[i].data."
            )
        device = next(iter(devices))
        if device.platform == "cpu":
            return view_numpy(np.asarray(array))
        if device.platform not in ("gpu", "cuda"):
            raise InvalidArgument(
                f"{name} is on {device}; epcomm takes arrays on CPUs and NVIDIA GPUs."
            )
        return ArrayView(
            ptr=array.unsafe_buffer_pointer(),
            shape=array.shape,
            strides=packed_strides(array.shape, array.dtype),
            dtype=np.dtype(array.dtype),
            device=Device("cuda", device.local_hardware_id),
            is_readonly=True,
            owner=array,
        )

    def empty(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], device: Device, stream: int | None
    ) -> ArrayView:
        """Make memory for an output. JAX adopts it without a copy: it is aligned, or CuPy's."""
        if device.kind == "cuda":
            from epcomm.frameworks.cupy import CupyFramework

            return CupyFramework().empty(shape, dtype, device, None)
        return view_numpy(empty_aligned(shape, dtype))

    def is_unchanged(self, view: ArrayView) -> bool:
        """JAX arrays never change."""
        return True

    def finish(self, view: ArrayView) -> Any:
        """Return the JAX array, or NumPy's where JAX cannot hold 64-bit values (x64 is off)."""
        if view.device.kind == "cuda":
            return self._adopt(view)
        array = view.numpy()
        if array.dtype.itemsize == 8 and not jax.config.jax_enable_x64:
            return array
        with jax.default_device(jax.devices("cpu")[0]):
            # NOTE: device_put would copy transposed arrays; NumPy's DLPack knows no bf16, no fp8.
            if not array.flags.c_contiguous:
                return _alias(jax.dlpack.from_dlpack(array), view)
            return _alias(jax.device_put(array, may_alias=True), view)

    def _adopt(self, view: ArrayView) -> Any:
        from epcomm.frameworks.cupy import CupyFramework

        array = CupyFramework().finish(view)
        if array.dtype.itemsize == 8 and not jax.config.jax_enable_x64:
            return array
        # CuPy has no fp8: such memory is uint8 until here.
        exported = DLPackRetyped(array, view.dtype) if "float8" in view.dtype.name else array
        return _alias(jax.dlpack.from_dlpack(exported), view)

    def current_stream(self, device: Device) -> int | None:
        """Return None: JAX does not show its streams."""
        return None

    def wait_ready(self, arrays: Iterable[Any]) -> None:
        """Wait until JAX has computed the arrays."""
        jax.block_until_ready(list(arrays))


def _alias(array: Any, view: ArrayView) -> Any:
    """Return the array, which must be the view's own memory: a receive hook may fill it later."""
    if view.num_bytes and array.unsafe_buffer_pointer() != view.ptr:
        raise UnsupportedConfig(
            f"jax {jax.__version__} copied an output of {view.dtype.name}{list(view.shape)} in "
            "place of adopting its memory; install jax>=0.8."
        )
    return array
