"""The low-latency kernels on the CPU: results, failures and masks. See tests/emulator."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from emulator.build import Toolchain, pointer
from emulator.low_latency import (
    CASES,
    Case,
    Inputs,
    Rank,
    World,
    check_received,
    make_inputs,
    run_case,
    run_round,
    same,
    wanted_sums,
    write_table,
)

from epcomm.cuda_layout import LOW_LATENCY_AGREED, low_latency_constants
from epcomm.engines.base import Fp8Format

_CASE = Case("failures", (7, 12, 5), 12)
#: So few tokens that every block keeps all choices, which has a path of its own.
_FEW = Case("failures with few tokens", (3, 4, 2), 4)
_LAST = _CASE.num_ranks - 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_calls_are_right_bit_by_bit(case: Case, toolchain: Toolchain) -> None:
    run_case(case, toolchain)


@pytest.fixture(params=[_CASE, _FEW], ids=["many", "few"])
def case(request: pytest.FixtureRequest) -> Case:
    """Return a shape of calls of three ranks."""
    shape: Case = request.param
    return shape


@pytest.fixture
def world(toolchain: Toolchain, case: Case) -> World:
    """Return the ranks."""
    return World(toolchain, case)


@pytest.fixture
def inputs(case: Case) -> list[Inputs]:
    """Return what each rank passes."""
    return [make_inputs(case, 0, rank, 1) for rank in range(case.num_ranks)]


def test_two_shapes_share_the_slots(toolchain: Toolchain) -> None:
    """Calls in turn, of other sizes and other most tokens, on memory that is not cleaned."""
    small = Case("small", (2, 1, 3), 3, hidden=64, num_topk=2, num_local=1)
    world = World(toolchain, _CASE, small)
    for round_index in range(6):
        case = (_CASE, small)[round_index % 2]
        inputs = [make_inputs(case, round_index, rank, 2) for rank in range(case.num_ranks)]
        world.run(partial(run_round, case, inputs))


def test_epochs_wrap_around(case: Case, toolchain: Toolchain, world: World) -> None:
    """After the largest epoch comes none that memory may begin with."""
    last = 2**32 - 3
    for rank in world.ranks:
        rank.state["blocks"]["epoch"] = last
    for round_index in range(4):
        inputs = [make_inputs(case, round_index, rank, 3) for rank in range(case.num_ranks)]
        for rank in world.ranks:
            if round_index == 0:
                rank.state["blocks"]["slot_masked"] = 7  # nobody has received what was never sent
        world.run(partial(run_round, case, inputs))
    for rank in world.ranks:
        assert (rank.state["blocks"]["epoch"][: case.num_blocks] == 7).all()


# --- failures ----------------------------------------------------------------------------------


def send_only(case: Case, inputs: list[Inputs], rank: Rank) -> None:
    """Dispatch."""
    rank.dispatch(case, inputs[rank.rank].rows, inputs[rank.rank].topk_idx)


def all_but_last(case: Case, inputs: list[Inputs], rank: Rank) -> None:
    """Dispatch on all ranks but one."""
    if rank.rank != _LAST:
        send_only(case, inputs, rank)


def test_a_rank_that_never_comes_is_named(case: Case, world: World, inputs: list[Inputs]) -> None:
    world.run(partial(run_round, case, inputs))
    world.ranks[0].timeout_s = 1.0  # rank 1 comes well before, on a busy machine too
    first, second, _ = world.failures(partial(all_but_last, case, inputs))
    assert first is not None
    assert second is not None
    assert (first.failure, first.phase, int(first.record["peer"])) == ("timeout", "tables", _LAST)
    assert int(first.record["seen"]) < int(first.record["expected"]) == 3
    assert (second.failure, second.phase) == ("peer gave up", "tables")
    assert int(second.record["peer"]) == 0


def test_a_late_rank_ends_too(case: Case, world: World, inputs: list[Inputs]) -> None:
    world.ranks[0].timeout_s = 0.2
    early = world.failures(partial(all_but_last, case, inputs))
    assert [error is None for error in early] == [False, False, True]

    def late(rank: Rank) -> None:
        if rank.rank == _LAST:
            run_round(case, inputs, rank)

    last = world.failures(late)[_LAST]
    assert last is not None
    assert (last.failure, int(last.record["peer"])) == ("peer gave up", 0)


def test_a_hook_that_is_never_called_ends_the_wait_for_it(
    case: Case, world: World, inputs: list[Inputs]
) -> None:
    """The third call waits for the first one's receivers, and says so."""
    for rank in world.ranks:
        rank.timeout_s = 0.3

    def three(rank: Rank) -> None:
        own = inputs[rank.rank]
        for _ in range(3):
            rank.dispatch(case, own.rows, own.topk_idx, has_hook=True)

    for failed in world.failures(three):
        assert failed is not None
        assert failed.phase == "received"


