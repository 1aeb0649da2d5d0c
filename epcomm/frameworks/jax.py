"""JAX arrays, outside jit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from epcomm.arrays import CPU, ArrayView, Device, empty_aligned, view_numpy
from epcomm.errors import InvalidArgument


class JaxFramework:
    """See `epcomm.frameworks.Framework`."""

    name = "jax"
    is_mutable = False

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
        devices = array.devices()
        if len(devices) != 1:
            raise InvalidArgument(
                f"{name} is spread over {len(devices)} devices; pass the shard of this rank: "
                f"{name}.addressable_shards[i].data."
            )
        if array.is_deleted():
            raise InvalidArgument(f"{name} was donated or deleted; pass a live array.")
        device = next(iter(devices))
        if device.platform != "cpu":
            raise InvalidArgument(
                f"{name} is on {device}; this engine works on CPU arrays. Pass "
                f"jax.device_put({name}, jax.devices('cpu')[0])."
            )
        return view_numpy(np.asarray(array))

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: Device) -> ArrayView:
        """Make memory for an output. JAX adopts it without a copy because it is aligned."""
        if device != CPU:
            raise InvalidArgument(f"JAX arrays on {device} are not made by this engine.")
        return view_numpy(empty_aligned(shape, dtype))

    def finish(self, view: ArrayView) -> Any:
        """Return the JAX array, or NumPy's where JAX cannot hold 64-bit values (x64 is off)."""
        array = view.numpy()
        if array.dtype.itemsize == 8 and not jax.config.jax_enable_x64:
            return array
        with jax.default_device(jax.devices("cpu")[0]):
            return jnp.asarray(array)
