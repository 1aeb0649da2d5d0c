"""The arrays of a call on a GPU, by name: some rows of them, and how they are packed."""

from __future__ import annotations

from epcomm.arrays import ArrayView
from epcomm.engines.base import DispatchInto, DispatchRequest, TopK
from epcomm.engines.device_rail_routes import Run
from epcomm.engines.sections import Sections

#: Arrays on the GPU, row i of all of them being of one token.
Rows = dict[str, ArrayView]


def inputs_of(request: DispatchRequest) -> Rows:
    """Return what a dispatch moves."""
    return _named(request.data, request.scales, request.topk)


def outputs_of(out: DispatchInto) -> Rows:
    """Return where a dispatch writes."""
    return _named(out.data, out.scales, out.topk)


def _named(data: ArrayView, scales: ArrayView | None, topk: TopK | None) -> Rows:
    rows = {"data": data}
    if scales is not None:
        rows["scales"] = scales
    if topk is not None:
        rows["topk_idx"], rows["topk_weights"] = topk
    return rows


def topk_of(rows: Rows) -> TopK | None:
    """Return the choices and their weights, if they are there."""
    return TopK(rows["topk_idx"], rows["topk_weights"]) if "topk_idx" in rows else None


def rows_of(view: ArrayView, run: Run) -> ArrayView:
    """Return some rows of a row-major array."""
    shape = (run.num_rows, *view.shape[1:])
    return view._replace(ptr=view.ptr + run.first * view.strides[0], shape=shape)


def some_of(rows: Rows, run: Run) -> Rows:
    """Return some rows of arrays."""
    return {name: rows_of(view, run) for name, view in rows.items()}


def sections_of(rows: Rows, num_rows: int) -> Sections:
    """Return how arrays of so many rows lie one behind the other."""
    return Sections(
        {name: ((num_rows, *view.shape[1:]), view.dtype) for name, view in rows.items()}
    )