def test_a_rank_sends_two_calls_before_the_others_begin(case: Case, world: World) -> None:
    """And the third once they have received the first."""
    calls = [[make_inputs(case, i, rank, 1) for rank in range(case.num_ranks)] for i in range(3)]
    is_ahead = threading.Event()

    def three(rank: Rank) -> None:
        if rank.rank != 0:
            assert is_ahead.wait(30)
        sent = []
        for i, inputs in enumerate(calls):
            if i == 2:
                is_ahead.set()
                sent[0][1]()
            own = inputs[rank.rank]
            sent.append(rank.dispatch(case, own.rows, own.topk_idx, has_hook=True))
        for _, receive in sent[1:]:
            receive()
        for inputs, (received, _) in zip(calls, sent, strict=True):
            check_received(case, rank.rank, received, inputs)

    world.run(three)


@pytest.mark.parametrize("call", ["dispatch", "combine"])
@pytest.mark.parametrize("has_hook", [False, True])
def test_disagreeing_ranks_learn_it_and_work_on(
    case: Case, call: str, has_hook: bool, world: World, inputs: list[Inputs]
) -> None:
    ranges = np.zeros((case.num_local, case.num_ranks), np.int64)
    rows = np.zeros((case.num_local, case.num_rows, case.hidden), inputs[0].rows.dtype)

    def disagreeing(rank: Rank) -> None:
        own = inputs[rank.rank]
        shape = {"num_max_tokens": 99 if rank.rank == 1 else case.num_max}
        if call == "dispatch":
            _, receive = rank.dispatch(
                case, own.rows[:0], own.topk_idx[:0], has_hook=has_hook, shape=shape
            )
        else:
            _, receive = rank.combine(
                case,
                rows,
                own.topk_idx[:0],
                own.topk_weights[:0],
                ranges,
                has_hook=has_hook,
                shape=shape,
            )
        receive()

    for failed in world.failures(disagreeing):
        assert failed is not None
        assert failed.failure == "low-latency mismatch"
        assert LOW_LATENCY_AGREED[int(failed.record["field"])] == LOW_LATENCY_AGREED[1]
        assert failed.record["values"][:3].tolist() == [case.num_max, 99, case.num_max]
    if not (call == "combine" and has_hook):  # whose hook was not called: sending failed
        world.run(partial(run_round, case, inputs))


def test_a_dispatch_that_meets_a_combine(case: Case, world: World, inputs: list[Inputs]) -> None:
    ranges = np.zeros((case.num_local, case.num_ranks), np.int64)
    rows = np.zeros((case.num_local, case.num_rows, case.hidden), inputs[0].rows.dtype)

    def disagreeing(rank: Rank) -> None:
        own = inputs[rank.rank]
        if rank.rank == 0:
            rank.combine(case, rows, own.topk_idx, own.topk_weights, ranges)
        else:
            rank.dispatch(case, own.rows, own.topk_idx)

    for failed in world.failures(disagreeing):
        assert failed is not None
        assert failed.failure == "low-latency mismatch"
        assert failed.record["values"][:3].tolist() == [2, 1, 1]


@pytest.mark.parametrize(
    ("choices", "failure"),
    [((-2, 0, 1), "bad expert"), ((12, -1, 1), "bad expert"), ((4, 1, 4), "expert twice")],
)
def test_wrong_choices_are_reported_and_left_out(
    case: Case, choices: tuple[int, ...], failure: str, world: World, inputs: list[Inputs]
) -> None:
    wrong = inputs[0].topk_idx.copy()
    wrong[2] = choices
    right = wrong.copy()
    right[2] = {"bad expert": [-1, max(-1, choices[1]), 1], "expert twice": [4, 1, -1]}[failure]
    received = {}

    def dispatch(rank: Rank) -> None:
        own = inputs[rank.rank]
        idx = wrong if rank.rank == 0 else own.topk_idx
        received[rank.rank], _ = rank.dispatch(case, own.rows, idx, has_hook=False)

    first, *others = world.failures(dispatch)
    assert first is not None
    assert first.failure == failure
    assert others == [None, None]
    seen = [replace(inputs[0], topk_idx=right), *inputs[1:]]
    for rank in (1, 2):
        check_received(case, rank, received[rank], seen)


