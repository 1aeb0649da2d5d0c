"""Contract of what spans low-latency calls: sizes, masks, results that wait for their hooks."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import contract_dispatch as throughput
import numpy as np
import oracle
from common import Array, Checker, main, rng_of
from contract_low_latency import (
    BF16,
    E4M3,
    FP8,
    I32,
    Case,
    Combined,
    Sent,
    all_inputs,
    cast_of,
    fill_rows,
    finish,
    inputs_of,
    receive,
    send,
    send_back,
)
from frames import NumpyFrame, poison

from epcomm import Buffer, InvalidArgument


def make_case(check: Checker, *args: Any) -> Case:
    """Return a case with a dtype of choices that the framework has, and name it in messages."""
    case = Case(*args)
    check.case = f"case {case.id}"
    return replace(case, idx_dtype=check.frame.dtype(case.idx_dtype))


def infinities_stay_in_their_tokens(check: Checker) -> None:
    """What fp8 makes of infinities and NaNs is undefined, but only in tokens that hold them."""
    for fp8 in ("plain", "round", "ue8m0"):
        case = make_case(check, f"infinities-{fp8}", (9,), 9, 512, 2, 2, "uniform", fp8)
        mine, num_experts = inputs_of(case, 0, check.rank, check.size), case.num_local * check.size
        x = np.array(mine.x)
        x[1, 3], x[2, 200], x[2, 511] = np.inf, np.nan, -np.inf
        topk = [inputs.topk_idx for inputs in all_inputs(case, 0, check.size)]
        casts = [cast_of(case, 0, rank, check.size) for rank in range(check.size)]
        with check.buffer() as buffer:
            (data, scales), *_ = buffer.low_latency_dispatch(
                check.make("x", x), check.make("idx", mine.topk_idx), 9, num_experts, **FP8[fp8]
            )
        for local, origins in enumerate(oracle.expert_rows(topk, num_experts, check.rank).origins):
            rows = [row for row, (_, token) in enumerate(origins) if token not in (1, 2)]
            origins = [origins[row] for row in rows]
            for name, got, part in (("recv_x", data, 0), ("scales", scales, 1)):
                want = oracle.pick([cast[part] for cast in casts], origins)
                check.same(f"{name} of expert {local}", check.frame.numpy(got)[local, rows], want)
        check.unchanged()


def beside_throughput_calls(check: Checker) -> None:
    """Dispatch and combine between sending and receiving."""
    case = make_case(check, "beside-throughput-calls", (20, 3), 20, 128, 4, 4, "some")
    other = throughput.Case("beside-low-latency-calls", (30, 7), 256, 4, 3, "zipf")
    other = throughput.for_frame(other, check.frame)
    with check.buffer() as buffer:
        sent = send(check, buffer, case, 0, return_recv_hook=True)
        dispatched = throughput.check_dispatch(check, buffer, other, 0)
        receive(check, sent)
        back = send_back(check, buffer, sent, return_recv_hook=True)
        throughput.check_combine(check, buffer, other, 0, dispatched)
        finish(check, back)
        throughput.check_repeated(check, buffer, other, 0, dispatched)


def small_and_large_shapes(check: Checker) -> None:
    """Slots grow with the shape, and serve smaller ones afterwards."""
    small = make_case(check, "small-shape", (3,), 4, 128, 2, 1, "uniform")
    large = make_case(check, "large-shape", (40, 7), 64, 1024, 4, 4, "zipf", "none")
    sizes = []
    with check.buffer() as buffer:
        for case, round_ in ((small, 0), (large, 0), (small, 1), (large, 1)):
            sent = send(check, buffer, case, round_)
            receive(check, sent)
            finish(check, send_back(check, buffer, sent))
            sizes.append(size_of(buffer))
    check.holds(0 < sizes[0] < sizes[1] == sizes[2] == sizes[3], "slab sizes", sizes)


def size_hint_is_enough(check: Checker) -> None:
    """A Buffer of the size that the hint tells never grows."""
    shape = (48, 512, 4 * check.size)
    hint = hint_of(check, *shape)
    with check.buffer(0, hint, low_latency_mode=True) as buffer:
        said, size = repr(buffer), size_of(buffer)
        buffer.clean_low_latency_buffer(*shape)
        for fp8 in FP8:
            case = make_case(
                check, f"size-hint-{fp8}", (48,), 48, 512, 32, 4, "uniform", fp8, "expert"
            )
            sent = send(check, buffer, case, 0)
            receive(check, sent)
            finish(check, send_back(check, buffer, sent))
        with check.aside():  # engines differ in it
            check.equal("size of the low-latency slab", size_of(buffer), size)
            check.equal("repr of the Buffer", repr(buffer), said)


def hint_of(check: Checker, num_max: int, hidden: int, num_experts: int) -> int:
    """Return the size hint for the program's engine."""
    return Buffer.get_low_latency_rdma_size_hint(
        num_max, hidden, check.size, num_experts, engine=check.place["engine"]
    )


