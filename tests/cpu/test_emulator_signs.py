"""Ranks that wait for a dead one are not taken for dead: low-latency kernels on the CPU.

The dead rank serves one live rank and not the other, which so comes a deadline and a half later.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from emulator.build import Toolchain
from emulator.low_latency import (
    Case,
    Inputs,
    Rank,
    World,
    check_received,
    expert_rows,
    make_inputs,
    same,
    wanted_sums,
    write_table,
)

_DEAD, _HELD_UP, _SERVED = range(3)
_TIMEOUT_S = 0.8


@pytest.fixture(params=[(2, 1, 9), (1, 1, 4)], ids=["flags", "cells"])
def case(request: pytest.FixtureRequest) -> Case:
    """Return calls in which every token goes to every rank, and every block has all ranks' rows.

    The served rank's cross by flags or as cells.
    """
    return Case(
        "a rank dies",
        request.param,
        9,
        num_local=1,
        routing="uniform",
        num_parts=(1,),
        num_blocks=1,
    )


@pytest.fixture
def world(toolchain: Toolchain, case: Case) -> World:
    """Return ranks that mask; none compiles while others wait."""
    toolchain.compile(case.specs())
    world = World(toolchain, case, timeout_s=_TIMEOUT_S)
    for rank in world.ranks:
        rank.can_mask = True
    return world


@pytest.fixture
def inputs(case: Case) -> list[Inputs]:
    """Return what each rank passes."""
    return [make_inputs(case, 0, rank, 8) for rank in range(case.num_ranks)]


def check_masks(world: World, *, is_found_by_served: bool) -> None:
    """Check that nobody masked a live rank."""
    assert world.ranks[_HELD_UP].masks.tolist() == [1, 0, 0]
    assert world.ranks[_SERVED].masks.tolist() == [int(is_found_by_served), 0, 0]


def test_a_rank_that_waits_for_a_table_is_not_masked_in_the_same_combine(
    case: Case, world: World, inputs: list[Inputs]
) -> None:
    def one(rank: Rank) -> None:
        own, me = inputs[rank.rank], rank.rank
        got, _ = rank.dispatch(case, own.rows, own.topk_idx)
        experts = expert_rows(case, rank, check_received(case, me, got, inputs), inputs)
        if me == _DEAD:
            rank.masks[_HELD_UP] = 1
        sums, _ = rank.combine(case, experts, own.topk_idx, own.topk_weights, got.layout_range)
        if me == _DEAD:
            time.sleep(_TIMEOUT_S / 2)
            peer = world.ranks[_HELD_UP]
            write_table(case, _DEAD, peer, own.topk_idx, num_entries=0, call=2, epoch=2)
            return
        same("sums", me, sums, wanted_sums(case, own, [_DEAD] if me == _HELD_UP else []))

    world.run(one)
    check_masks(world, is_found_by_served=False)


def test_a_rank_that_waits_for_rows_is_not_masked_in_the_next_call(
    case: Case, world: World, inputs: list[Inputs]
) -> None:
    blank = [replace(inputs[_DEAD], rows=np.zeros_like(inputs[_DEAD].rows)), *inputs[1:]]

    def one(rank: Rank) -> None:
        own, me = inputs[rank.rank], rank.rank
        if me == _DEAD:
            rank.masks[_HELD_UP] = 1
        got, _ = rank.dispatch(case, own.rows, own.topk_idx)
        if me == _DEAD:
            time.sleep(_TIMEOUT_S / 2)
            write_table(case, _DEAD, world.ranks[_HELD_UP], own.topk_idx)
            return
        rows = check_received(case, me, got, blank if me == _HELD_UP else inputs)
        experts = expert_rows(case, rank, rows, inputs)
        sums, _ = rank.combine(case, experts, own.topk_idx, own.topk_weights, got.layout_range)
        same("sums", me, sums, wanted_sums(case, own, [_DEAD]))

    world.run(one)
    check_masks(world, is_found_by_served=True)


def test_a_rank_whose_hook_waits_is_not_masked_by_who_waits_for_its_slot(
    case: Case, world: World, inputs: list[Inputs]
) -> None:
    def one(rank: Rank) -> None:
        own = inputs[rank.rank]
        if rank.rank == _DEAD:
            rank.masks[_HELD_UP] = 1
        _, receive = rank.dispatch(case, own.rows, own.topk_idx, has_hook=True)
        if rank.rank == _DEAD:
            time.sleep(_TIMEOUT_S / 2)
            write_table(case, _DEAD, world.ranks[_HELD_UP], own.topk_idx)
            return
        rank.dispatch(case, own.rows, own.topk_idx, has_hook=True)
        receive()
        rank.dispatch(case, own.rows, own.topk_idx, has_hook=True)

    world.run(one)
    check_masks(world, is_found_by_served=True)


def test_where_nobody_is_masked_the_dead_rank_is_named(
    case: Case, world: World, inputs: list[Inputs]
) -> None:
    """And not the one that waits for its rows, by the one that is in the next call."""
    for rank in world.ranks:
        rank.can_mask = rank.rank == _DEAD  # so that it can leave out the one that it holds up
    ranges = np.zeros((case.num_local, case.num_ranks), np.int64)

    def one(rank: Rank) -> None:
        own = inputs[rank.rank]
        if rank.rank == _DEAD:
            rank.masks[_HELD_UP] = 1
        rank.dispatch(case, own.rows, own.topk_idx)
        if rank.rank == _DEAD:
            write_table(case, _DEAD, world.ranks[_HELD_UP], own.topk_idx)
        elif rank.rank == _SERVED:
            rows = rank.memory.empty("rows", (1, case.num_rows, case.hidden), own.rows.dtype)
            rank.combine(case, rows, own.topk_idx, own.topk_weights, ranges)

    failed = [error for error in world.failures(one) if error is not None]
    named = [int(error.record["peer"]) for error in failed if error.failure == "timeout"]
    assert len(failed) == 2
    assert set(named) == {_DEAD}


@pytest.mark.parametrize("can_mask", [True, False])
def test_ranks_out_of_step_that_wait_for_each_other_end(
    toolchain: Toolchain, can_mask: bool
) -> None:
    """After as many deadlines as there are ranks, here two: both show that they live."""
    case = Case("out of step", (2, 3), 3)
    toolchain.compile(case.specs())
    world = World(toolchain, case, timeout_s=0.3)
    world.ranks[0].state["blocks"]["epoch"] = 4
    own = [make_inputs(case, 0, rank, 8) for rank in range(case.num_ranks)]
    for rank in world.ranks:
        rank.can_mask = can_mask
    start = time.monotonic()
    failed = world.failures(
        lambda rank: rank.dispatch(case, own[rank.rank].rows, own[rank.rank].topk_idx)
    )
    assert time.monotonic() - start > 2 * world.timeout_s
    assert [error is None for error in failed] == [can_mask, can_mask]
    assert [rank.masks.any() for rank in world.ranks] == [can_mask, can_mask]
