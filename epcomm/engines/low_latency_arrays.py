"""What low-latency calls of all engines do alike: their outputs, and the buffer of a combine."""

from __future__ import annotations

import numpy as np

from epcomm.arrays import ArrayView
from epcomm.engines.base import Fp8Format, LowLatencyDispatchRequest
from epcomm.errors import InvalidArgument
from epcomm.fp8 import data_dtype, num_scales, scales_dtype


def check_combine_buffer(data: ArrayView, wanted: int) -> None:
    """Hold the rows of a combine with ``zero_copy`` to the address of the next combine buffer."""
    if data.ptr != wanted:
        raise InvalidArgument(
            "zero_copy=True, but x is not the buffer that get_next_low_latency_combine_buffer "
            "gives now; fill that one and pass it, or pass zero_copy=False."
        )


def allocate_result(
    request: LowLatencyDispatchRequest,
) -> tuple[dict[str, ArrayView], ArrayView | None]:
    """Make the outputs of a dispatch, and its scales where there are any."""
    shape, fp8 = request.shape, request.fp8
    num_local, num_rows = shape.num_local_experts, shape.num_recv_rows
    int32, int64 = np.dtype(np.int32), np.dtype(np.int64)
    scales = None
    if fp8 is not Fp8Format.NONE:
        # Stored with the row dimension innermost, as grouped matrix products want it.
        stored = (num_local, num_scales(fp8, shape.hidden), num_rows)
        scales = request.allocate(stored, scales_dtype(fp8))
    result = {
        "data": request.allocate((num_local, num_rows, shape.hidden), data_dtype(fp8)),
        "recv_count": request.allocate((num_local,), int32),
        "src_info": request.allocate((num_local, num_rows), int32),
        "layout_range": request.allocate((num_local, shape.num_ranks), int64),
    }
    return result, scales
