"""Rounds of all calls, held to the oracle bit by bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from ranks import oracle

from emulator.build import Toolchain
from emulator.world import Array, Further, Grid, Rank, Received, Sizes, World, staged_bytes
from epcomm import cuda_layout
from epcomm.engines import cuda_tuning
from epcomm.engines.cuda_dispatch import Launch
from epcomm.jit import kernels

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


@dataclass(frozen=True)
class Case:
    """One shape of calls.

    Attributes:
        name: Its id.
        num_tokens: Tokens by rank; in every round each rank takes the next one's.
        hidden: Elements of a row.
        dtype: Dtype of the rows.
        num_topk: Choices of a token.
        num_local: Experts of a rank.
        idx_dtype: Dtype of the choices.
        num_scales: Scales of a token, 0 for none.
        num_spare: With ``num_worst_tokens``: rows beyond those that arrive; else None.
        num_further: Further rows that a token may have in a second combine.
        num_rounds: Rounds; in round i all tokens go to one expert where i % 4 is 3.
        grid: How calls are launched.
    """

    name: str
    num_tokens: tuple[int, ...]
    hidden: int = 40
    dtype: str = "bfloat16"
    num_topk: int = 3
    num_local: int = 4
    idx_dtype: type[np.signedinteger[Any]] = np.int64
    num_scales: int = 0
    num_spare: int | None = None
    num_further: int = 0
    num_rounds: int = 4
    grid: Grid = field(default=Grid())

    @property
    def num_ranks(self) -> int:
        return len(self.num_tokens)

    @property
    def num_experts(self) -> int:
        return self.num_ranks * self.num_local

    @property
    def row_bytes(self) -> int:
        return self.hidden * DTYPES[self.dtype].itemsize

    def specs(self) -> list[kernels.KernelSpec]:
        """Return the kernels that it needs."""
        grid, num_ranks = self.grid, self.num_ranks
        return [
            grid.layout_spec(num_ranks),
            grid.route_spec(num_ranks),
            grid.dispatch_spec(num_ranks),
            *(grid.combine_spec(num_ranks, self.dtype, has) for has in self._with_further()),
        ]

    def _with_further(self) -> list[bool]:
        return [False, True] if self.num_further else [False]

    def world(self, toolchain: Toolchain, *, seed: int = 0, timeout_s: float = 60.0) -> World:
        """Make ranks with as much room as the case needs."""
        sizes = Sizes(
            self.num_ranks,
            max(self.num_tokens),
            staged_bytes(self.row_bytes, self.num_scales, self.num_topk),
            self.row_bytes + 4 * self.num_topk,
        )
        return World(toolchain, sizes, self.grid, seed=seed, timeout_s=timeout_s)


@dataclass
class Inputs:
    """What one rank passes in one round.

    Attributes:
        topk_idx: Choices.
        topk_weights: Their weights.
        rows: For dispatch, bytes.
        later_rows: For a second dispatch with the same handle.
        scales: Or None; not contiguous.
        expert_rows: For each of this rank's tokens, the row that each rank gives back.
        later_expert_rows: For a second combine with the same handle.
        expert_weights: For each of its tokens, the weights that each rank gives back.
        biases: Up to two.
        further_rows: Rows of other nodes.
        further_weights: Their weights.
        further_places: Which of them are a token's, or -1.
    """

    topk_idx: Array
    topk_weights: Array
    rows: Array
    later_rows: Array
    scales: Array | None
    expert_rows: list[Array]
    later_expert_rows: list[Array]
    expert_weights: list[Array]
    biases: list[Array]
    further_rows: Array
    further_weights: Array
    further_places: Array


def real_grid(num_ranks: int, row_bytes: int, staged_row_bytes: int) -> Grid:
    """Return the grid that the engine would use."""
    return Grid(
        num_stage_warps=cuda_layout.NUM_STAGE_WARPS,
        num_fetch_warps=cuda_tuning.dispatch_warps(staged_row_bytes),
        num_stages=cuda_tuning.dispatch_stages(staged_row_bytes),
        combine=cuda_tuning.combine_shape(num_ranks, row_bytes),
        unit_rows=cuda_tuning.unit_rows(row_bytes),
    )


_LOADS_AND_STORES = Grid(has_bulk=False)
_SMALL = Grid(num_blocks=1, num_threads=96, num_fetch_warps=1, num_stages=2, unit_rows=1)
_WIDE = Grid(num_blocks=3, num_threads=128, num_stage_warps=3, num_stages=4, unit_rows=2)

#: Every rank count, both data paths, every dtype, and sizes that divide nothing.
CASES = (
    Case("one rank", (21,), num_scales=2),
    Case("one rank, loads and stores", (21,), num_spare=5, grid=_LOADS_AND_STORES),
    Case("two ranks", (30, 17), num_scales=3, num_rounds=8),
    Case("two ranks and four other nodes", (14, 9), num_further=4, num_rounds=5),
    Case("one rank, one other node", (11,), num_further=1, dtype="float16", grid=_SMALL),
    Case("two ranks, loads and stores", (30, 17), num_scales=3, grid=_LOADS_AND_STORES),
    Case("no tokens at all", (0, 0)),
    Case("three ranks", (20, 0, 7), dtype="float32", num_spare=3, grid=_WIDE),
    Case("three ranks, loads and stores", (1, 0, 26), dtype="float16", grid=_LOADS_AND_STORES),
    Case("three ranks, two other nodes", (6, 0, 7), dtype="float32", num_further=2, grid=_WIDE),
    Case("four ranks", (1, 23, 40, 12), num_local=3, num_topk=5, num_rounds=8, num_spare=0),
    Case("four ranks, one block", (9, 33, 1, 16), idx_dtype=np.int32, dtype="float16", grid=_SMALL),
    Case("one choice, one expert a rank", (13, 5, 8, 1), num_topk=1, num_local=1, hidden=8),
    Case("many choices and scales", (6, 19), num_topk=37, num_local=64, num_scales=45, hidden=72),
    Case(
        *("more tokens than a span has", (1100, 3), 8),
        num_topk=2,
        num_rounds=2,
        grid=Grid(num_threads=32),
    ),
    Case("eight ranks", (5, 0, 1, 9, 12, 3, 3, 7), num_scales=1, num_spare=1),
    Case("eight ranks, loads and stores", (5, 0, 1, 9, 12, 3, 3, 7), grid=_LOADS_AND_STORES),
    Case(
        "as on a GPU",
        (40, 25),
        hidden=1024,
        num_rounds=3,
        grid=real_grid(2, 2048, staged_bytes(2048, 0, 3)),
    ),
    Case(
        "as on a GPU, long rows",
        (19, 18),
        hidden=7168,
        num_rounds=2,
        grid=real_grid(2, 14336, staged_bytes(14336, 0, 3)),
    ),
)

#: What ThreadSanitizer watches: it is slow with many threads.
_WATCHED = Grid(
    num_threads=32,
    num_fetch_warps=1,
    combine=kernels.CombineShape(
        num_threads=96, num_send_warps=1, num_stages=2, sum_vecs=3, sum_tokens=2
    ),
    unit_rows=2,
)
WATCHED_CASES = (
    Case("watched", (9, 6), num_scales=1, num_rounds=1, grid=_WATCHED),
    Case(
        "watched, loads and stores",
        (9, 6),
        num_rounds=1,
        grid=replace(_WATCHED, has_bulk=False),
    ),
)


_NUM_FURTHER_ROWS = 3


def choose(rng: np.random.Generator, case: Case, num_tokens: int, round_index: int) -> Array:
    """Return choices: some twice, some -1, some tokens without any."""
    shape = (num_tokens, case.num_topk)
    if round_index % 4 == 3:
        return np.full(shape, round_index % case.num_experts, case.idx_dtype)
    choices = rng.integers(0, case.num_experts, shape)
    choices[rng.random(shape) < 0.2] = -1
    choices[rng.random(num_tokens) < 0.1] = -1
    return choices.astype(case.idx_dtype)


def numbers(rng: np.random.Generator, shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
    """Return values of many sizes, so that the order of a sum shows in its bits."""
    scale = np.exp2(rng.integers(-8, 6, shape)).astype(np.float32)
    return oracle.round_to(rng.standard_normal(shape, np.float32) * scale, dtype)


def make_inputs(case: Case, round_index: int, rank: int, seed: int) -> Inputs:
    """Return one rank's inputs, which every rank can derive."""
    rng = np.random.default_rng((seed, round_index, rank))
    num_tokens = case.num_tokens[(rank + round_index) % case.num_ranks]
    dtype = DTYPES[case.dtype]
    shape = (num_tokens, case.hidden)
    scales = None
    if case.num_scales:
        # Every other column of the transpose: neither stride is plain.
        memory = rng.integers(0, 1 << 32, (2 * case.num_scales, num_tokens + 3), np.uint32)
        scales = memory.T[:num_tokens, ::2]
    floats = DTYPES["float32"]
    by_rank = range(case.num_ranks)
    return Inputs(
        topk_idx=choose(rng, case, num_tokens, round_index),
        topk_weights=numbers(rng, (num_tokens, case.num_topk), floats),
        rows=rng.integers(0, 256, (num_tokens, case.row_bytes), np.uint8),
        later_rows=rng.integers(0, 256, (num_tokens, case.row_bytes), np.uint8),
        scales=scales,
        expert_rows=[numbers(rng, shape, dtype) for _ in by_rank],
        later_expert_rows=[numbers(rng, shape, dtype) for _ in by_rank],
        expert_weights=[numbers(rng, (num_tokens, case.num_topk), floats) for _ in by_rank],
        biases=[numbers(rng, shape, dtype) for _ in range(round_index % 3)],
        further_rows=numbers(rng, (_NUM_FURTHER_ROWS, case.hidden), dtype),
        further_weights=numbers(rng, (_NUM_FURTHER_ROWS, case.num_topk), floats),
        further_places=rng.integers(
            -1, _NUM_FURTHER_ROWS, (num_tokens, case.num_further), np.int32
        ),
    )


