"""Checks of what callers pass, before any peer is touched; the outcome is an engine's request."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from epcomm import env
from epcomm.arrays import BFLOAT16, CPU, DTYPE_INDEX, FLOAT8_E4M3, ArrayView, Device
from epcomm.engines.base import (
    MAX_LOW_LATENCY_TOPK,
    Fp8Format,
    LayoutViews,
    LowLatencyShape,
    TopK,
)
from epcomm.errors import InvalidArgument, kind_of
from epcomm.events import EventHandle, EventOverlap
from epcomm.fp8 import BLOCK
from epcomm.frameworks import Framework, framework_of
from epcomm.handle import DispatchHandle

#: Rows move in pieces of this many bytes.
ROW_MULTIPLE = 16

#: What counts of anything are below: ranks tell each other 32-bit numbers.
MAX_COUNT = 2**31 - 1

INDEX_DTYPES = (np.dtype(np.int64), np.dtype(np.int32))
SCALE_DTYPES = (np.dtype(np.float32), np.dtype(np.int32))
SUM_DTYPES = (BFLOAT16, np.dtype(np.float16), np.dtype(np.float32))
ONE_BYTE_DTYPES = tuple(dtype for dtype in DTYPE_INDEX if dtype.itemsize == 1)
FLOAT32 = (np.dtype(np.float32),)
INT32 = (np.dtype(np.int32),)
INT64 = (np.dtype(np.int64),)
BOOL = (np.dtype(np.bool_),)


@dataclass(frozen=True)
class Place:
    """Where a Buffer works.

    Attributes:
        device: Device of every array.
        num_ranks: Ranks of the group.
    """

    device: Device
    num_ranks: int


def view_of(
    array: Any,
    name: str,
    place: Place,
    *,
    shape: tuple[int | str, ...],
    dtypes: Collection[np.dtype[Any]],
    shape_is: str = "",
    is_strided: bool = False,
    is_output: bool = False,
) -> ArrayView:
    """View an argument and hold it to the rules.

    Args:
        array: The caller's array.
        name: The argument's name.
        place: Where the Buffer works.
        shape: For each dimension its extent, or a name for one that may be any.
        dtypes: The dtypes that are taken.
        shape_is: What the numbers of the shape stand for, for the error.
        is_strided: Whether the array may have gaps and any order.
        is_output: Whether it is written.

    Raises:
        InvalidArgument: A rule is broken.
    """
    view = framework_of(array, name).view(array, name)
    if not _fits(view.shape, shape):
        rule = ", ".join(map(str, shape))
        raise InvalidArgument(
            f"{name} has shape {list(view.shape)}; it must be [{rule}]"
            f"{': ' + shape_is if shape_is else ''}."
        )
    if view.dtype not in dtypes:
        raise InvalidArgument(
            f"{name} is {view.dtype.name}; {_dtype_rule(name, dtypes, is_output)}"
        )
    # Devices are compared by their fields, in Python; nearly always it is the same object.
    if view.device is not place.device and view.device != place.device:
        raise InvalidArgument(
            f"{name} is on {view.device}, but this Buffer works on {place.device}; move the "
            f"array there, or make the Buffer with {_options_for(view.device, place.device)}."
        )
    if not is_strided and not view.is_contiguous:
        raise InvalidArgument(
            f"{name} has strides of {view.strides} bytes for shape {list(view.shape)}; it must be "
            f"contiguous: pass {name}.contiguous() or numpy.ascontiguousarray({name})."
        )
    if is_output and view.is_readonly:
        raise InvalidArgument(
            f"{name} is read-only, and it is written; pass a writable array (JAX arrays never are)."
        )
    return view


def _dtype_rule(name: str, dtypes: Collection[np.dtype[Any]], is_output: bool) -> str:
    """Return the end of an error: which dtypes an argument may have, and how it gets one."""
    names = ", ".join(dtype.name for dtype in dtypes)
    rule = f"it must be {names if len(dtypes) == 1 else f'one of: {names}'}."
    if is_output:
        return f"{rule} Pass an array of that dtype: it is written."
    usual = (np.dtype(np.float32), np.dtype(np.int64), FLOAT8_E4M3)
    kind = next((dtype for dtype in usual if dtype in dtypes), next(iter(dtypes))).type
    return f"{rule} Convert it, in NumPy with {name}.astype({kind.__module__}.{kind.__name__})."


def _fits(shape: tuple[int, ...], rule: tuple[int | str, ...]) -> bool:
    if len(shape) != len(rule):
        return False
    for axis, want in enumerate(rule):
        if not isinstance(want, str) and shape[axis] != want:
            return False
    return True


def _options_for(device: Device, place: Device) -> str:
    """Return the arguments of a Buffer for arrays of another device than its place."""
    if device == CPU:
        return "engine='host' and without device= (or set EPCOMM_ENGINE=host)"
    if place == CPU:
        index = device.index
        return (
            f"engine='cuda', device={index}, or, where GPUs have no peer access, "
            f"with engine='host', device={index}"
        )
    return f"device={device.index}"


def whole_number(value: Any, name: str, least: int, most: int | None = MAX_COUNT) -> int:
    """Return a whole number within bounds, or raise InvalidArgument."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise InvalidArgument(
            f"{name} is {value!r}; it must be a whole number of at least {least}."
        )
    if most is not None and number > most:
        raise InvalidArgument(f"{name} is {value!r}; it must be at most {most}.")
    return number


