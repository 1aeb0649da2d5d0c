"""Ranks on the CPU: slabs in plain memory, and the engine's calls on emulated kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from emulator.build import Toolchain, pointer
from epcomm import cuda_layout
from epcomm.engines import cuda_params
from epcomm.engines.cuda_dispatch import Launch
from epcomm.engines.cuda_tuning import ring_bytes
from epcomm.jit import kernels

Array = npt.NDArray[Any]

PHASES = {
    1: "arrival",
    2: "counts",
    3: "staged rows",
    4: "combine rows",
    5: "received",
    6: "tables",
    7: "low-latency rows",
    8: "low-latency cells",
}
FAILURES = {
    1: "timeout",
    2: "peer gave up",
    3: "mismatch",
    4: "too many rows",
    5: "bad expert",
    6: "expert twice",
    7: "low-latency mismatch",
    8: "bad choices",
}

_GUARD_BYTES = 256
_ALIGNMENT = 256


class CallFailed(Exception):
    """A kernel wrote a failure record.

    Attributes:
        record: A copy of it.
        failure: Its name.
        phase: The wait's name, where one failed.
    """

    def __init__(self, record: Array) -> None:
        self.record = record.copy()
        self.failure = FAILURES[int(record["failure"])]
        self.phase = PHASES.get(int(record["phase"]), "")
        super().__init__(f"{self.failure}: {self.record}")


class RanksAsThreads:
    """Ranks of a group, each a thread of this process while it calls.

    Attributes:
        toolchain: What their kernels run on.
        ranks: The ranks.
    """

    toolchain: Toolchain
    ranks: list[Any]

    def run(self, function: Callable[[Any], object]) -> None:
        """Call a function for every rank at once; raises what was raised first."""
        raised: list[BaseException] = []

        def one(rank: Any) -> None:
            try:
                function(rank)
            except BaseException as error:
                raised.append(error)
                self.toolchain.stop()

        self._run(one)
        if raised:
            self.toolchain.reset()
            raise raised[0]

    def failures(self, function: Callable[[Any], object]) -> list[CallFailed | None]:
        """Call a function for every rank at once; return the calls' failures."""
        failed: list[CallFailed | None] = [None] * len(self.ranks)

        def one(rank: Any) -> None:
            try:
                function(rank)
            except CallFailed as error:
                failed[rank.rank] = error

        self._run(one)
        return failed

    def _run(self, function: Callable[[Any], None]) -> None:
        with ThreadPoolExecutor(len(self.ranks)) as pool:
            list(pool.map(function, self.ranks))


class Memory:
    """One rank's memory: every array starts poisoned and lies between guards."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._guards: list[tuple[str, Array, int]] = []

    def empty(self, name: str, shape: Sequence[int], dtype: Any) -> Array:
        """Return a poisoned array, aligned as a GPU's allocations are."""
        num_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        whole = np.empty(num_bytes + 2 * _GUARD_BYTES + _ALIGNMENT, np.uint8)
        skip = -(pointer(whole) + _GUARD_BYTES) % _ALIGNMENT
        whole = whole[skip : skip + num_bytes + 2 * _GUARD_BYTES]
        mark = int(self._rng.integers(1, 256))
        whole[:] = mark
        self._guards.append((name, whole, mark))
        inner = whole[_GUARD_BYTES : _GUARD_BYTES + num_bytes]
        inner[:] = self._rng.integers(0, 256, num_bytes, np.uint8)
        return inner.view(dtype).reshape(shape)

    def zeros(self, name: str, shape: Sequence[int], dtype: Any) -> Array:
        """Return an array of zeros."""
        array = self.empty(name, shape, dtype)
        array[...] = np.zeros((), dtype)
        return array

    def copy(self, name: str, values: Array | None) -> Array | None:
        """Return a copy, contiguous; None for None."""
        if values is None:
            return None
        array = self.empty(name, values.shape, values.dtype)
        array[...] = values
        return array

    def check(self) -> None:
        """Check that no guard was written, and forget all but the first arrays."""
        for name, whole, mark in self._guards:
            if (whole[:_GUARD_BYTES] != mark).any():
                raise AssertionError(f"memory before {name} was written")
            if (whole[-_GUARD_BYTES:] != mark).any():
                raise AssertionError(f"memory behind {name} was written")

    def forget_since(self, mark: int) -> None:
        """Forget all arrays but the first so many."""
        del self._guards[mark:]

    def __len__(self) -> int:
        return len(self._guards)


