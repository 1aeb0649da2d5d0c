"""Arrays of any other framework, through DLPack alone; what comes out are NumPy arrays."""

from __future__ import annotations

from typing import Any

from epcomm.arrays import ArrayView, view_dlpack
from epcomm.frameworks.numpy import NumpyFramework


class DLPackFramework(NumpyFramework):
    """See `epcomm.frameworks.Framework`."""

    name = "dlpack"

    def owns(self, array: Any) -> bool:
        """Return whether it speaks DLPack."""
        return hasattr(array, "__dlpack__")

    def view(self, array: Any, name: str) -> ArrayView:
        """View an input."""
        return view_dlpack(array, name)