def size_of(buffer: Buffer) -> int:
    """Return the bytes of this rank's low-latency slab."""
    return int(buffer.get_local_buffer_tensor(np.uint8, use_rdma_buffer=True).size)


def results_are_near_float64(check: Checker) -> None:
    """The tolerances that the field tests with, for experts that pass rows on as they are."""
    limits = {"none": 1e-5, "plain": 9e-4, "round": 9e-4, "ue8m0": 9e-4}
    with check.buffer() as buffer:
        for fp8, limit in limits.items():
            for precision in ("rank", "expert"):
                case = make_case(
                    check, f"near-float64-{fp8}", (50, 64), 64, 512, 8, 4, "some", fp8, precision
                )
                check.case = f"case {case.id}, {precision}"
                rng = rng_of(case.id, check.rank)
                mine = inputs_of(case, 0, check.rank, check.size)
                x = oracle.round_to(rng.standard_normal(mine.x.shape, np.float32), BF16)
                weights = np.abs(mine.topk_weights)
                idx = check.make("topk_idx", mine.topk_idx)
                num_experts = case.num_local * check.size
                recv_x, _, handle, *_ = buffer.low_latency_dispatch(
                    check.make("x", x), idx, 64, num_experts, **FP8[fp8]
                )
                combined, *_ = buffer.low_latency_combine(
                    check.make("rows", _values(check, recv_x, fp8)),
                    idx,
                    check.make("topk_weights", weights),
                    handle,
                    combine_precision=precision,
                )
                total = np.where(mine.topk_idx >= 0, weights, 0).astype(np.float64).sum(axis=1)
                want = x.astype(np.float64) * total[:, None]
                off = oracle.difference(check.frame.numpy(combined), want)
                check.holds(off < limit, "combined_x", f"differs by {off}, limit {limit}")


def _values(check: Checker, recv_x: Any, fp8: str) -> Array:
    """Return received rows as bf16; rows that nothing arrived in hold anything."""
    if fp8 == "none":
        return check.frame.numpy(recv_x)
    data, scales = map(check.frame.numpy, recv_x)
    with np.errstate(all="ignore"):
        if fp8 == "ue8m0":
            exponents = np.ascontiguousarray(scales).view(np.uint8).astype(np.float32) - 127
            scales = np.exp2(exponents)
        data = data.view(E4M3)
        blocks = data.astype(np.float32).reshape(*scales.shape, 128) * scales[..., None]
        return oracle.round_to(np.ascontiguousarray(blocks).reshape(data.shape), BF16)