def engine_name(value: Any) -> str:
    """Return the name of an engine, or raise InvalidArgument."""
    if value not in env.ENGINES:
        raise InvalidArgument(
            f"engine is {value!r}; it must be one of {', '.join(env.ENGINES)}. Leave it out for "
            "auto; pass 'cuda' for arrays on GPUs, 'host' for arrays in CPU memory."
        )
    return str(value)


def num_experts_of(value: Any, num_ranks: int) -> int:
    """Return the number of experts, or raise InvalidArgument unless every rank gets as many."""
    number = whole_number(value, "num_experts", 1)
    if number % num_ranks:
        raise InvalidArgument(
            f"num_experts is {number}; it must be a multiple of the {num_ranks} ranks, so that "
            f"every rank holds as many. Pass {number + -number % num_ranks}, and leave the last "
            "experts unused."
        )
    return number


def check_events(previous_event: Any, async_finish: bool, allocate_on_comm_stream: bool) -> None:
    """Hold a call's stream arguments to the contract."""
    if previous_event is not None and not isinstance(previous_event, EventOverlap):
        raise InvalidArgument(
            f"previous_event is {kind_of(previous_event)}; it must be an EventOverlap, "
            "such as Buffer.capture() returns, or None."
        )
    event = None if previous_event is None else previous_event.event
    if event is not None and not isinstance(event, EventHandle):
        raise InvalidArgument(
            f"previous_event holds {kind_of(event)}; it must hold an EventHandle, which its maker "
            "records on the current stream: pass Buffer.capture()."
        )
    if allocate_on_comm_stream and not (previous_event is not None and async_finish):
        raise InvalidArgument(
            "allocate_on_comm_stream=True needs previous_event= and async_finish=True as well: "
            "without them nothing orders the caller's stream and the new memory."
        )


def check_row(view: ArrayView, name: str) -> None:
    """Hold the size of a row to what can be moved."""
    row_bytes = view.shape[1] * view.dtype.itemsize
    if row_bytes == 0 or row_bytes % ROW_MULTIPLE:
        raise InvalidArgument(
            f"{name} has rows of {row_bytes} bytes ({view.shape[1]} {view.dtype.name}); a row must "
            f"be a multiple of {ROW_MULTIPLE} bytes: pad the hidden size."
        )


def split_pair(x: Any) -> tuple[Any, Any]:
    """Return data and scales of ``x``, scales None where it is one array."""
    if not isinstance(x, tuple | list):
        return x, None
    if len(x) != 2:
        raise InvalidArgument(
            f"x is a {type(x).__name__} of {len(x)}; it must be an array or (data, scales)."
        )
    return x[0], x[1]


def view_rows(x: Any, place: Place) -> tuple[Framework, ArrayView, ArrayView | None]:
    """View ``x`` of dispatch: an array, or data with scales."""
    data, scales = split_pair(x)
    framework = framework_of(data, "x")
    if scales is None:
        view = view_of(data, "x", place, shape=("num_tokens", "hidden"), dtypes=DTYPE_INDEX)
        check_row(view, "x")
        return framework, view, None
    view = view_of(data, "x[0]", place, shape=("num_tokens", "hidden"), dtypes=ONE_BYTE_DTYPES)
    check_row(view, "x[0]")
    scales_view = view_of(
        scales,
        "x[1]",
        place,
        shape=(view.shape[0], "num_scales"),
        dtypes=SCALE_DTYPES,
        shape_is="as many rows as x[0]",
        is_strided=True,
    )
    return framework, view, scales_view