def test_choices_that_were_not_dispatched_read_nothing_past_the_rows(
    case: Case, world: World, inputs: list[Inputs]
) -> None:
    """A layout_range without rows: nothing is read, and every sum is zero."""
    ranges = np.full((case.num_local, case.num_ranks), (case.num_rows + 5) << 32, np.int64)

    def combine(rank: Rank) -> None:
        own = inputs[rank.rank]
        sums, _ = rank.combine(
            case, rank.memory.empty("rows", (1, 1, 8), own.rows.dtype), own.topk_idx,
            own.topk_weights, ranges,
        )  # fmt: skip
        same("sums", rank.rank, sums, np.zeros_like(sums))

    world.run(combine)


# --- masks -------------------------------------------------------------------------------------


def test_masked_ranks_are_left_out_and_come_back(case: Case, world: World) -> None:
    """Two ranks and one, which mask each other; then all together again."""
    for round_index, is_masked in enumerate((False, True, True, True, False, False)):
        inputs = [make_inputs(case, round_index, rank, 4) for rank in range(case.num_ranks)]
        for rank in world.ranks:
            rank.can_mask = True
            others = [_LAST] if rank.rank != _LAST else [0, 1]
            rank.masks[others] = is_masked

        def one(rank: Rank, inputs: list[Inputs] = inputs, is_masked: bool = is_masked) -> None:
            others = [_LAST] if rank.rank != _LAST else [0, 1]
            run_round(case, inputs, rank, others if is_masked else ())

        world.run(one)


def test_a_rank_that_stops_answering_is_masked(case: Case, world: World) -> None:
    """The others go on with the rest, in the call that found it and in every later one."""
    for rank in world.ranks:
        rank.can_mask = True
    inputs = [make_inputs(case, 0, rank, 5) for rank in range(case.num_ranks)]
    world.run(partial(run_round, case, inputs))
    for rank in world.ranks:
        rank.timeout_s = 0.3
    for round_index in range(1, 4):
        inputs = [make_inputs(case, round_index, rank, 5) for rank in range(case.num_ranks)]

        def one(rank: Rank, inputs: list[Inputs] = inputs) -> None:
            if rank.rank != _LAST:
                run_round(case, inputs, rank, [_LAST])

        world.run(one)
        for rank in world.ranks[:_LAST]:
            assert rank.masks.tolist() == [0, 0, 1]


def test_a_rank_that_is_gone_before_combine_is_masked(case: Case, world: World) -> None:
    inputs = [make_inputs(case, 0, rank, 6) for rank in range(case.num_ranks)]
    for rank in world.ranks:
        rank.can_mask = True
    received = {}

    def dispatch(rank: Rank) -> None:
        own = inputs[rank.rank]
        received[rank.rank], _ = rank.dispatch(case, own.rows, own.topk_idx)

    world.run(dispatch)
    for rank in world.ranks:
        rank.timeout_s = 0.3

    def combine(rank: Rank) -> None:
        if rank.rank == _LAST:
            return
        own, got = inputs[rank.rank], received[rank.rank]
        rows = np.zeros((case.num_local, case.num_rows, case.hidden), own.rows.dtype)
        for local in range(case.num_local):
            expert = rank.rank * case.num_local + local
            for source in range(case.num_ranks):
                begin, count = divmod(int(got.layout_range[local, source]), 1 << 32)
                for row in range(begin, begin + count):
                    token = got.src_info[local, row]
                    k = inputs[source].topk_idx[token].tolist().index(expert)
                    rows[local, row] = inputs[source].results[token, k]
        sums, _ = rank.combine(case, rows, own.topk_idx, own.topk_weights, got.layout_range)
        same("sums", rank.rank, sums, wanted_sums(case, own, [_LAST]))

    world.run(combine)
    assert world.ranks[0].masks.tolist() == [0, 0, 1]


def dispatch_without_rows_of_the_last(
    world: World, case: Case, inputs: list[Inputs], num_entries: int | None = None
) -> dict[int, Any]:
    """Let the last rank die behind its table, or so many entries of it; the others mask it.

    Returns:
        What the others received, by rank.
    """
    for rank in world.ranks:
        rank.can_mask, rank.timeout_s = True, 0.3
    received: dict[int, Any] = {}

    def dispatch(rank: Rank) -> None:
        own = inputs[rank.rank]
        if rank.rank != _LAST:
            received[rank.rank], _ = rank.dispatch(case, own.rows, own.topk_idx)
            return
        for peer in world.ranks[:_LAST]:
            write_table(case, _LAST, peer, own.topk_idx, num_entries=num_entries)

    world.run(dispatch)
    for rank in received:
        assert world.ranks[rank].masks[_LAST] == 1
    return received