def masked_rank_is_skipped(check: Checker) -> None:
    """A rank and all others mask each other, and take part together again once unmasked."""
    case = make_case(check, "masked-rank", (12, 5, 9), 12, 128, 4, 3, "uniform")
    masked = check.size // 2
    status = check.frame.make_writable(poison(np.empty(check.size, I32)))
    with check.buffer(enable_shrink=True) as buffer:
        for round_, is_masked in enumerate((False, True, True, False)):
            check.case = f"case {case.id}, round {round_}, {'' if is_masked else 'not '}masked"
            everyone = set(range(check.size))
            skipped = {masked} if check.rank != masked else everyone - {masked}
            if is_masked:
                for rank in skipped:
                    buffer.low_latency_update_mask_buffer(rank, True)
            else:
                skipped = set()
                buffer.low_latency_clean_mask_buffer()
            buffer.low_latency_query_mask_buffer(status)
            want = np.array([rank in skipped for rank in range(check.size)], I32)
            check.same("mask", check.frame.numpy(status), want)
            sent = send(check, buffer, case, round_, skipped=skipped)
            receive(check, sent)
            # Ranks do not wait for those that they masked, which may read their slabs meanwhile.
            check.ranks.barrier()
            finish(check, send_back(check, buffer, sent, skipped=skipped))
            check.ranks.barrier()


def absent_rank_is_skipped(check: Checker) -> None:
    """The ranks that masked another go on without its calls."""
    case = make_case(check, "absent-rank", (12, 5, 9), 12, 128, 4, 3, "uniform", "none", "expert")
    absent = check.size - 1
    # Room beforehand: a slab that grows needs every rank.
    num_experts = case.num_local * check.size
    hint = hint_of(check, 12, 128, num_experts)
    with check.buffer(0, hint, enable_shrink=True) as buffer:
        if check.rank != absent:
            buffer.low_latency_update_mask_buffer(absent, True)
            for round_ in range(3):
                check.case = f"case {case.id}, round {round_}"
                sent = send(check, buffer, case, round_, skipped={absent})
                receive(check, sent)
                finish(check, send_back(check, buffer, sent, skipped={absent}))
        check.ranks.barrier()


def inputs_may_change_after_sending(check: Checker) -> None:
    """What was passed may be overwritten as soon as the call has returned, before any hook."""
    case = make_case(check, "inputs-change", (20, 33), 33, 256, 4, 4, "uniform")
    with check.buffer() as buffer:
        mine, num_experts = inputs_of(case, 0, check.rank, check.size), case.num_local * check.size
        x, idx = map(check.frame.make_writable, (mine.x, mine.topk_idx))
        *_, hook = result = buffer.low_latency_dispatch(
            x, idx, case.num_max, num_experts, return_recv_hook=True
        )
        for array in (x, idx):
            check.frame.overwrite(array)
        topk = [inputs.topk_idx for inputs in all_inputs(case, 0, check.size)]
        rows = oracle.expert_rows(topk, num_experts, check.rank)
        idx = check.make("topk_idx", mine.topk_idx)
        sent = Sent(case, 0, idx, *result[:3], hook, rows)
        receive(check, sent)
        experts = check.frame.make_writable(
            fill_rows(check, sent, np.empty((case.num_local, check.size * 33, 256), BF16))
        )
        weights = check.make("topk_weights", mine.topk_weights)
        combined, _, hook = buffer.low_latency_combine(
            experts, idx, weights, sent.handle, return_recv_hook=True
        )
        check.frame.overwrite(experts)
        want = send_back(check, buffer, sent)
        finish(check, Combined(combined, hook, want.want))
        finish(check, want)


def outputs_are_the_caller_s(check: Checker) -> None:
    """Outputs stay as they are whatever calls and slabs do afterwards."""
    case = make_case(check, "outputs-stay", (20, 33), 33, 256, 4, 4, "uniform")
    with check.buffer() as buffer:
        kept = []
        for round_ in range(3):
            sent = send(check, buffer, case, round_)
            receive(check, sent)
            back = send_back(check, buffer, sent)
            kept.append((sent, back))
        check.poison_slabs(buffer, is_low_latency=True)
        for sent, back in kept:
            receive(check, sent)
            finish(check, back)