def same(what: str, rank: Rank, got: Array | None, want: Array) -> None:
    """Check that two arrays agree in every bit."""
    if got is None or got.shape != want.shape or got.dtype != want.dtype:
        raise AssertionError(f"rank {rank.rank}: {what}: {got!r} is not like {want!r}")
    unlike = bits(got) != bits(want)
    if unlike.any():
        where = tuple(np.argwhere(unlike)[0])
        raise AssertionError(
            f"rank {rank.rank}: {what}: {np.count_nonzero(unlike)} of {unlike.size} values differ, "
            f"the first at {tuple(map(int, where))}: got {got[where]}, want {want[where]}"
        )


def bits(array: Array) -> Array:
    """Return an array's values as unsigned integers."""
    contiguous = np.ascontiguousarray(array)
    return contiguous.view(np.dtype(f"u{array.dtype.itemsize}")).reshape(array.shape)


def run_round(case: Case, inputs: Sequence[Inputs], rank: Rank) -> None:
    """Make one rank's calls of one round and check them."""
    own, me = inputs[rank.rank], rank.rank
    topk = [one.topk_idx for one in inputs]
    origins = oracle.arrivals(topk, case.num_experts, me)
    num_worst = 0 if case.num_spare is None else len(origins) + case.num_spare

    want = oracle.layout(own.topk_idx, case.num_experts, case.num_ranks)
    per_rank, per_expert, in_rank = rank.layout(own.topk_idx, case.num_experts)
    same("tokens by rank", rank, per_rank, want.num_tokens_per_rank)
    same("pairs by expert", rank, per_expert, want.num_tokens_per_expert)
    same("is_token_in_rank", rank, in_rank, want.is_token_in_rank)

    num_remote = sum(source != me for source, _ in origins)
    for choices in (own.topk_idx, None):  # the layout is made in the kernel, or was made before
        handle = rank.route(in_rank, per_expert, num_worst, topk_idx=choices, work_rows=num_remote)
        check_route(case, rank, handle, topk, origins)

    move = partial(
        rank.dispatch,
        handle,
        own.rows,
        scales=own.scales,
        topk_idx=own.topk_idx,
        topk_weights=own.topk_weights,
        num_worst_tokens=num_worst,
    )
    # Launched with outputs that are too small, or too large; not by all ranks at once.
    forecast = (None, len(origins) - 1, len(origins), len(origins) + 2)[int(rank.rng.integers(4))]
    if num_worst or forecast is None or forecast < 0:
        received = move()
    elif forecast < len(origins):
        check_untouched(rank, move(num_out=forecast, launch=Launch.AHEAD))
        received = move(launch=Launch.RESUMES)
    else:
        received = move(num_out=forecast, launch=Launch.AHEAD)
        check_untouched(rank, received, len(origins))
        received = received.leading(len(origins))
    check_received(case, rank, received, inputs, origins)
    again = rank.dispatch(handle, own.later_rows, num_worst_tokens=num_worst)
    later = [one.later_rows for one in inputs]
    same("rows of a second dispatch", rank, again.rows[: len(origins)], oracle.pick(later, origins))

    has_weights = len(own.biases) != 1
    weights = oracle.pick([one.expert_weights[me] for one in inputs], origins)
    sums, weight_sums = rank.combine(
        handle,
        oracle.pick([one.expert_rows[me] for one in inputs], origins),
        topk_weights=weights if has_weights else None,
        biases=own.biases,
    )
    want_sums = oracle.combine(own.expert_rows, own.topk_idx, case.num_experts, own.biases)
    same("sums", rank, sums, want_sums)
    if has_weights:
        want_sums = oracle.combine(own.expert_weights, own.topk_idx, case.num_experts)
        same("sums of weights", rank, weight_sums, want_sums)
    again_rows = oracle.pick([one.later_expert_rows[me] for one in inputs], origins)
    if case.num_further:
        check_further(case, rank, handle, own, again_rows, weights)
    else:
        sums, _ = rank.combine(handle, again_rows)
        want_sums = oracle.combine(own.later_expert_rows, own.topk_idx, case.num_experts)
        same("sums of a second combine", rank, sums, want_sums)


