"""Low-latency calls on the emulator: ranks in this process, held to the oracle bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from ranks import oracle

from emulator.build import Toolchain, pointer
from emulator.world import Array, CallFailed, Memory, RanksAsThreads
from epcomm import cuda_layout
from epcomm.engines import cuda_params, cuda_tuning
from epcomm.engines.base import CombinePrecision, Fp8Format, LowLatencyShape
from epcomm.fp8 import BLOCK, num_scales
from epcomm.jit import kernels

BF16 = np.dtype(ml_dtypes.bfloat16)
SENDS, RECEIVES = 1, 2
_DISPATCH, _COMBINE = 1, 2
_CASTS = {
    Fp8Format.FLOAT_SCALES: "plain",
    Fp8Format.POWER_OF_TWO_SCALES: "rounded",
    Fp8Format.PACKED_UE8M0_SCALES: "packed",
}


class Grids(NamedTuple):
    """How the blocks of both kernels divide their work."""

    dispatch: kernels.LowLatencyGrid
    combine: kernels.LowLatencyGrid


def _grids(num_groups: int, group_warps: int, receive_warps: int, **rest: int) -> Grids:
    combine = kernels.LowLatencyGrid(num_groups, group_warps, receive_warps=0, **rest)
    return Grids(replace(combine, receive_warps=receive_warps), combine)


#: Less than on a GPU, so that few tokens make many parts and batches.
# Ranks with few tokens send cells, others flags; some cases' choices are kept, others read again.
_GRIDS = _grids(2, 1, 2, batch_entries=32, kept_entries=48, cell_tokens=4)
_WIDE = _grids(2, 2, 3, batch_entries=64, kept_entries=32, cell_tokens=2)
_AS_ON_A_GPU = Grids(cuda_tuning.LOW_LATENCY_DISPATCH_GRID, cuda_tuning.LOW_LATENCY_COMBINE_GRID)


@dataclass(frozen=True)
class Case:
    """One shape of low-latency calls.

    Attributes:
        name: Its id.
        num_tokens: Tokens by rank; in every round each rank takes the next one's.
        num_max: Most tokens of a rank.
        hidden: Elements of a row.
        num_topk: Choices of a token.
        num_local: Experts of a rank.
        routing: "uniform", "some" (choices left out), "few" (low experts above all), "one" (expert
            for all) or "none".
        fp8: What dispatch sends.
        precision: What combine sends.
        idx_dtype: Dtype of the choices.
        num_parts: Parts of the rows of rank r: entry r, over and over.
        has_hooks: Whether kernels send and receive apart, two calls at a time.
        can_mask: Whether ranks that do not answer would be masked.
        num_rounds: Rounds.
        num_blocks: Blocks of each kernel.
        grids: How these divide their work.
    """

    name: str
    num_tokens: tuple[int, ...]
    num_max: int
    hidden: int = 128
    num_topk: int = 3
    num_local: int = 4
    routing: str = "some"
    fp8: Fp8Format = Fp8Format.NONE
    precision: CombinePrecision = CombinePrecision.RANK
    idx_dtype: type[np.signedinteger[Any]] = np.int64
    num_parts: tuple[int, ...] = (1, 2)
    has_hooks: bool = False
    can_mask: bool = False
    num_rounds: int = 4
    num_blocks: int = 2
    grids: Grids = _GRIDS

    @property
    def num_ranks(self) -> int:
        return len(self.num_tokens)

    @property
    def num_experts(self) -> int:
        return self.num_ranks * self.num_local

    @property
    def num_rows(self) -> int:
        return self.num_ranks * self.num_max

    @property
    def shape(self) -> LowLatencyShape:
        return LowLatencyShape(self.num_max, self.hidden, self.num_experts, self.num_ranks)

    def parts(self, rank: int, row_bytes: int) -> int:
        """Return the parts that a rank's rows are cut into: no part is empty."""
        granules = -(-row_bytes // cuda_tuning.GRANULE_BYTES)
        wanted = min(self.num_parts[rank % len(self.num_parts)], granules)
        return -(-granules // -(-granules // wanted))

    def specs(self) -> list[kernels.KernelSpec]:
        """Return the kernels that it needs."""
        is_fp8 = self.fp8 is not Fp8Format.NONE
        return [
            kernels.low_latency_dispatch_spec(self.num_ranks, is_fp8, self.grids.dispatch),
            kernels.low_latency_combine_spec(self.num_ranks, self.grids.combine),
        ]


_FLOAT, _POWERS = Fp8Format.FLOAT_SCALES, Fp8Format.POWER_OF_TWO_SCALES
_PACKED, _EXPERT = Fp8Format.PACKED_UE8M0_SCALES, CombinePrecision.EXPERT

CASES = (
    Case("one rank alone", (5,), 6, fp8=_FLOAT, has_hooks=True),
    Case("two ranks, bf16", (9, 4), 9, hidden=72, num_rounds=6),
    Case("two ranks, fp8", (7, 3), 8, hidden=640, fp8=_FLOAT, num_parts=(2, 3), num_rounds=6),
    Case("two ranks by expert", (6, 9), 9, hidden=40, precision=_EXPERT, idx_dtype=np.int32),
    Case("no tokens", (0, 0), 2, fp8=_POWERS, num_rounds=2),
    Case("no choice at all", (4, 2), 4, routing="none", num_rounds=2),
    Case(
        "three ranks, packed",
        (6, 0, 3),
        6,
        hidden=1536,
        fp8=_PACKED,
        num_parts=(3, 1, 2),
        num_rounds=12,
    ),
    Case(
        "three ranks, odd rows", (1, 12, 5), 12, hidden=264, num_local=3, num_rounds=12, grids=_WIDE
    ),
    Case("four ranks, hooks", (5, 0, 8, 2), 8, fp8=_FLOAT, has_hooks=True, num_rounds=6),
    Case(
        "four ranks by expert, hooks",
        (3, 7, 0, 5),
        7,
        hidden=520,
        num_topk=6,
        precision=_EXPERT,
        has_hooks=True,
        idx_dtype=np.int32,
    ),
    Case("four ranks, one block", (6, 2, 9, 4), 9, fp8=_POWERS, num_blocks=1, routing="few"),
    Case("most choices", (3, 5), 5, num_topk=32, num_local=32, fp8=_FLOAT, routing="uniform"),
    Case("more experts than ranges kept", (7, 5), 7, num_local=300, routing="uniform"),
    Case("one expert takes all", (9, 6, 11), 11, routing="one", num_topk=2),
    Case("eight ranks", (2, 0, 1, 3, 4, 1, 0, 2), 4, num_local=2, fp8=_FLOAT),
    Case("three ranks that may be masked", (3, 5, 1), 5, can_mask=True),
    Case("eight ranks by expert", (1, 2, 0, 3, 1, 1, 2, 0), 3, num_local=1, precision=_EXPERT),
    Case("few tokens", (4, 2, 3), 4, hidden=1536, num_topk=5, fp8=_PACKED, num_parts=(3, 1, 2)),
    Case("few tokens, hooks", (1, 4), 4, hidden=1152, fp8=_FLOAT, num_parts=(2,), has_hooks=True),
    Case(
        "few tokens as on a GPU",
        (8, 1),
        8,
        hidden=7168,
        num_topk=8,
        num_local=128,
        fp8=_FLOAT,
        num_parts=(7,),
        num_rounds=2,
        num_blocks=4,
        grids=_AS_ON_A_GPU,
    ),
    Case(
        "decoding as on a GPU",
        (4, 7),
        8,
        hidden=7168,
        num_topk=8,
        num_local=16,
        fp8=_FLOAT,
        num_parts=(7, 3),
        num_rounds=2,
        grids=_AS_ON_A_GPU,
    ),
)

#: What ThreadSanitizer watches.
_WATCHED = _grids(2, 1, 2, batch_entries=32, kept_entries=32, cell_tokens=3)
WATCHED_CASES = (
    Case(
        "watched decoding",
        (4, 3),
        4,
        num_topk=12,
        num_local=6,
        routing="uniform",
        fp8=_FLOAT,
        num_rounds=2,
        grids=_WATCHED,
    ),
    Case(
        "watched decoding, hooks",
        (3, 4),
        4,
        precision=_EXPERT,
        has_hooks=True,
        num_rounds=2,
        grids=_WATCHED,
    ),
    Case("watched few tokens", (3, 2), 3, fp8=_FLOAT, num_rounds=3, grids=_WATCHED),
    Case("watched masks", (4, 3), 4, can_mask=True, num_rounds=2, grids=_WATCHED),
)


# --- ranks -------------------------------------------------------------------------------------


@dataclass
class Received:
    """What a dispatch writes."""

    rows: Array
    scales: Array | None
    count: Array
    src_info: Array
    layout_range: Array


#: Launches the kernel that receives.
Receive = Callable[[], None]


class Rank:
    """One rank: its memory, and its low-latency calls, in stream order."""

    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank = world, rank
        self.rng = np.random.default_rng((world.seed, rank))
        self.memory = Memory(self.rng)
        self.slab = self.memory.zeros("the slab", (world.slab_bytes,), np.uint8)
        self.state = self.memory.zeros("the state", (), cuda_params.LOW_LATENCY_STATE)
        self.record = self.memory.zeros("the record", (), cuda_params.FAILURE_RECORD)
        self.masks = self.memory.zeros("the masks", (world.num_ranks,), np.uint32)
        self.can_mask = world.can_mask
        #: Deadline of every wait.
        self.timeout_s = world.timeout_s
        self._num_permanent = len(self.memory)

    def poison(self) -> None:
        """Fill the slots' rows; no call may run."""
        begin = cuda_layout.low_latency_rows_offset(self.world.num_ranks)
        self.slab[begin:] = self.rng.integers(0, 256, len(self.slab) - begin, np.uint8)

    def check_memory(self) -> None:
        """Check all guards and forget the arrays of the calls so far."""
        self.memory.check()
        self.memory.forget_since(self._num_permanent)

    def let_peers_be_ahead(self) -> None:
        """Have all peers say that they received the first call, as if this rank's blocks lagged.

        NOTE: not with hooks, where the third call would take it for what it is not.
        """
        offset = cuda_layout.low_latency_constants(self.world.num_ranks)[
            "kOffsetLowLatencyReceived"
        ]
        cells = self.slab[offset:].view(np.uint32)
        cells[cuda_layout.MAX_RANKS :][: self.world.num_ranks] = 1  # of slot 1
        for peer in self.world.ranks:
            peer.state["blocks"]["slot_received"][:, 1] = 1  # they post it again

    def dispatch(
        self,
        case: Case,
        rows: Array,
        topk_idx: Array,
        *,
        has_hook: bool = False,
        recv_stats: Array | None = None,
        wait_stats: Array | None = None,
        shape: dict[str, int] | None = None,
    ) -> tuple[Received, Receive]:
        """Send rows; with a hook they are received by the function that comes back."""
        local, num_rows, fp8 = case.num_local, case.num_rows, case.fp8
        number = num_scales(fp8, case.hidden)
        is_fp8 = fp8 is not Fp8Format.NONE
        empty = self.memory.empty
        data_bytes = case.hidden * (1 if is_fp8 else 2)
        scales = empty("scales", (local, number, num_rows), np.uint32) if is_fp8 else None
        received = Received(
            empty("received rows", (local, num_rows, data_bytes), np.uint8),
            scales,
            empty("recv_count", (local,), np.int32),
            empty("src_info", (local, num_rows), np.int32),
            empty("layout_range", (local, case.num_ranks), np.int64),
        )
        # Inputs may change once they were sent.
        own_rows = self.memory.copy("rows", rows.view(np.uint8))
        own_idx = self.memory.copy("choices", topk_idx)
        assert own_rows is not None
        assert own_idx is not None
        params = np.zeros((), cuda_params.LOW_LATENCY_DISPATCH)
        call = {"kind": _DISPATCH, "format": fp8.value, "num_tokens": len(rows)}
        call["num_parts"] = case.parts(self.rank, data_bytes)
        params["rows"], params["topk_idx"] = pointer(own_rows), pointer(own_idx)
        params["recv_rows"] = pointer(received.rows)
        params["recv_scales"] = pointer(scales)
        params["recv_count"] = pointer(received.count)
        params["src_info"] = pointer(received.src_info)
        params["layout_range"] = pointer(received.layout_range)
        params["recv_stats"] = pointer(recv_stats)
        params["is_64_bit"] = topk_idx.dtype == np.int64
        params["num_scales"] = number
        grid = case.grids.dispatch
        spec = kernels.low_latency_dispatch_spec(case.num_ranks, is_fp8, grid)
        shared = kernels.low_latency_dispatch_bytes(case.num_ranks, local)
        receive = self._start(
            case, (spec, grid), params, call | (shape or {}), has_hook, shared, wait_stats
        )
        if has_hook:
            for array in (own_rows, own_idx):
                array[...] = self.rng.integers(0, 100, array.shape)
        return received, receive

    def combine(
        self,
        case: Case,
        rows: Array,
        topk_idx: Array,
        topk_weights: Array,
        layout_range: Array,
        *,
        has_hook: bool = False,
        wait_stats: Array | None = None,
        shape: dict[str, int] | None = None,
    ) -> tuple[Array, Receive]:
        """Send experts' rows ``[local, num_rows, hidden] bf16``; see `dispatch`."""
        own = [
            self.memory.copy(name, values)
            for name, values in (("rows", rows), ("choices", topk_idx), ("weights", topk_weights))
        ]
        out = self.memory.empty("sums", (len(topk_idx), case.hidden), BF16)
        params = np.zeros((), cuda_params.LOW_LATENCY_COMBINE)
        call = {"kind": _COMBINE, "format": case.precision.value, "num_tokens": len(topk_idx)}
        call["num_parts"] = case.parts(self.rank + 1, 2 * case.hidden)
        params["rows"], params["topk_idx"], params["topk_weights"] = map(pointer, own)
        params["layout_range"] = pointer(layout_range)
        params["out"] = pointer(out)
        params["is_64_bit"] = topk_idx.dtype == np.int64
        grid = case.grids.combine
        spec = kernels.low_latency_combine_spec(case.num_ranks, grid)
        receive = self._start(
            case,
            (spec, grid),
            params,
            call | (shape or {}),
            has_hook,
            kernels.low_latency_combine_bytes(grid, case.num_local),
            wait_stats,
        )
        if has_hook:
            for array in own:
                assert array is not None
                array[...] = 0
        return out, receive

    def _start(
        self,
        case: Case,
        kernel: tuple[kernels.KernelSpec, kernels.LowLatencyGrid],
        params: Array,
        shape: dict[str, int],
        has_hook: bool,
        shared: int,
        wait_stats: Array | None,
    ) -> Receive:
        call = params["call"]
        num_ranks = self.world.num_ranks
        call["base"][:num_ranks] = [pointer(rank.slab) for rank in self.world.ranks]
        call["rows_bytes"] = self.world.rows_bytes
        values = {
            "num_max_tokens": case.num_max,
            "hidden": case.hidden,
            "num_experts": case.num_experts,
            "num_topk": case.num_topk,
            **shape,
        }
        for name, value in values.items():
            call["shape"][name] = value
        call["state"], call["record"] = pointer(self.state), pointer(self.record)
        call["masks"], call["wait_stats"] = pointer(self.masks), pointer(wait_stats)
        call["timeout_ns"] = int(self.timeout_s * 1e9)
        call["rank"], call["can_mask"] = self.rank, self.can_mask
        if has_hook:
            ticket = self.memory.empty("the ticket", (1,), np.uint32)
            call["ticket"] = pointer(ticket)
        launch = partial(self._launch, case, *kernel, shared)
        if not has_hook:
            call["phases"] = SENDS | RECEIVES
            launch(params)
            return lambda: None
        call["phases"] = SENDS
        launch(params)
        later = params.copy()
        later["call"]["phases"] = RECEIVES

        def receive() -> None:
            launch(later)
            ticket[...] = 0  # and so keeps the ticket

        return receive

    def _launch(
        self,
        case: Case,
        spec: kernels.KernelSpec,
        grid: kernels.LowLatencyGrid,
        shared: int,
        params: Array,
    ) -> None:
        self.world.toolchain.launch(
            spec,
            num_blocks=case.num_blocks,
            num_threads=grid.num_threads,
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
    """All ranks of a group, threads of this process, with slabs for some cases."""

    def __init__(
        self, toolchain: Toolchain, *cases: Case, seed: int = 0, timeout_s: float = 60.0
    ) -> None:
        self.toolchain, self.seed, self.timeout_s = toolchain, seed, timeout_s
        self.num_ranks, self.can_mask = cases[0].num_ranks, cases[0].can_mask
        self.rows_bytes = max(
            cuda_layout.low_latency_rows_bytes(case.shape, max(case.num_ranks, case.num_topk))
            for case in cases
        )
        self.slab_bytes = cuda_layout.low_latency_slab_bytes(self.num_ranks, self.rows_bytes)
        self.ranks: list[Rank] = []
        self.ranks += [Rank(self, rank) for rank in range(self.num_ranks)]


def write_table(
    case: Case,
    source: int,
    peer: Rank,
    topk_idx: Array,
    num_entries: int | None = None,
    call: int = 1,
    epoch: int = 1,
) -> None:
    """Write a rank's header and table for a call, or part of it, into a peer's slab."""
    offsets = cuda_layout.low_latency_constants(case.num_ranks)
    words = [call, case.num_max, case.hidden, case.num_experts, case.num_topk, 0, len(topk_idx), 1]
    cells = peer.slab.view(np.uint64)
    begin = offsets["kOffsetLowLatencyHeaders"] // 8 + (epoch % 2 * 8 + source) * 8
    cells[begin : begin + 8] = [(epoch << 32) | word for word in words]
    entries = offsets["kMaxLowLatencyTokens"] * offsets["kMaxLowLatencyTopk"] * 2
    begin = offsets["kOffsetLowLatencyTables"] // 8
    begin += (epoch % 2 * case.num_ranks + source) * entries
    flat = topk_idx.ravel()[:num_entries].astype(np.int64) & 0xFFFFFFFF
    cells[begin : begin + 2 * flat.size : 2] = (np.uint64(epoch) << 32) | flat.astype(np.uint64)


# --- what must come out ------------------------------------------------------------------------


@dataclass
class Inputs:
    """What one rank passes in one round.

    Attributes:
        rows: ``[num_tokens, hidden] bf16``.
        topk_idx: Choices, all different.
        topk_weights: Their weights.
        results: ``[num_tokens, num_topk, hidden] bf16`` what the chosen experts make of each token.
    """

    rows: Array
    topk_idx: Array
    topk_weights: Array
    results: Array


def choose(case: Case, rng: np.random.Generator, num_tokens: int) -> Array:
    """Return choices, those of a token all different."""
    shape = (num_tokens, case.num_topk)
    idx = np.full(shape, -1, np.int64)
    if case.routing == "one":
        idx[:, -1] = 2 * case.num_experts // 3
    if case.routing in ("none", "one"):
        return idx
    scores = rng.random((num_tokens, case.num_experts))
    if case.routing == "few":
        scores += np.arange(case.num_experts) / 4
    best = np.argsort(scores, axis=1)[:, : case.num_topk]
    idx[:, : best.shape[1]] = best
    if case.routing != "uniform":
        idx[rng.random(shape) < 0.3] = -1
        idx[rng.random(num_tokens) < 0.2] = -1
    return idx


def make_inputs(case: Case, round_index: int, rank: int, seed: int) -> Inputs:
    """Return one rank's inputs, which every rank can derive."""
    rng = np.random.default_rng((seed, round_index, rank))
    num_tokens = case.num_tokens[(rank + round_index) % case.num_ranks]
    idx = choose(case, rng, num_tokens)
    rows = rng.standard_normal((num_tokens, case.hidden), np.float32)
    if case.fp8 is not Fp8Format.NONE:
        # Blocks from far below the smallest scale to far above 448, some all zeros.
        blocks = rows.reshape(num_tokens, case.hidden // BLOCK, BLOCK)
        exponent = rng.integers(-30, 20, (*blocks.shape[:2], 1)).astype(np.float32)
        blocks *= np.float32(2) ** exponent * (rng.random(exponent.shape) < 0.95)
    sizes = np.float32(2) ** rng.integers(-24, 24, (*idx.shape, 1)).astype(np.float32)
    results = rng.standard_normal((*idx.shape, case.hidden), np.float32) * sizes
    # Some cancel, so that what is left of a sum depends on the order of its additions.
    cancels = rng.random(results[:, 1::2].shape) < 0.5
    results[:, 1::2] = np.where(cancels, -results[:, : results.shape[1] - 1 : 2], results[:, 1::2])
    weights = rng.standard_normal(idx.shape, np.float32)
    weights[::2] = 0.5
    return Inputs(
        rows=oracle.round_to(rows, BF16),
        topk_idx=idx.astype(case.idx_dtype),
        topk_weights=weights,
        results=oracle.round_to(results, BF16),
    )


def sent_by(case: Case, inputs: Inputs) -> tuple[Array, Array | None]:
    """Return what a rank's rows cross as: bytes, and words of scales or None."""
    if case.fp8 is Fp8Format.NONE:
        return inputs.rows.view(np.uint8), None
    kind = _CASTS[case.fp8]
    data, scales = oracle.cast_to_fp8(inputs.rows, is_rounded=kind != "plain")
    words: Array = oracle.pack_ue8m0(scales) if kind == "packed" else scales
    return data.view(np.uint8), words.view(np.uint32)


def same(what: str, rank: int, got: Array, want: Array) -> None:
    """Check that two arrays agree in every bit."""
    if got.shape != want.shape:
        raise AssertionError(f"rank {rank}: {what}: shape {got.shape}, want {want.shape}")
    raw = np.dtype(f"u{got.dtype.itemsize}")
    unlike = np.argwhere(
        np.ascontiguousarray(got).view(raw) != np.ascontiguousarray(want, got.dtype).view(raw)
    )
    if len(unlike):
        at = tuple(map(int, unlike[0]))
        raise AssertionError(
            f"rank {rank}: {what}: {len(unlike)} of {got.size} values differ, the first at {at}: "
            f"got {got[at]}, want {want[at]}"
        )


def check_received(
    case: Case,
    rank: int,
    got: Received,
    inputs: Sequence[Inputs],
    skipped: Sequence[int] = (),
) -> oracle.ExpertRows:
    """Check what a dispatch wrote; return where its rows are from."""
    topk = [one.topk_idx for one in inputs]
    rows = oracle.expert_rows(topk, case.num_experts, rank, skipped)
    counts = [len(origins) for origins in rows.origins]
    same("recv_count", rank, got.count, np.array(counts, np.int32))
    same("layout_range", rank, got.layout_range, rows.layout_range)
    src_info = np.full((case.num_local, case.num_rows), -1, np.int32)
    data, words = zip(*(sent_by(case, one) for one in inputs), strict=True)
    for local, origins in enumerate(rows.origins):
        end = len(origins)
        src_info[local, :end] = [token for _, token in origins]
        same(f"rows of expert {local}", rank, got.rows[local, :end], oracle.pick(data, origins))
        if got.scales is not None:
            want = oracle.pick(words, origins).T
            same(f"scales of expert {local}", rank, got.scales[local, :, :end], want)
    same("src_info", rank, got.src_info, src_info)
    return rows


def expert_rows(case: Case, rank: Rank, rows: oracle.ExpertRows, inputs: Sequence[Inputs]) -> Array:
    """Return what a rank's experts made of the rows that it received, the rest poisoned."""
    out = rank.memory.empty("experts' rows", (case.num_local, case.num_rows, case.hidden), BF16)
    for local, origins in enumerate(rows.origins):
        expert = rank.rank * case.num_local + local
        for row, (source, token) in enumerate(origins):
            k = inputs[source].topk_idx[token].tolist().index(expert)
            out[local, row] = inputs[source].results[token, k]
    return out


def wanted_sums(case: Case, own: Inputs, skipped: Sequence[int] = ()) -> Array:
    """Return what a combine gives a rank."""
    return oracle.low_latency_combine(
        own.results,
        own.topk_idx,
        own.topk_weights,
        case.num_local,
        case.precision is CombinePrecision.RANK,
        skipped,
    )


def run_round(
    case: Case, inputs: Sequence[Inputs], rank: Rank, skipped: Sequence[int] = ()
) -> None:
    """Dispatch and combine without hooks; nothing comes from skipped ranks."""
    own, me = inputs[rank.rank], rank.rank
    stats = np.arange(case.num_local, dtype=np.int32)
    waits = np.zeros(case.num_ranks, np.int64)
    got, _ = rank.dispatch(case, own.rows, own.topk_idx, recv_stats=stats, wait_stats=waits)
    rows = check_received(case, me, got, inputs, skipped)
    same("recv_stats", me, stats - np.arange(case.num_local, dtype=np.int32), got.count)
    if (waits < 0).any():
        raise AssertionError(f"rank {me}: waited {waits} us")
    experts = expert_rows(case, rank, rows, inputs)
    sums, _ = rank.combine(
        case, experts, own.topk_idx, own.topk_weights, got.layout_range, wait_stats=waits
    )
    same("sums", me, sums, wanted_sums(case, own, skipped))


def run_two_rounds(case: Case, inputs: Sequence[Sequence[Inputs]], rank: Rank) -> None:
    """Two rounds with hooks, each sent while the other waits; hooks in either order."""
    me = rank.rank
    sent = [rank.dispatch(case, one[me].rows, one[me].topk_idx, has_hook=True) for one in inputs]
    is_odd = me % 2 == 1
    for _, receive in reversed(sent) if is_odd else sent:
        receive()
    rows = [check_received(case, me, got, one) for (got, _), one in zip(sent, inputs, strict=True)]
    back = []
    for (got, _), one, part in zip(sent, inputs, rows, strict=True):
        experts = expert_rows(case, rank, part, one)
        own = one[me]
        back.append(
            rank.combine(
                case, experts, own.topk_idx, own.topk_weights, got.layout_range, has_hook=True
            )
        )
    for sums, receive in back:
        receive()
        del sums
    for (sums, _), one in zip(back, inputs, strict=True):
        same("sums", me, sums, wanted_sums(case, one[me]))


def run_case(case: Case, toolchain: Toolchain, *, seed: int = 0, timeout_s: float = 60.0) -> None:
    """Run all rounds of a case: other data every round, poisoned memory before each."""
    toolchain.compile(case.specs())
    world = World(toolchain, case, seed=seed, timeout_s=timeout_s)
    if not case.has_hooks:
        world.ranks[-1].let_peers_be_ahead()
    step = 2 if case.has_hooks else 1
    for first in range(0, case.num_rounds, step):
        rounds = [
            [make_inputs(case, index, rank, seed) for rank in range(case.num_ranks)]
            for index in range(first, first + step)
        ]
        for rank in world.ranks:
            rank.poison()
        try:
            if case.has_hooks:
                world.run(partial(run_two_rounds, case, rounds))
            else:
                world.run(partial(run_round, case, rounds[0]))
        except AssertionError as error:
            raise AssertionError(f"{case.name}, round {first}: {error}") from error
        for rank in world.ranks:
            rank.check_memory()
