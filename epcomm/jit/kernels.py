"""Every kernel, and the constants that it is compiled with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from epcomm import cuda_layout
from epcomm.engines import cuda_params

#: Values of kDtype in combine.cu, by the dtype's name.
COMBINE_DTYPES: Mapping[str, int] = MappingProxyType({"bfloat16": 0, "float16": 1, "float32": 2})

_DTYPE_NAMES = {"kDtypeBfloat16": 0, "kDtypeFloat16": 1, "kDtypeFloat32": 2}

#: Threads of a block of route.cu and of layout.cu.
ROUTE_THREADS = 1024
#: Warps of a block of dispatch that fetch, at most.
MAX_FETCH_WARPS = 8
# Vectors that a thread of low_latency_combine.cu has on their way: so many times so many.
_SUM_STAGES, _STAGE_VECTORS, _VECTOR_BYTES = 4, 2, 16
# What low-latency kernels keep of each expert: a Span, and in dispatch a count for each rank.
_SPAN_BYTES, _COUNT_BYTES = 8, 4
#: Pieces after which a warp looks whether a piece that it sent is written.
RING_LAG = 4


@dataclass(frozen=True, eq=False)
class KernelSpec:
    """One kernel in one configuration; the same object for the same configuration.

    Attributes:
        name: Its file under ``kernels/``; the function is ``epcomm_`` and this.
        constants: Names and values for -D.
    """

    name: str
    constants: tuple[tuple[str, int], ...]

    @property
    def function(self) -> str:
        """Name of the kernel function."""
        return f"epcomm_{self.name}"


@cache
def layout_spec(num_ranks: int) -> KernelSpec:
    """Return the spec of layout.cu."""
    own = {"kLayoutParamsBytes": cuda_params.LAYOUT.itemsize, "kRouteThreads": ROUTE_THREADS}
    return _spec("layout", num_ranks, own)


@cache
def agree_spec(num_ranks: int) -> KernelSpec:
    """Return the spec of agree.cu."""
    return _spec("agree", num_ranks, {"kAgreeParamsBytes": cuda_params.AGREE.itemsize})


@cache
def route_spec(num_ranks: int) -> KernelSpec:
    """Return the spec of route.cu."""
    own = {"kRouteParamsBytes": cuda_params.ROUTE.itemsize, "kRouteThreads": ROUTE_THREADS}
    return _spec("route", num_ranks, own)


@cache
def dispatch_spec(num_ranks: int, has_bulk: bool, num_stages: int) -> KernelSpec:
    """Return the spec of dispatch.cu.

    Args:
        num_ranks: Ranks of the group.
        has_bulk: Whether the GPU has bulk copies.
        num_stages: Rows that a warp keeps in flight, at least 2.
    """
    own = {
        "kDispatchParamsBytes": cuda_params.DISPATCH.itemsize,
        "kUseBulk": int(has_bulk),
        "kNumStages": num_stages,
        "kRingLag": RING_LAG,
        "kMaxDispatchThreads": (cuda_layout.NUM_STAGE_WARPS + MAX_FETCH_WARPS) * 32,
    }
    return _spec("dispatch", num_ranks, own)


@dataclass(frozen=True)
class CombineShape:
    """How combine.cu divides its work.

    Attributes:
        num_threads: Threads of a block.
        num_send_warps: Warps of a block that send; the others sum.
        num_stages: Pieces that a send warp keeps in flight, at least 2.
        sum_vecs: 16-byte vectors of a row that a warp sums before it turns to other tokens.
        sum_tokens: Neighbouring tokens that a warp sums together.
    """

    num_threads: int
    num_send_warps: int
    num_stages: int
    sum_vecs: int
    sum_tokens: int


@cache
def combine_spec(
    num_ranks: int, has_bulk: bool, dtype: str, shape: CombineShape, has_further: bool = False
) -> KernelSpec:
    """Return the spec of combine.cu.

    Args:
        num_ranks: Ranks of the group.
        has_bulk: Whether the GPU has bulk copies.
        dtype: One of ``COMBINE_DTYPES``, of the rows.
        shape: How work is divided.
        has_further: Whether other nodes' sums are added.
    """
    own = {
        "kCombineParamsBytes": cuda_params.COMBINE.itemsize,
        "kUseBulk": int(has_bulk),
        "kDtype": COMBINE_DTYPES[dtype],
        **_DTYPE_NAMES,
        "kCombineThreads": shape.num_threads,
        "kNumSendWarps": shape.num_send_warps,
        "kNumStages": shape.num_stages,
        "kRingLag": RING_LAG,
        "kSumVecs": shape.sum_vecs,
        "kSumTokens": shape.sum_tokens,
        "kHasFurther": int(has_further),
    }
    return _spec("combine", num_ranks, own)


@dataclass(frozen=True)
class LowLatencyGrid:
    """How a block of the low-latency kernels divides its work: see comm/crews.cuh.

    Attributes:
        num_groups: Groups of a block that send, at most 13; each sends a part of a row at a time.
        group_warps: Warps of a group.
        receive_warps: Warps of a block that only receive: some in dispatch, none in combine.
        batch_entries: Choices that a block has in hand at a time, at least 32.
        kept_entries: Choices of all ranks that a block of dispatch keeps once it has read them;
            more are read again.
        cell_tokens: Tokens up to which a rank's rows cross as cells, at most
            ``cuda_layout.MAX_CELL_TOKENS``.
    """

    num_groups: int
    group_warps: int
    receive_warps: int
    batch_entries: int
    kept_entries: int
    cell_tokens: int

    @property
    def num_threads(self) -> int:
        """Threads of a block."""
        return (self.num_groups * self.group_warps + self.receive_warps) * 32


@cache
def low_latency_dispatch_spec(num_ranks: int, is_fp8: bool, grid: LowLatencyGrid) -> KernelSpec:
    """Return the spec of low_latency_dispatch.cu."""
    own = {
        "kLowLatencyDispatchParamsBytes": cuda_params.LOW_LATENCY_DISPATCH.itemsize,
        "kIsFp8": int(is_fp8),
    }
    return _low_latency_spec("low_latency_dispatch", num_ranks, grid, own)


def low_latency_dispatch_bytes(num_ranks: int, num_local_experts: int) -> int:
    """Return the dynamic shared memory of a block of low_latency_dispatch.cu."""
    return num_local_experts * (_SPAN_BYTES + num_ranks * _COUNT_BYTES)


@cache
def low_latency_combine_spec(num_ranks: int, grid: LowLatencyGrid) -> KernelSpec:
    """Return the spec of low_latency_combine.cu."""
    own = {
        "kLowLatencyCombineParamsBytes": cuda_params.LOW_LATENCY_COMBINE.itemsize,
        "kNumSumStages": _SUM_STAGES,
        "kStageVectors": _STAGE_VECTORS,
    }
    return _low_latency_spec("low_latency_combine", num_ranks, grid, own)


def low_latency_combine_bytes(grid: LowLatencyGrid, num_local_experts: int) -> int:
    """Return the dynamic shared memory of a block of low_latency_combine.cu."""
    stages = _SUM_STAGES * _STAGE_VECTORS * _VECTOR_BYTES * grid.num_threads
    return stages + num_local_experts * _SPAN_BYTES


def _low_latency_spec(
    name: str, num_ranks: int, grid: LowLatencyGrid, own: Mapping[str, int]
) -> KernelSpec:
    common = {
        "kLowLatencyStateBytes": cuda_params.LOW_LATENCY_STATE.itemsize,
        "kNumGroups": grid.num_groups,
        "kGroupWarps": grid.group_warps,
        "kNumReceiveWarps": grid.receive_warps,
        "kBatchEntries": grid.batch_entries,
        "kKeptEntries": grid.kept_entries,
        "kCellTokens": grid.cell_tokens,
        **cuda_layout.low_latency_constants(num_ranks),
    }
    return _spec(name, num_ranks, {**common, **own})


def _spec(name: str, num_ranks: int, own: Mapping[str, int]) -> KernelSpec:
    constants = {**cuda_layout.constants(num_ranks), **own}
    return KernelSpec(name, tuple(sorted(constants.items())))


def all_specs(has_bulk: bool) -> Iterator[KernelSpec]:
    """Yield every kernel in every configuration that the engine uses."""
    from epcomm.engines import cuda_tuning

    dispatch_grid = cuda_tuning.LOW_LATENCY_DISPATCH_GRID
    combine_grid = cuda_tuning.LOW_LATENCY_COMBINE_GRID
    for num_ranks in range(1, cuda_layout.MAX_RANKS + 1):
        yield layout_spec(num_ranks)
        yield agree_spec(num_ranks)
        yield route_spec(num_ranks)
        for num_stages in cuda_tuning.STAGES:
            yield dispatch_spec(num_ranks, has_bulk, num_stages)
        for dtype in COMBINE_DTYPES:
            for has_further in (False, True):
                for shape in cuda_tuning.combine_shapes(num_ranks, has_further):
                    yield combine_spec(num_ranks, has_bulk, dtype, shape, has_further)
        for is_fp8 in (False, True):
            yield low_latency_dispatch_spec(num_ranks, is_fp8, dispatch_grid)
        yield low_latency_combine_spec(num_ranks, combine_grid)