def check_further(
    case: Case, rank: Rank, handle: Any, own: Inputs, rows: Array, weights: Array
) -> None:
    """Check a combine with further rows: as of nodes of one rank each, behind this node."""
    places = own.further_places
    taken = Further(own.further_rows, own.further_weights, places)
    sums, weight_sums = rank.combine(
        handle, rows, topk_weights=weights, biases=own.biases, further=taken
    )
    num_all = case.num_ranks + case.num_further
    later_experts = case.num_local * np.arange(case.num_ranks, num_all)
    idx = np.where(places < 0, -1, later_experts)
    for what, got, by_rank, further, biases in (
        ("sums", sums, own.later_expert_rows, own.further_rows, own.biases),
        ("sums of weights", weight_sums, own.expert_weights, own.further_weights, ()),
    ):
        want = oracle.combine(
            [*by_rank, *(further[places[:, i]] for i in range(case.num_further))],
            np.concatenate([own.topk_idx, idx], axis=1),
            num_all * case.num_local,
            biases,
            nodes=[0] * case.num_ranks + list(range(1, 1 + case.num_further)),
        )
        same(f"{what} with further rows", rank, got, want)


def check_route(
    case: Case, rank: Rank, handle: Any, topk: Sequence[Array], origins: Sequence[oracle.Origin]
) -> None:
    """Check what route.cu wrote, the work list as a set."""
    me, num_ranks = rank.rank, case.num_ranks
    arrivals = [oracle.arrivals(topk, case.num_experts, other) for other in range(num_ranks)]
    positions = np.full((len(topk[me]), num_ranks), -1, np.int32)
    counts = np.zeros((num_ranks, num_ranks), np.int32)
    for receiver, rows in enumerate(arrivals):
        for position, (source, token) in enumerate(rows):
            counts[source, receiver] += 1
            if source == me:
                positions[token, receiver] = position
    same("positions", rank, handle.positions, positions)
    same("counts", rank, handle.counts, counts)
    work = {(int(word >> 28), int(word & 0xFFFFFFF), int(to)) for word, to in handle.work}
    remote = {(*origin, i) for i, origin in enumerate(origins) if origin[0] != me}
    if work != remote:
        raise AssertionError(f"rank {me}: work list: got {work}, want {remote}")
    summary = [int(value) for value in handle.summary.item()]
    if summary != [len(origins), len(remote), 1, max(map(len, topk))]:
        raise AssertionError(f"rank {me}: summary: got {summary}")
    pairs = oracle.tokens_per_local_expert(topk, case.num_experts, me, 1)
    host = [int(handle.host["num_recv"]), int(handle.host["max_tokens"])]
    if host != [len(origins), max(map(len, topk))]:
        raise AssertionError(f"rank {me}: the host was told {host}")
    got = handle.host["expert_counts"][: case.num_local]
    same("pairs by local expert", rank, got, np.array(pairs, np.int32))