_COMBINE_SHAPE = kernels.CombineShape(
    num_threads=128, num_send_warps=2, num_stages=3, sum_vecs=3, sum_tokens=2
)


@dataclass(frozen=True)
class Grid:
    """How calls are divided: by less than on a GPU, so that few tokens make many parts.

    Attributes:
        has_bulk: Whether rows move by bulk copies.
        num_blocks: Blocks of dispatch and combine.
        num_threads: Threads of the blocks of layout and route.
        num_stage_warps: Warps of a block of dispatch that stage.
        num_fetch_warps: And those that fetch.
        num_stages: Rows that a fetching warp keeps in flight.
        combine: How combine divides its work.
        unit_rows: Rows that combine sends under one flag.
    """

    has_bulk: bool = True
    num_blocks: int = 2
    num_threads: int = 64
    num_stage_warps: int = 2
    num_fetch_warps: int = 2
    num_stages: int = 3
    combine: kernels.CombineShape = _COMBINE_SHAPE
    unit_rows: int = 3

    def layout_spec(self, num_ranks: int) -> kernels.KernelSpec:
        """Return the spec of layout.cu."""
        return self._divided(kernels.layout_spec(num_ranks))

    def agree_spec(self, num_ranks: int) -> kernels.KernelSpec:
        """Return the spec of agree.cu."""
        return self._divided(kernels.agree_spec(num_ranks))

    def route_spec(self, num_ranks: int) -> kernels.KernelSpec:
        """Return the spec of route.cu."""
        return self._divided(kernels.route_spec(num_ranks))

    def dispatch_spec(self, num_ranks: int) -> kernels.KernelSpec:
        """Return the spec of dispatch.cu."""
        return self._divided(kernels.dispatch_spec(num_ranks, self.has_bulk, self.num_stages))

    def combine_spec(
        self, num_ranks: int, dtype: str, has_further: bool = False
    ) -> kernels.KernelSpec:
        """Return the spec of combine.cu."""
        return self._divided(
            kernels.combine_spec(num_ranks, self.has_bulk, dtype, self.combine, has_further)
        )

    def _divided(self, spec: kernels.KernelSpec) -> kernels.KernelSpec:
        own = {"kNumStageWarps": self.num_stage_warps}
        return replace(spec, constants=tuple(sorted((dict(spec.constants) | own).items())))


@dataclass(frozen=True)
class Further:
    """Rows that a combine adds behind those of the ranks.

    Attributes:
        rows: ``[n, hidden]``.
        weights: ``[n, num_topk]``, or None.
        places: ``[num_tokens, num_further] int32`` row of each token, or -1.
    """

    rows: Array
    weights: Array | None
    places: Array