@pytest.mark.parametrize("num_last", [5, 3], ids=["flags", "cells"])
def test_rows_that_never_come_are_zeros(toolchain: Toolchain, num_last: int) -> None:
    case = replace(_CASE, num_tokens=(*_CASE.num_tokens[:_LAST], num_last))
    world = World(toolchain, case)
    assert (num_last <= case.grids.dispatch.cell_tokens) == (num_last == 3)
    inputs = [make_inputs(case, 0, rank, 7) for rank in range(case.num_ranks)]
    blank = replace(inputs[_LAST], rows=np.zeros_like(inputs[_LAST].rows))
    for rank, got in dispatch_without_rows_of_the_last(world, case, inputs).items():
        check_received(case, rank, got, [*inputs[:_LAST], blank])


def test_a_rank_whose_scales_alone_never_come_is_masked(toolchain: Toolchain) -> None:
    """Its values are there: what it had sent when it died, as a whole call left it."""
    case = Case("scales", (3, 4, 2), 4, hidden=256, routing="uniform", fp8=Fp8Format.FLOAT_SCALES)
    inputs = [make_inputs(case, 0, rank, 7) for rank in range(case.num_ranks)]

    def dispatch(rank: Rank) -> None:
        rank.dispatch(case, inputs[rank.rank].rows, inputs[rank.rank].topk_idx)

    whole, world = World(toolchain, case), World(toolchain, case)
    whole.run(dispatch)
    constants = low_latency_constants(case.num_ranks)
    shape = (2, case.num_ranks, constants["kMaxCellTokens"], constants["kMaxCellRowBytes"] // 4)
    for rank in world.ranks[:_LAST]:
        rank.can_mask, rank.timeout_s = True, 0.3
        rank.slab[:] = whole.ranks[rank.rank].slab
        cells = rank.slab[constants["kOffsetLowLatencyCells"] :].view(np.uint64)
        of_rows = cells[: np.prod(shape)].reshape(shape)[1, _LAST]
        assert of_rows[:, 32:34].any()  # two scales, behind 256 bytes of values
        of_rows[:, 32:34] = 0
    world.run(lambda rank: dispatch(rank) if rank.rank != _LAST else None)
    for rank in world.ranks[:_LAST]:
        assert rank.masks[_LAST] == 1


def test_a_dead_rank_costs_one_deadline_however_many_choices_it_had(toolchain: Toolchain) -> None:
    case = Case("many choices", (1, 64), 64, num_topk=8)  # eight a thread
    world = World(toolchain, case)
    inputs = [make_inputs(case, 0, rank, 7) for rank in range(case.num_ranks)]
    alone = world.ranks[0]
    alone.can_mask, alone.timeout_s = True, 1.0
    write_table(case, 1, alone, inputs[1].topk_idx, num_entries=0)

    def dispatch(rank: Rank) -> None:
        if rank is alone:
            rank.dispatch(case, inputs[0].rows, inputs[0].topk_idx)

    start = time.monotonic()
    world.run(dispatch)
    assert alone.masks.tolist() == [0, 1]
    assert time.monotonic() - start < 4 * alone.timeout_s


def test_half_a_table_of_a_rank_that_died_is_not_counted(case: Case, world: World) -> None:
    inputs = [make_inputs(case, 0, rank, 7) for rank in range(case.num_ranks)]
    num_entries = inputs[_LAST].topk_idx.size - 1
    received = dispatch_without_rows_of_the_last(world, case, inputs, num_entries)
    for rank, got in received.items():
        check_received(case, rank, got, inputs, [_LAST])


def test_halves_of_two_tables_are_not_counted(toolchain: Toolchain) -> None:
    """Whoever waits for one of them in vain looks at the other all the same.

    With as many threads as these have, no other would find that the second one ends there.
    """
    case = Case("two dead ranks", (1, 12, 12), 12)
    world = World(toolchain, case)
    inputs = [make_inputs(case, 0, rank, 7) for rank in range(case.num_ranks)]
    alone = world.ranks[0]
    alone.can_mask, alone.timeout_s = True, 0.3
    for source, num_entries in ((1, 0), (2, 28)):
        write_table(case, source, alone, inputs[source].topk_idx, num_entries=num_entries)
    received = []

    def dispatch(rank: Rank) -> None:
        if rank is alone:
            received.append(rank.dispatch(case, inputs[0].rows, inputs[0].topk_idx)[0])

    world.run(dispatch)
    assert alone.masks.tolist() == [0, 1, 1]
    check_received(case, 0, received[0], inputs, [1, 2])


def test_blocks_of_a_combine_agree_on_who_takes_part(case: Case, world: World) -> None:
    """One has given up on the last rank already: the others send it nothing, either."""
    inputs = [make_inputs(case, 0, rank, 6) for rank in range(case.num_ranks)]
    ranges = np.zeros((case.num_local, case.num_ranks), np.int64)
    for rank in world.ranks:
        rank.can_mask, rank.timeout_s = True, 0.3
    world.ranks[0].state["verdicts"][_LAST] = 1 << 32

    def combine(rank: Rank) -> None:
        own = inputs[rank.rank]
        rows = rank.memory.empty("rows", (1, 1, 8), own.rows.dtype)
        rank.combine(case, rows, own.topk_idx, own.topk_weights, ranges)

    world.run(combine)
    assert world.ranks[0].masks[_LAST] == world.ranks[_LAST].masks[0] == 1


def test_a_rank_that_died_in_its_table_is_named(case: Case, world: World) -> None:
    """Combine waits at once for its table and for rows of ranks that wait for that table too."""
    inputs = [make_inputs(case, 0, rank, 6) for rank in range(case.num_ranks)]
    ranges = np.zeros((case.num_local, case.num_ranks), np.int64)
    for rank in world.ranks[:_LAST]:
        rank.timeout_s = 0.5
        write_table(case, _LAST, rank, inputs[_LAST].topk_idx, num_entries=0, call=2)

    def combine(rank: Rank) -> None:
        own = inputs[rank.rank]
        if rank.rank != _LAST:
            rank.combine(case, own.rows, own.topk_idx, own.topk_weights, ranges)

    failed = [error for error in world.failures(combine) if error is not None]
    late = [error for error in failed if error.failure == "timeout"]
    assert len(failed) == _LAST
    assert {(error.phase, int(error.record["peer"])) for error in late} == {("tables", _LAST)}


@pytest.mark.parametrize("call", ["dispatch", "combine"])
def test_a_source_that_another_block_saw_and_is_gone_ends_the_call(
    case: Case, world: World, call: str
) -> None:
    """As when it went on to later calls, over this one's cells, after it was unmasked."""
    inputs = [make_inputs(case, 0, rank, 6) for rank in range(case.num_ranks)]
    ranges = np.zeros((case.num_local, case.num_ranks), np.int64)
    alone = world.ranks[0]
    alone.can_mask, alone.timeout_s = True, 0.3
    alone.state["verdicts"][_LAST] = 1 << 32 | 1

    def one(rank: Rank) -> None:
        own = inputs[0]
        if rank is alone and call == "dispatch":
            rank.dispatch(case, own.rows, own.topk_idx)
        elif rank is alone:
            rank.combine(case, own.rows, own.topk_idx, own.topk_weights, ranges)

    failed = world.failures(one)[0]
    assert failed is not None
    assert (failed.failure, failed.phase) == ("timeout", "tables")
    assert int(failed.record["peer"]) == _LAST


@pytest.mark.parametrize("call", ["dispatch", "combine"])
def test_a_source_that_another_block_saw_takes_part(case: Case, world: World, call: str) -> None:
    """Its header is there when this block looks for the second time."""
    inputs = [make_inputs(case, 0, rank, 6) for rank in range(case.num_ranks)]
    ranges = np.zeros((case.num_local, case.num_ranks), np.int64)
    alone, nothing = world.ranks[0], inputs[0].topk_idx[:0]
    alone.can_mask, alone.timeout_s = True, 1.0
    alone.state["verdicts"][_LAST] = 1 << 32 | 1

    def one(rank: Rank) -> None:
        if rank.rank == _LAST:
            time.sleep(1.5 * alone.timeout_s)
            write_table(case, _LAST, alone, nothing, call=1 if call == "dispatch" else 2)
        elif rank is alone and call == "dispatch":
            rank.dispatch(case, inputs[0].rows[:0], nothing)
        elif rank is alone:
            rank.combine(case, inputs[0].rows, nothing, inputs[0].topk_weights[:0], ranges)

    world.run(one)
    assert alone.masks.tolist() == [0, 1, 0]


def test_waiting_is_told_in_microseconds(case: Case, world: World, inputs: list[Inputs]) -> None:
    waits = [np.array([10, 20, 30], np.int64) for _ in world.ranks]

    def one(rank: Rank) -> None:
        own = inputs[rank.rank]
        if rank.rank == 1:
            time.sleep(0.1)
        rank.dispatch(case, own.rows, own.topk_idx, wait_stats=waits[rank.rank])

    world.run(one)
    assert 80_000 < waits[0][1] - 20 < 5_000_000
    assert waits[1][0] >= 10
    assert pointer(waits[0])  # alive until here