class KnownLayout(NamedTuple):
    """A layout as `Buffer.get_dispatch_layout` gave it, and the choices that it was made of.

    Callers pass both on to dispatch, which then has no need to look at them again.

    Attributes:
        framework: Of the arrays.
        topk_idx: The choices.
        layout: The layout.
    """

    framework: Framework
    topk_idx: ArrayView
    layout: LayoutViews

    def has_choices(self, topk_idx: Any, num_tokens: int) -> bool:
        """Return whether these are the choices, of so many tokens."""
        return self._is(self.topk_idx, topk_idx) and self.topk_idx.shape[0] == num_tokens

    def has_arrays(self, per_rank: Any, per_expert: Any, in_rank: Any, num_tokens: int) -> bool:
        """Return whether these are the layout's arrays, of so many tokens."""
        views = self.layout
        return (
            self._is(views.num_tokens_per_rank, per_rank)
            and self._is(views.num_tokens_per_expert, per_expert)
            and self._is(views.is_token_in_rank, in_rank)
            and views.is_token_in_rank.shape[0] == num_tokens
        )

    def _is(self, view: ArrayView, array: Any) -> bool:
        return view.owner is array and self.framework.is_unchanged(view)


def view_layout(
    per_rank: Any,
    per_expert: Any,
    in_rank: Any,
    num_tokens: int,
    place: Place,
    known: KnownLayout | None = None,
    has_choices: bool = False,
) -> LayoutViews:
    """View the layout arrays of dispatch, which was called with choices or without."""
    if known is not None and known.has_arrays(per_rank, per_expert, in_rank, num_tokens):
        return known.layout
    if per_rank is None or per_expert is None or in_rank is None:
        given = {
            "num_tokens_per_rank": per_rank,
            "num_tokens_per_expert": per_expert,
            "is_token_in_rank": in_rank,
        }
        missing = [name for name, array in given.items() if array is None]
        if has_choices and len(missing) == len(given):
            raise InvalidArgument(
                "num_experts= is missing: dispatch got topk_idx, and nothing that tells which rank "
                "holds which expert. Pass num_experts=, the experts of all ranks together, or what "
                "get_dispatch_layout returns."
            )
        raise InvalidArgument(
            f"dispatch without a handle got no {', '.join(missing)}; pass what get_dispatch_layout "
            "returns, or topk_idx, topk_weights and num_experts= alone."
        )
    experts = view_of(
        per_expert, "num_tokens_per_expert", place, shape=("num_experts",), dtypes=INT32
    )
    num_experts_of(experts.shape[0], place.num_ranks)
    return LayoutViews(
        num_tokens_per_rank=view_of(
            per_rank,
            "num_tokens_per_rank",
            place,
            shape=(place.num_ranks,),
            dtypes=INT32,
            shape_is="a number for each rank",
        ),
        num_tokens_per_node=None,
        num_tokens_per_expert=experts,
        is_token_in_rank=view_of(
            in_rank,
            "is_token_in_rank",
            place,
            shape=(num_tokens, place.num_ranks),
            dtypes=BOOL,
            shape_is="as many rows as x, and a value for each rank",
        ),
    )


def view_topk(
    topk_idx: Any,
    topk_weights: Any,
    num_tokens: int,
    place: Place,
    known: KnownLayout | None = None,
) -> TopK | None:
    """View the choices that travel with the rows."""
    if (topk_idx is None) != (topk_weights is None):
        lone, other = "topk_idx", "topk_weights"
        if topk_idx is None:
            lone, other = other, lone
        raise InvalidArgument(f"{lone} was passed without {other}; pass both or neither.")
    if topk_idx is None:
        return None
    if known is not None and known.has_choices(topk_idx, num_tokens):
        idx = known.topk_idx
    else:
        idx = view_topk_idx(topk_idx, num_tokens, place)
    check_num_topk(idx, "topk_idx")
    return TopK(idx, view_weights(topk_weights, idx, place))


def view_topk_idx(topk_idx: Any, num_tokens: int | str, place: Place) -> ArrayView:
    """View the choices of so many tokens."""
    return view_of(
        topk_idx,
        "topk_idx",
        place,
        shape=(num_tokens, "num_topk"),
        dtypes=INDEX_DTYPES,
        shape_is="" if isinstance(num_tokens, str) else "as many rows as x",
    )


def view_weights(topk_weights: Any, idx: ArrayView, place: Place) -> ArrayView:
    """View the weights of choices."""
    return view_of(
        topk_weights,
        "topk_weights",
        place,
        shape=idx.shape,
        dtypes=FLOAT32,
        shape_is="as topk_idx has",
    )