@dataclass(frozen=True)
class Areas(cuda_layout.Areas):
    """The areas of a slab whose staged units are the grid's."""

    grid: Grid

    @property
    def stage_flag_units(self) -> int:
        """Units that each source may stage in one dispatch."""
        return -(-self.list_tokens // self.grid.num_stage_warps)


@dataclass(frozen=True)
class Sizes:
    """What one group's slabs have room for.

    Attributes:
        num_ranks: Ranks of the group.
        num_tokens: Most tokens of a rank.
        staged_row_bytes: Longest staged row.
        slot_row_bytes: Longest row of combine with its weights.
    """

    num_ranks: int
    num_tokens: int
    staged_row_bytes: int
    slot_row_bytes: int


@dataclass
class Handle:
    """What route.cu left for the calls that follow it."""

    positions: Array
    work: Array
    counts: Array
    summary: Array
    host: Array
    num_experts: int

    @property
    def num_recv(self) -> int:
        """Rows that arrive."""
        return int(self.summary["num_recv"])


@dataclass
class Received:
    """What dispatch.cu writes; None where it was not given.

    Attributes:
        rows: The rows.
        scales: Their scales.
        topk_idx: Their choices.
        topk_weights: And weights.
        poison: What all of these held before, by name.
    """

    rows: Array
    scales: Array | None
    topk_idx: Array | None
    topk_weights: Array | None
    poison: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        arrays = {name: value for name, value in vars(self).items() if name != "poison"}
        self.poison = {name: a.copy() for name, a in arrays.items() if a is not None}

    def leading(self, num_rows: int) -> Received:
        """Return the first rows."""
        arrays = (self.rows, self.scales, self.topk_idx, self.topk_weights)
        return Received(*(None if a is None else a[:num_rows] for a in arrays))  # type: ignore[arg-type]


class Rank:
    """One rank: its memory, and its calls, in stream order."""

    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank = world, rank
        self.rng = np.random.default_rng((world.seed, rank))
        self.memory = Memory(self.rng)
        self.slab = self.memory.zeros("the slab", (world.areas.num_bytes,), np.uint8)
        self.state = self.memory.zeros("the call state", (cuda_params.CALL_STATE_BYTES,), np.uint8)
        self.record = self.memory.zeros("the record", (), cuda_params.FAILURE_RECORD)
        #: Deadline of every wait.
        self.timeout_s = world.timeout_s
        self._num_permanent = len(self.memory)
        self.poison()

    @property
    def num_ranks(self) -> int:
        """Ranks of the group."""
        return self.world.sizes.num_ranks

    def poison(self) -> None:
        """Fill the slab's areas, flags apart, which live from call to call; no call may run."""
        areas = self.world.areas
        for begin, end in (
            (areas.lists_offset, areas.flags_offset),
            (areas.stage_offset, areas.num_bytes),
        ):
            self.slab[begin:end] = self.rng.integers(0, 256, end - begin, np.uint8)

    def check_memory(self) -> None:
        """Check all guards and forget the arrays of the calls so far."""
        self.memory.check()
        self.memory.forget_since(self._num_permanent)

    # --- calls ---------------------------------------------------------------------------------

    def layout(self, topk_idx: Array, num_experts: int) -> tuple[Array, Array, Array]:
        """Return tokens by rank, pairs by expert and is_token_in_rank."""
        num_tokens, num_topk = topk_idx.shape
        params = np.zeros((), cuda_params.LAYOUT)
        idx = self._own("topk_idx", topk_idx)
        per_rank = self.memory.empty("num_tokens_per_rank", (self.num_ranks,), np.int32)
        per_expert = self.memory.empty("num_tokens_per_expert", (num_experts,), np.int32)
        in_rank = self.memory.empty("is_token_in_rank", (num_tokens, self.num_ranks), np.bool_)
        params["topk_idx"] = pointer(idx)
        params["num_tokens_per_rank"] = pointer(per_rank)
        params["num_tokens_per_expert"] = pointer(per_expert)
        params["is_token_in_rank"] = pointer(in_rank)
        params["record"] = pointer(self.record)
        params["num_tokens"] = num_tokens
        params["num_topk"] = num_topk
        params["num_experts"] = num_experts
        params["is_64_bit"] = topk_idx.dtype == np.int64
        shared_bytes = 4 * (num_experts + self.num_ranks)
        self._launch(
            self.world.grid.layout_spec(self.num_ranks), params, num_blocks=1, shared=shared_bytes
        )
        return per_rank, per_expert, in_rank

    def route(
        self,
        is_token_in_rank: Array,
        num_tokens_per_expert: Array,
        num_worst_tokens: int = 0,
        *,
        topk_idx: Array | None = None,
        header: dict[str, int] | None = None,
        work_rows: int | None = None,
    ) -> Handle:
        """Work out all positions.

        Args:
            is_token_in_rank: From `layout`.
            num_tokens_per_expert: From `layout`.
            num_worst_tokens: Room at the receiver, 0 for as much as it needs.
            topk_idx: Choices from which the kernel makes the layout itself, or None.
            header: Values of the header that are not zero.
            work_rows: Room of the work list; the most that can be where None.
        """
        num_tokens, num_experts = len(is_token_in_rank), len(num_tokens_per_expert)
        if work_rows is None:
            work_rows = (self.num_ranks - 1) * self.world.areas.list_tokens
        shape = (num_tokens, self.num_ranks)
        handle = Handle(
            positions=self.memory.empty("positions", shape, np.int32),
            work=self.memory.empty("work", (work_rows, 2), np.uint32),
            counts=self.memory.empty("counts", (self.num_ranks,) * 2, np.int32),
            summary=self.memory.empty("the summary", (), cuda_params.ROUTE_SUMMARY),
            host=self.memory.empty("the host's summary", (), cuda_params.HOST_SUMMARY),
            num_experts=num_experts,
        )
        own = {"call": 1, "num_experts": num_experts, **(header or {})}
        params = np.zeros((), cuda_params.ROUTE)
        params["call"] = self._call(own, num_tokens, num_worst_tokens)
        if topk_idx is None:
            params["is_token_in_rank"] = pointer(self._own("is_token_in_rank", is_token_in_rank))
            params["num_tokens_per_expert"] = pointer(self._own("pairs", num_tokens_per_expert))
        else:
            # Frameworks give no address to an array without elements.
            params["topk_idx"] = pointer(self._own("choices", topk_idx)) if topk_idx.size else 0
            params["num_topk"] = topk_idx.shape[1]
            params["is_64_bit"] = topk_idx.dtype == np.int64
            params["makes_layout"] = True
        for name in ("positions", "work", "counts", "summary", "host"):
            params[name] = pointer(getattr(handle, name))
        params["ticket"] = ticket = int(self.rng.integers(1, 1 << 62))
        params["num_tokens"] = num_tokens
        params["num_experts"] = num_experts
        params["num_worst_tokens"] = num_worst_tokens
        self._launch(self.world.grid.route_spec(self.num_ranks), params, num_blocks=self.num_ranks)
        if handle.host["ticket"] != ticket:
            raise AssertionError("route.cu did not tell the host")
        return handle

    def agree(self, header: dict[str, int]) -> None:
        """Meet all ranks and compare headers."""
        params = np.zeros((), cuda_params.AGREE)
        params["call"] = self._call(header, 0)
        spec = self.world.grid.agree_spec(self.num_ranks)
        self._launch(spec, params, num_blocks=1, num_threads=32)

    def dispatch(
        self,
        handle: Handle,
        rows: Array,
        *,
        scales: Array | None = None,
        topk_idx: Array | None = None,
        topk_weights: Array | None = None,
        num_worst_tokens: int = 0,
        num_out: int | None = None,
        launch: Launch = Launch.WHOLE,
        header: dict[str, int] | None = None,
    ) -> Received:
        """Move rows ``[num_tokens, row_bytes] u8`` and what travels with them.

        Args:
            handle: Their routes.
            rows: The rows.
            scales: Of the rows, or None.
            topk_idx: Choices, or None.
            topk_weights: Their weights.
            num_worst_tokens: As given to `route`.
            num_out: Rows of the outputs; as many as arrive where None.
            launch: What the host knows.
            header: Values of the header that are not zero.
        """
        num_tokens, row_bytes = rows.shape
        if num_out is None:
            num_out = num_worst_tokens or handle.num_recv
        num_scales = 0 if scales is None else scales.shape[1]
        num_topk = 0 if topk_idx is None else topk_idx.shape[1]

        def out(name: str, like: Array | None) -> Array | None:
            if like is None:
                return None
            return self.memory.empty(name, (num_out, *like.shape[1:]), like.dtype)

        received_rows = out("received rows", rows)
        assert received_rows is not None
        received = Received(
            received_rows,
            out("received scales", scales),
            out("received choices", topk_idx),
            out("received weights", topk_weights),
        )
        params = np.zeros((), cuda_params.DISPATCH)
        own = {"call": 2, "hidden": row_bytes, "num_scales": num_scales, "num_topk": num_topk}
        params["call"] = self._call(own | (header or {}), num_tokens, num_worst_tokens)
        params["rows"] = pointer(self._own("rows", rows))
        if scales is not None:
            # Strides as they are: a copy would make them plain.
            params["scales"] = pointer(scales)
            params["scales_token_stride"] = scales.strides[0] // 4
            params["scales_stride"] = scales.strides[1] // 4
        params["topk_idx"] = pointer(self._own("choices", topk_idx))
        params["topk_weights"] = pointer(self._own("weights", topk_weights))
        params["recv_rows"] = pointer(received.rows)
        params["recv_scales"] = pointer(received.scales)
        params["recv_topk_idx"] = pointer(received.topk_idx)
        params["recv_topk_weights"] = pointer(received.topk_weights)
        params["num_out_rows"] = num_out
        params["launch"] = launch.value
        for name in ("positions", "work", "summary"):
            params[name] = pointer(getattr(handle, name))
        num_local = handle.num_experts // self.num_ranks
        staged_row_bytes = staged_bytes(row_bytes, num_scales, num_topk)
        params["num_tokens"] = num_tokens
        params["row_bytes"] = row_bytes
        params["num_scales"] = num_scales
        params["num_topk"] = num_topk
        params["is_64_bit"] = topk_idx is not None and topk_idx.dtype == np.int64
        params["num_worst_tokens"] = num_worst_tokens
        params["first_expert"] = self.rank * num_local
        params["num_local_experts"] = num_local
        params["staged_row_bytes"] = staged_row_bytes
        grid = self.world.grid
        self._launch(
            grid.dispatch_spec(self.num_ranks),
            params,
            num_blocks=grid.num_blocks,
            num_threads=32 * (grid.num_stage_warps + grid.num_fetch_warps),
            shared=ring_bytes(grid.num_fetch_warps, grid.num_stages, staged_row_bytes),
        )
        return received

    def combine(
        self,
        handle: Handle,
        rows: Array,
        *,
        topk_weights: Array | None = None,
        biases: Sequence[Array] = (),
        further: Further | None = None,
        header: dict[str, int] | None = None,
    ) -> tuple[Array, Array | None]:
        """Sum rows ``[num_recv, hidden]`` at their tokens' ranks."""
        num_tokens = len(handle.positions)
        row_bytes = rows.shape[1] * rows.dtype.itemsize
        num_topk = 0 if topk_weights is None else topk_weights.shape[1]
        out_rows = self.memory.empty("sums", (num_tokens, rows.shape[1]), rows.dtype)
        out_weights = None
        params = np.zeros((), cuda_params.COMBINE)
        own = {"call": 3, "hidden": rows.shape[1], "num_topk": num_topk}
        params["call"] = self._call(own | (header or {}), num_tokens)
        params["rows"] = pointer(self._own("expert rows", rows))
        if topk_weights is not None:
            out_weights = self.memory.empty("sums of weights", (num_tokens, num_topk), np.float32)
            params["weights"] = pointer(self._own("weights", topk_weights))
            params["out_weights"] = pointer(out_weights)
        for i, bias in enumerate(biases):
            params["bias"][i] = pointer(self._own("a bias", bias))
        if further is not None:
            params["further_rows"] = pointer(self._own("further rows", further.rows))
            params["further_places"] = pointer(self._own("further places", further.places))
            params["num_further"] = further.places.shape[1]
            if further.weights is not None:
                params["further_weights"] = pointer(self._own("further weights", further.weights))
        params["out_rows"] = pointer(out_rows)
        for name in ("positions", "counts", "summary"):
            params[name] = pointer(getattr(handle, name))
        grid = self.world.grid
        params["num_tokens"] = num_tokens
        params["row_bytes"] = row_bytes
        params["num_topk"] = num_topk
        params["unit_rows"] = grid.unit_rows
        shape = grid.combine
        self._launch(
            grid.combine_spec(self.num_ranks, rows.dtype.name, further is not None),
            params,
            num_blocks=grid.num_blocks,
            num_threads=grid.combine.num_threads,
            shared=ring_bytes(shape.num_send_warps, shape.num_stages, grid.unit_rows * row_bytes),
        )
        return out_rows, out_weights

    # --- their parts ---------------------------------------------------------------------------

    def _own(self, name: str, values: Array | None) -> Array | None:
        return self.memory.copy(name, values)

    def _call(self, header: dict[str, int], num_tokens: int, num_worst_tokens: int = 0) -> Array:
        call = np.zeros((), cuda_params.CALL)
        areas, slabs = self.world.areas, call["slabs"]
        slabs["base"][: self.num_ranks] = [pointer(rank.slab) for rank in self.world.ranks]
        for name in ("lists", "flags", "stage_flags", "stage", "slots"):
            slabs[f"{name}_offset"] = getattr(areas, f"{name}_offset")
        for name in ("stage_bytes", "slot_bytes", "list_tokens", "flag_units", "stage_flag_units"):
            slabs[name] = getattr(areas, name)
        call["state"] = pointer(self.state)
        call["record"] = pointer(self.record)
        call["timeout_ns"] = int(self.timeout_s * 1e9)
        call["rank"] = self.rank
        for name, value in header.items():
            call["header"][cuda_layout.AGREED.index(name)] = value
        call["header"][len(cuda_layout.AGREED) :][:2] = num_tokens, num_worst_tokens
        return call

    def _launch(
        self,
        spec: kernels.KernelSpec,
        params: Array,
        *,
        num_blocks: int,
        num_threads: int | None = None,
        shared: int = 0,
    ) -> None:
        self.world.toolchain.launch(
            spec,
            num_blocks=num_blocks,
            num_threads=num_threads or self.world.grid.num_threads,
            params=params,
            shared_bytes=shared,
            seed=int(self.rng.integers(1 << 62)),
            rank=self.rank,
        )
        if self.record["failure"]:
            failed = CallFailed(self.record)
            self.record["failure"] = 0
            raise failed


class World(RanksAsThreads):
    """All ranks of a group, threads of this process.

    Args:
        toolchain: What compiles and launches.
        sizes: What the slabs have room for.
        grid: How calls are launched.
        seed: Draws poison and the order of threads.
        timeout_s: Deadline of every wait.
    """

    def __init__(
        self,
        toolchain: Toolchain,
        sizes: Sizes,
        grid: Grid,
        *,
        seed: int = 0,
        timeout_s: float = 60.0,
    ) -> None:
        self.toolchain, self.sizes, self.grid = toolchain, sizes, grid
        self.seed, self.timeout_s = seed, timeout_s
        areas = cuda_layout.areas_for(
            sizes.num_ranks, sizes.num_tokens, sizes.staged_row_bytes, sizes.slot_row_bytes
        )
        self.areas = Areas(**vars(areas), grid=grid)
        self.ranks: list[Rank] = []
        self.ranks += [Rank(self, rank) for rank in range(sizes.num_ranks)]


def staged_bytes(row_bytes: int, num_scales: int, num_topk: int) -> int:
    """Return the bytes of a row with all that travels with it."""
    return -(-(row_bytes + 4 * num_scales + 8 * num_topk) // 16) * 16