def check_untouched(rank: Rank, got: Received, num_recv: int = 0) -> None:
    """Check that nothing but the first rows was written."""
    for name, before in got.poison.items():
        same(f"{name} behind the last row", rank, getattr(got, name)[num_recv:], before[num_recv:])


def check_received(
    case: Case,
    rank: Rank,
    got: Received,
    inputs: Sequence[Inputs],
    origins: Sequence[oracle.Origin],
) -> None:
    """Check what dispatch.cu wrote, and the tail behind it."""
    num_recv = len(origins)
    same("rows", rank, got.rows[:num_recv], oracle.pick([one.rows for one in inputs], origins))
    if case.num_scales:
        want = oracle.pick([one.scales for one in inputs], origins)  # type: ignore[misc]
        assert got.scales is not None
        same("scales", rank, got.scales[:num_recv], want)
    want_idx, want_weights = oracle.received_topk(
        oracle.pick([one.topk_idx for one in inputs], origins),
        oracle.pick([one.topk_weights for one in inputs], origins),
        case.num_experts,
        case.num_ranks,
        rank.rank,
    )
    assert got.topk_idx is not None
    assert got.topk_weights is not None
    same("choices", rank, got.topk_idx[:num_recv], want_idx)
    same("weights", rank, got.topk_weights[:num_recv], want_weights)
    tail = got.topk_idx[num_recv:]
    same("choices of the tail", rank, tail, np.full_like(tail, -1))


def run_case(case: Case, toolchain: Toolchain, *, seed: int = 0, timeout_s: float = 60.0) -> None:
    """Run all rounds of a case: other data every round, poisoned memory before each."""
    toolchain.compile(case.specs())
    world = case.world(toolchain, seed=seed, timeout_s=timeout_s)
    for round_index in range(case.num_rounds):
        inputs = [make_inputs(case, round_index, rank, seed) for rank in range(case.num_ranks)]
        for rank in world.ranks:
            rank.poison()
        try:
            world.run(partial(run_round, case, inputs))
        except AssertionError as error:
            raise AssertionError(f"{case.name}, round {round_index}: {error}") from error
        for rank in world.ranks:
            rank.check_memory()