def check_num_topk(view: ArrayView, name: str) -> None:
    """Hold choices to at least one a token."""
    if view.shape[1] == 0:
        raise InvalidArgument(
            f"{name} has no choices, shape {list(view.shape)}; pass at least one."
        )


def check_handle(handle: Any, buffer_id: int, data: ArrayView | None = None) -> DispatchHandle:
    """Return the handle if it is one of this Buffer's, and fits the rows to dispatch again."""
    if not isinstance(handle, DispatchHandle):
        raise InvalidArgument(
            f"handle is {kind_of(handle)}; pass the handle that dispatch returned."
        )
    if handle.buffer_id != buffer_id:
        raise InvalidArgument(
            "handle comes from another Buffer; use the Buffer whose dispatch returned it."
        )
    if data is not None and data.shape[0] != handle.num_tokens:
        raise InvalidArgument(
            f"x has {data.shape[0]} rows; the handle's dispatch had {handle.num_tokens}."
        )
    return handle


class CombineViews(NamedTuple):
    """The checked arrays of a combine, as in `CombineRequest`."""

    data: ArrayView
    topk_weights: ArrayView | None
    biases: tuple[ArrayView, ...]


def view_combine(
    x: Any, handle: DispatchHandle, topk_weights: Any, bias: Any, place: Place
) -> CombineViews:
    """View the arrays of a combine."""
    rows = handle.num_recv_rows
    shape_is = "as many rows as this rank received with the handle"
    data = view_of(x, "x", place, shape=(rows, "hidden"), dtypes=SUM_DTYPES, shape_is=shape_is)
    check_row(data, "x")
    weights = None
    if topk_weights is not None:
        weights = view_of(
            topk_weights,
            "topk_weights",
            place,
            shape=(rows, "num_topk"),
            dtypes=FLOAT32,
            shape_is=shape_is,
        )
        check_num_topk(weights, "topk_weights")
    biases = bias if isinstance(bias, tuple | list) else () if bias is None else (bias,)
    if len(biases) > 2:
        raise InvalidArgument(f"bias has {len(biases)} arrays; pass none, one or two.")
    shape = (handle.num_tokens, data.shape[1])
    views = [
        view_of(
            one,
            f"bias[{i}]",
            place,
            shape=shape,
            dtypes=(data.dtype,),
            shape_is="as many rows as the handle's dispatch had tokens here, each as long as x's",
        )
        for i, one in enumerate(biases)
    ]
    return CombineViews(data, weights, tuple(views))


def low_latency_shape(
    num_max_tokens: Any, hidden: int, num_experts: Any, num_ranks: int
) -> LowLatencyShape:
    """Check the fixed shape of low-latency calls."""
    name = "num_max_dispatch_tokens_per_rank"
    most = whole_number(num_max_tokens, name, 1)
    return LowLatencyShape(
        num_max_tokens=most,
        hidden=whole_number(hidden, "hidden", 1),
        num_experts=num_experts_of(num_experts, num_ranks),
        num_ranks=num_ranks,
    )


def low_latency_topk(topk_idx: Any, num_tokens: int | str, place: Place) -> ArrayView:
    """Check the choices of a low-latency call."""
    idx = view_topk_idx(topk_idx, num_tokens, place)
    if idx.shape[1] > MAX_LOW_LATENCY_TOPK:
        raise InvalidArgument(
            f"topk_idx has {idx.shape[1]} choices a token; low-latency calls take at most "
            f"{MAX_LOW_LATENCY_TOPK}. Use dispatch and combine for more."
        )
    return idx


def fp8_format(use_fp8: bool, round_scale: bool, use_ue8m0: bool, hidden: int) -> Fp8Format:
    """Return what low-latency dispatch sends, or raise InvalidArgument."""
    if use_ue8m0 and not round_scale:
        raise InvalidArgument("use_ue8m0=True needs round_scale=True: UE8M0 holds powers of two.")
    if not use_fp8:
        if round_scale:
            raise InvalidArgument("round_scale=True needs use_fp8=True: bf16 rows have no scales.")
        return Fp8Format.NONE
    multiple = BLOCK * 4 if use_ue8m0 else BLOCK
    if hidden % multiple:
        raise InvalidArgument(
            f"x has hidden size {hidden}; with use_fp8{' and use_ue8m0' if use_ue8m0 else ''} it "
            f"must be a multiple of {multiple}. Pad it, or pass use_fp8=False."
        )
    if use_ue8m0:
        return Fp8Format.PACKED_UE8M0_SCALES
    return Fp8Format.POWER_OF_TWO_SCALES if round_scale else Fp8Format.FLOAT_SCALES