def third_call_is_refused(check: Checker) -> None:
    """A third result would overwrite one of two that wait: the call says so and sends nothing."""
    case = make_case(check, "third-call", (9, 3), 9, 128, 2, 2, "uniform")
    with check.buffer() as buffer:
        waiting = [send(check, buffer, case, round_, return_recv_hook=True) for round_ in range(2)]
        try:
            send(check, buffer, case, 2)
        except InvalidArgument as error:
            check.holds("hook" in str(error), "message of the refused call", error)
        else:
            check.fail("third low_latency_dispatch", "was not refused")
        for sent in waiting:
            receive(check, sent)
        receive(check, send(check, buffer, case, 3))


def hooks_in_any_order(check: Checker) -> None:
    """Results that wait stay as they are, whichever hook is called first."""
    case = make_case(check, "hooks-in-any-order", (9, 3), 9, 128, 2, 2, "uniform")
    with check.buffer() as buffer:
        first, second = (
            send(check, buffer, case, round_, return_recv_hook=True) for round_ in range(2)
        )
        receive(check, second)
        third = None
        try:  # a call that would overwrite the first result has to be refused
            third = send(check, buffer, case, 2, return_recv_hook=True)
        except InvalidArgument as error:
            check.holds("hook" in str(error), "message of the refused call", error)
        check.case += ", first result after a third call"
        receive(check, first)
        if third is not None:
            receive(check, third)


def slots_grow_beside_waiting_results(check: Checker) -> None:
    """A larger shape is refused or gets new slots; a result that waits is untouched either way."""
    small = make_case(check, "growth-small", (3,), 4, 128, 2, 1, "uniform")
    large = make_case(check, "growth-large", (40, 7), 64, 256, 4, 4, "zipf", "none")
    with check.buffer() as buffer:
        for case, round_ in ((small, 0), (large, 0)):
            waiting = send(check, buffer, small, round_, return_recv_hook=True)
            grown = None
            try:
                grown = send(check, buffer, case, round_ + 2, return_recv_hook=True)
            except InvalidArgument as error:
                check.holds("num_rdma_bytes" in str(error), "message of the refused call", error)
            receive(check, waiting)
            back = send_back(check, buffer, waiting, return_recv_hook=True)
            if grown is not None:
                receive(check, grown)
                finish(check, send_back(check, buffer, grown))
            finish(check, back)


def late_hook_beside_zero_copy(check: Checker) -> None:
    """A rank fills the next combine buffer while another has not received the last combine yet."""
    case = make_case(check, "zero-copy-and-late-hooks", (9, 12), 12, 128, 2, 2, "uniform", "none")
    with check.buffer() as buffer:
        first = send(check, buffer, case, 0)
        receive(check, first)
        back = send_back(check, buffer, first, return_recv_hook=True)
        second = send(check, buffer, case, 1, return_recv_hook=True)
        if check.rank:
            time.sleep(0.3)  # rank 0 goes on, as far as it may
        finish(check, back)
        receive(check, second)
        finish(check, send_back(check, buffer, second, zero_copy=True))


ALWAYS = (
    results_are_near_float64,
    infinities_stay_in_their_tokens,
    small_and_large_shapes,
    size_hint_is_enough,
    beside_throughput_calls,
    outputs_are_the_caller_s,
    third_call_is_refused,
    hooks_in_any_order,
    slots_grow_beside_waiting_results,
    late_hook_beside_zero_copy,
)
WITH_PEERS = (masked_rank_is_skipped, absent_rank_is_skipped)
WHERE_MUTABLE = (inputs_may_change_after_sending,)


def run(group: Any, frame: NumpyFrame, engine: str) -> str:
    """Run all scenarios; return the digest of all outputs."""
    check = Checker(group, frame, engine)
    scenarios = ALWAYS
    if check.size > 1:
        scenarios += WITH_PEERS
    if frame.is_mutable:
        scenarios += WHERE_MUTABLE
    for scenario in scenarios:
        check.case = scenario.__name__
        scenario(check)
    return check.digest()


if __name__ == "__main__":
    main(run)
