"""What ranks tell each other of a call, for engines that keep step on the host: numbers by name."""

from __future__ import annotations

from epcomm.arrays import DTYPE_INDEX
from epcomm.engines.base import CombineRequest, DispatchRequest

#: Names of what all ranks must pass alike: of a dispatch's rows, and of what travels with them.
AGREED_ROWS = ("hidden", "dtype", "num_scales", "scales_dtype")
AGREED_TOPK = ("num_topk", "topk_dtype", "num_experts", "expert_alignment")
#: Names of what each rank has for itself.
OWN_TOKENS = ("num_tokens", "num_worst_tokens")
#: Names of what all ranks must pass alike of a combine.
AGREED_SUMS = ("handle", "hidden", "dtype", "num_topk")

#: Stands for the dtype of an array that is not there; in a combine, for the number of weights.
NO_ARRAY = -1


def row_values(request: DispatchRequest) -> dict[str, int]:
    """Return the values of `AGREED_ROWS`."""
    scales = request.scales
    return {
        "hidden": request.data.shape[1],
        "dtype": DTYPE_INDEX[request.data.dtype],
        "num_scales": scales.shape[1] if scales else 0,
        "scales_dtype": DTYPE_INDEX[scales.dtype] if scales else NO_ARRAY,
    }


def dispatch_values(request: DispatchRequest, num_experts: int) -> dict[str, int]:
    """Return the values of `AGREED_ROWS`, `AGREED_TOPK` and `OWN_TOKENS`."""
    topk = request.topk
    return {
        **row_values(request),
        "num_topk": topk.idx.shape[1] if topk else 0,
        "topk_dtype": DTYPE_INDEX[topk.idx.dtype] if topk else NO_ARRAY,
        "num_experts": num_experts,
        "expert_alignment": request.expert_alignment,
        "num_tokens": request.data.shape[0],
        "num_worst_tokens": request.num_worst_tokens,
    }


def combine_values(request: CombineRequest) -> dict[str, int]:
    """Return the values of `AGREED_SUMS`."""
    data, weights = request.data, request.topk_weights
    return {
        "handle": request.handle.serial,
        "hidden": data.shape[1],
        "dtype": DTYPE_INDEX[data.dtype],
        "num_topk": NO_ARRAY if weights is None else weights.shape[1],
    }
