"""Contract of what spans calls: several handles, several Buffers, growth, sizes told beforehand.

And of what a table of shapes does not show: identities, tolerances, calls with fewer arguments.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import contract_dispatch as calls
import numpy as np
import oracle
from common import Checker, expand, main, rng_of
from contract_dispatch import BF16, E4M3, F16, F32, I32, Case, Scales
from frames import ROW_DTYPES, NumpyFrame

from epcomm import Buffer, Config

FIRST = Case("first-handle", (17, 3, 0, 40), 256, 4, 4, "zipf")
SECOND = Case("second-handle", (1, 50), 96, 8, 2, "some", F32, I32, num_spare=5)
THIRD = Case("third-handle", (12,), 128, 2, 8, "uniform", F16)
#: Enough for these: with num_worst_tokens not every engine can let its slabs grow.
NUM_BYTES = 8 << 20


def several_handles(check: Checker) -> None:
    """Handles live side by side; their combines and repeated dispatches come in any order."""
    first, second, third = (calls.for_frame(case, check.frame) for case in (FIRST, SECOND, THIRD))
    with check.buffer(NUM_BYTES) as buffer:
        for round_ in range(2):
            a = calls.check_dispatch(check, buffer, first, round_)
            b = calls.check_dispatch(check, buffer, second, round_)
            calls.check_combine(check, buffer, first, round_, a)
            c = calls.check_dispatch(check, buffer, third, round_)
            calls.check_combine(check, buffer, third, round_, c)
            calls.check_repeated(check, buffer, first, round_, a)
            calls.check_combine(check, buffer, second, round_, b)
            calls.check_repeated(check, buffer, third, round_, c)
            calls.check_combine(check, buffer, first, round_, a, has_weights=False)
            check.poison_slabs(buffer)
            calls.check_combine(check, buffer, second, round_, b)


def several_buffers(check: Checker) -> None:
    """Buffers of one group know nothing of each other, the end of one included."""
    first, second = (calls.for_frame(case, check.frame) for case in (FIRST, SECOND))
    with check.buffer(NUM_BYTES) as one:
        with check.buffer(NUM_BYTES + (1 << 20)) as other:
            a = calls.check_dispatch(check, one, first, 0)
            b = calls.check_dispatch(check, other, second, 0)
            calls.check_combine(check, one, first, 0, a)
            check.poison_slabs(one)
            calls.check_combine(check, other, second, 0, b)
            c = calls.check_dispatch(check, other, first, 1)
            d = calls.check_dispatch(check, one, second, 1)
            calls.check_combine(check, other, first, 1, c)
        calls.check_combine(check, one, second, 1, d)
        with check.buffer() as later:
            calls.check_dispatch(check, later, first, 2)
        calls.check_repeated(check, one, first, 0, a)


def slab_grows(check: Checker) -> None:
    """Small, large, small: the slab grows once, and handles from before go on."""
    small = calls.for_frame(replace(FIRST, num_tokens=(2, 1)), check.frame)
    large = calls.for_frame(Case("large", (200, 300), 2048, 4, 4, "uniform", F32), check.frame)
    sizes = []
    with check.buffer() as buffer:
        sizes.append(size_of(buffer))
        before = calls.check_dispatch(check, buffer, small, 0)
        sizes.append(size_of(buffer))
        during = calls.check_dispatch(check, buffer, large, 0)
        sizes.append(size_of(buffer))
        calls.check_combine(check, buffer, small, 0, before)
        sizes.append(size_of(buffer))
        after = calls.check_dispatch(check, buffer, small, 1)
        calls.check_combine(check, buffer, small, 1, after)
        calls.check_repeated(check, buffer, small, 0, before)
        sizes.append(size_of(buffer))
        calls.check_combine(check, buffer, large, 0, during)
    # An engine may add what combine needs at the first combine.
    check.holds(0 == sizes[0] < sizes[1] < sizes[2] <= sizes[3] == sizes[4], "slab sizes", sizes)


def slab_of_one_rank_grows(check: Checker) -> None:
    """Where the load moves from rank to rank, slabs grow in turn and none gets smaller."""
    sizes = [0]
    with check.buffer() as buffer:
        for turn in range(3):
            tokens = tuple(600 * (turn + 1) if rank == turn else 1 for rank in range(check.size))
            case = Case(f"load-on-rank-{turn}", tokens, 1024, 1, 1, "one_expert", F32)
            case = calls.for_frame(case, check.frame)
            sent = calls.check_dispatch(check, buffer, case, 0)
            sizes.append(size_of(buffer))
            calls.check_combine(check, buffer, case, 0, sent)
            sizes.append(size_of(buffer))
    check.holds(sizes == sorted(sizes), "slab sizes", sizes)


def size_hint_is_enough(check: Checker) -> None:
    """A Buffer of the size that the hint tells never grows, whatever the routing."""
    cases = (
        Case("hint-large-rows", (300,), 2048, 2, 2, "uniform", F32),
        Case("hint-all-on-one-rank", (300,), 2048, 1, 1, "one_rank", F32),
        Case("hint-many-choices", (1500, 2), 64, 128, 1, "one_rank"),
        Case("hint-many-experts", (40,), 256, 128, 2000, "zipf"),
        Case("hint-pair", (40,), 480, 8, 8, "uniform", E4M3, scales=Scales(8, F32, "columns")),
        Case("hint-one-token", (1,), 256, 1, 1, "one_expert"),
    )
    for case in cases:
        case = calls.for_frame(case, check.frame)
        check.case = f"case {case.id}"
        row_bytes = case.hidden * case.dtype.itemsize + (4 * case.scales.num if case.scales else 0)
        # Combined rows have two bytes an element at least.
        hidden_bytes = max(row_bytes, case.hidden * 2)
        dispatch, combine = (
            get(check.size).get_nvl_buffer_size_hint(
                hidden_bytes, check.size, num_max_tokens=max(case.num_tokens)
            )
            for get in (Buffer.get_dispatch_config, Buffer.get_combine_config)
        )
        between_nodes = Config().get_rdma_buffer_size_hint(
            hidden_bytes, check.size, num_max_tokens=max(case.num_tokens)
        )
        check.holds((between_nodes == 0) == (check.num_nodes == 1), "rdma hint", between_nodes)
        with check.buffer(max(dispatch, combine), between_nodes) as buffer:
            said, size = repr(buffer), size_of(buffer)
            sent = calls.check_dispatch(check, buffer, case, 0)
            calls.check_combine(check, buffer, case, 0, sent)
            calls.check_repeated(check, buffer, case, 0, sent)
            check.holds(size_of(buffer) == size, "slab size, which grew", (size, size_of(buffer)))
            check.holds(repr(buffer) == said, "repr", (said, repr(buffer)))


def size_of(buffer: Buffer) -> int:
    """Return the bytes of this rank's slab."""
    return int(buffer.get_local_buffer_tensor(np.uint8).size)


def layout_made_by_dispatch(check: Checker) -> None:
    """With num_experts= and the choices, dispatch makes the layout itself."""
    case = calls.for_frame(FIRST, check.frame)
    everyone = calls.all_inputs(case, 0, check.size)
    mine, num_experts = everyone[check.rank], case.num_local * check.size
    idx, weights = check.make("idx", mine.topk_idx), check.make("weights", mine.topk_weights)
    with check.buffer() as buffer:
        recv_x, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(
            check.make("x", mine.x), topk_idx=idx, topk_weights=weights, num_experts=num_experts
        )
        topk = [inputs.topk_idx for inputs in everyone]
        origins = oracle.arrivals(topk, num_experts, check.rank)
        calls.check_rows(check, recv_x, everyone, origins, len(origins))
        weights_by_rank = [inputs.topk_weights for inputs in everyone]
        picked = oracle.pick(topk, origins), oracle.pick(weights_by_rank, origins)
        want = oracle.received_topk(*picked, num_experts, check.size, check.rank)
        check.array("recv_topk_idx", recv_idx, want[0])
        check.array("recv_topk_weights", recv_weights, want[1])
        want_counts = oracle.tokens_per_local_expert(topk, num_experts, check.rank, 1)
        check.equal("num_recv_tokens_per_expert_list", counts, want_counts)
        calls.check_combine(
            check, buffer, case, 0, calls.Sent(handle, origins, want[1], len(origins))
        )


def without_choices(check: Checker) -> None:
    """Choices and weights may stay at home: then none come out."""
    case = calls.for_frame(replace(THIRD, alignment=16), check.frame)
    everyone = calls.all_inputs(case, 0, check.size)
    mine, num_experts = everyone[check.rank], case.num_local * check.size
    topk = [inputs.topk_idx for inputs in everyone]
    origins = oracle.arrivals(topk, num_experts, check.rank)
    idx = check.make("topk_idx", mine.topk_idx)
    with check.buffer() as buffer:
        layout = calls.check_layout(check, buffer, idx, num_experts)
        x = check.make("x", mine.x)
        for num_worst in (0, len(origins) + 2):
            recv_x, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(
                x, None, *layout, expert_alignment=16, num_worst_tokens=num_worst
            )
            check.equal("choices", (recv_idx, recv_weights), (None, None))
            want = oracle.tokens_per_local_expert(topk, num_experts, check.rank, 16)
            check.equal("num_recv_tokens_per_expert_list", counts, [] if num_worst else want)
            num_rows = num_worst or len(origins)
            calls.check_rows(check, recv_x, everyone, origins, num_rows)
            weights = rng_of(check.rank).random((len(origins), 3), np.float32)
            sent = calls.Sent(handle, origins, weights, num_rows)
            calls.check_combine(check, buffer, case, 0, sent, has_weights=False)
    check.unchanged()


def rows_of_every_dtype(check: Checker) -> None:
    """Dispatch moves the bits of any dtype, alone; and of any one-byte dtype with scales."""
    base = Case("every-dtype", (6, 9, 1), 64, 2, 2, "uniform")
    with check.buffer() as buffer:
        for dtype in sorted({check.frame.dtype(dtype) for dtype in ROW_DTYPES}, key=str):
            scales = (None, Scales(3, F32, "gaps")) if dtype.itemsize == 1 else (None,)
            for pair in scales:
                name = f"every-dtype-{dtype.name}{'' if pair is None else '-pair'}"
                case = replace(base, id=name, dtype=dtype, scales=pair)
                case = calls.for_frame(case, check.frame)
                check.case = f"case {name}"
                sent = calls.check_dispatch(check, buffer, case, 0)
                calls.check_repeated(check, buffer, case, 0, sent)


def outputs_are_the_caller_s(check: Checker) -> None:
    """Outputs stay as they are whatever calls and slabs do afterwards.

    And inputs may be overwritten right after the call, whether or not other ranks are done.
    """
    case = calls.for_frame(FIRST, check.frame)
    everyone = calls.all_inputs(case, 0, check.size)
    mine, num_experts = everyone[check.rank], case.num_local * check.size
    arrays = [
        check.frame.make_writable(array) for array in (mine.x, mine.topk_idx, mine.topk_weights)
    ]
    with check.buffer() as buffer:
        x, idx, weights = arrays
        recv_x, _, recv_weights, _, handle, _ = buffer.dispatch(
            x, topk_idx=idx, topk_weights=weights, num_experts=num_experts
        )
        for array in arrays:
            check.frame.overwrite(array)
        topk = [inputs.topk_idx for inputs in everyone]
        origins = oracle.arrivals(topk, num_experts, check.rank)
        calls.check_rows(check, recv_x, everyone, origins, len(origins))
        rows = check.frame.make_writable(check.frame.numpy(recv_x))
        weights = check.frame.make_writable(check.frame.numpy(recv_weights))
        combined_x, combined_weights, _ = buffer.combine(rows, handle, weights)
        for array in (rows, weights):
            check.frame.overwrite(array)
        sent = calls.check_dispatch(check, buffer, case, 1)
        calls.check_combine(check, buffer, case, 1, sent)
        check.poison_slabs(buffer)
        calls.check_rows(check, recv_x, everyone, origins, len(origins))
        want = check.combined([mine.x] * check.size, mine.topk_idx, num_experts)
        check.array("combined_x", combined_x, want, any_nan=True)
        want = np.where(mine.topk_idx >= 0, mine.topk_weights, np.float32(0.0))
        check.array("combined_topk_weights", combined_weights, want)


def combine_undoes_dispatch(check: Checker) -> None:
    """Rows that come back as they went are counted: a token times the ranks that it went to.

    Combine is also the transpose of dispatch: <dispatch(x), y> over all ranks is <x, combine(y)>.
    """
    for dtype in (BF16, F16, F32):
        case = Case(f"there-and-back-{dtype.name}", (30, 9, 0, 41), 128, 6, 4, "some", dtype)
        case = calls.for_frame(case, check.frame)
        check.case = f"case {case.id}"
        mine = calls.inputs_of(case, 0, check.rank, check.size)
        rng = rng_of(case.id, "small whole numbers", check.rank)
        x = rng.integers(-4, 5, mine.x.shape).astype(dtype)
        idx = check.make("topk_idx", mine.topk_idx)
        with check.buffer() as buffer:
            layout = calls.check_layout(check, buffer, idx, case.num_local * check.size)
            recv_x, *_, handle, _ = buffer.dispatch(check.make("x", x), None, *layout)
            combined, _, _ = buffer.combine(recv_x, handle)
            num_ranks = check.frame.numpy(layout[2]).sum(axis=1)[:, None]
            want = x.astype(np.float32) * num_ranks + np.float32(0)  # no minus zeros
            check.array("combined_x", combined, want.astype(dtype))

            received = check.frame.numpy(recv_x)
            y = rng.integers(-4, 5, received.shape).astype(dtype)
            back, _, _ = buffer.combine(check.make("y", y), handle)
            there = _dot(received, y), _dot(x, check.frame.numpy(back))
            sums = np.array(check.ranks.allgather(there, timeout_s=60)).sum(axis=0)
            check.equal("<dispatch(x), y> and <x, combine(y)>", *sums.tolist())
        check.unchanged()


def _dot(a: Any, b: Any) -> float:
    return float((a.astype(np.float64) * b.astype(np.float64)).sum())


def results_are_near_float64(check: Checker) -> None:
    """The tolerances that the field tests with, with choices of one expert by several tokens."""
    case = calls.for_frame(Case("near-float64", (64, 100), 1024, 8, 4, "zipf"), check.frame)
    mine = calls.inputs_of(case, 0, check.rank, check.size)
    x = oracle.round_to(rng_of(case.id, check.rank).standard_normal(mine.x.shape, np.float32), BF16)
    weights = np.abs(mine.topk_weights)
    with check.buffer() as buffer:
        recv_x, _, recv_weights, _, handle, _ = buffer.dispatch(
            check.make("x", x),
            topk_idx=check.make("topk_idx", mine.topk_idx),
            topk_weights=check.make("topk_weights", weights),
            num_experts=case.num_local * check.size,
        )
        combined, combined_weights, _ = buffer.combine(recv_x, handle, recv_weights)
    layout = oracle.layout(mine.topk_idx, case.num_local * check.size, check.size)
    want = x.astype(np.float64) * layout.is_token_in_rank.sum(axis=1)[:, None]
    off = oracle.difference(check.frame.numpy(combined), want)
    check.holds(off < 5e-6, "combined_x", f"differs by {off}")
    want = np.where(mine.topk_idx >= 0, weights, 0.0)
    off = oracle.difference(check.frame.numpy(combined_weights), want)
    check.holds(off < 1e-9, "combined_topk_weights", f"differs by {off}")


def buffers_follow_each_other(check: Checker) -> None:
    """A Buffer can be made anew as often as one likes."""
    for round_ in range(3):
        with check.buffer(round_ << 20, explicitly_destroy=True) as buffer:
            case = calls.for_frame(THIRD, check.frame)
            sent = calls.check_dispatch(check, buffer, case, round_)
            calls.check_combine(check, buffer, case, round_, sent)
        buffer.destroy()
        check.holds(buffer.is_destroyed, "is_destroyed after destroy()")


def local_memory_is_seen_as_asked(check: Checker) -> None:
    """get_local_buffer_tensor gives the slab itself, as any dtype and shape."""
    if check.engine != "host":
        gpu_memory_is_seen_as_asked(check)
        return
    with check.buffer(4096, 8192) as buffer:
        for is_low_latency, num_bytes in ((False, 4096), (True, 8192)):
            whole = buffer.get_local_buffer_tensor(np.uint8, use_rdma_buffer=is_low_latency)
            check.holds(whole.size >= num_bytes, "bytes of the slab", whole.size)
            whole[...] = expand((1, 2, 3), check.rank)
            part = buffer.get_local_buffer_tensor(
                BF16, (4, 8), offset=16, use_rdma_buffer=is_low_latency
            )
            check.equal("shape of a part", part.shape, (4, 8))
            part[...] = 0
            check.equal("bytes of the part", int((whole[16:80] != 0).sum()), 0)
            check.holds(bool((whole[:16] != 0).all() and (whole[80:] != 0).all()), "other bytes")
            check.ranks.barrier()


def gpu_memory_is_seen_as_asked(check: Checker) -> None:
    """On the cuda engine it is the memory of rows, beyond what calls keep step with."""
    with check.buffer(NUM_BYTES) as buffer:
        whole = buffer.get_local_buffer_tensor(np.uint8)
        check.holds(whole.size >= NUM_BYTES // 2, "bytes of the slab", whole.size)
        whole[...] = check.rank + 1
        part = buffer.get_local_buffer_tensor(BF16, (4, 8), offset=16)
        check.holds(part.shape == (4, 8), "shape of a part", part.shape)
        part[...] = 0
        check.holds(int((whole[16:80] != 0).sum()) == 0, "bytes of the part")
        check.holds(bool((whole[:16] != 0).all() and (whole[80:] != 0).all()), "other bytes")
        check.frame.synchronize()
        check.ranks.barrier()
        case = calls.for_frame(FIRST, check.frame)
        with check.aside():
            sent = calls.check_dispatch(check, buffer, case, 0)
            calls.check_combine(check, buffer, case, 0, sent)


def choices_of_another_framework(check: Checker) -> None:
    """Outputs of dispatch are of the framework of x, where everything else is NumPy's."""
    if check.engine != "host":
        return  # NumPy's arrays are on another device
    case = calls.for_frame(FIRST, check.frame)
    everyone = calls.all_inputs(case, 0, check.size)
    mine, num_experts = everyone[check.rank], case.num_local * check.size
    with check.buffer() as buffer:
        *layout, _ = buffer.get_dispatch_layout(mine.topk_idx, num_experts)
        for array in (layout[0], *layout[2:]):
            check.holds(type(array) is np.ndarray, "layout", f"is a {type(array)}")
        recv_x, recv_idx, recv_weights, *_ = buffer.dispatch(
            check.make("x", mine.x),
            num_tokens_per_rank=layout[0],
            num_tokens_per_expert=layout[2],
            is_token_in_rank=layout[3],
            topk_idx=mine.topk_idx,
            topk_weights=mine.topk_weights,
        )
        topk = [inputs.topk_idx for inputs in everyone]
        origins = oracle.arrivals(topk, num_experts, check.rank)
        calls.check_rows(check, recv_x, everyone, origins, len(origins))
        weights_by_rank = [inputs.topk_weights for inputs in everyone]
        picked = oracle.pick(topk, origins), oracle.pick(weights_by_rank, origins)
        want = oracle.received_topk(*picked, num_experts, check.size, check.rank)
        check.array("recv_topk_idx", recv_idx, want[0])
        check.array("recv_topk_weights", recv_weights, want[1])


SCENARIOS = (
    several_handles,
    several_buffers,
    slab_grows,
    slab_of_one_rank_grows,
    size_hint_is_enough,
    layout_made_by_dispatch,
    without_choices,
    rows_of_every_dtype,
    combine_undoes_dispatch,
    results_are_near_float64,
    buffers_follow_each_other,
    choices_of_another_framework,
)
WHERE_MUTABLE = (outputs_are_the_caller_s, local_memory_is_seen_as_asked)
#: What depends on the engine, or on the dtypes that a framework has.
NOT_EVERYWHERE = (
    rows_of_every_dtype,
    choices_of_another_framework,
    local_memory_is_seen_as_asked,
)


def run(group: Any, frame: NumpyFrame, engine: str) -> str:
    """Run all scenarios; return the digest of all outputs."""
    check = Checker(group, frame, engine)
    for scenario in SCENARIOS + (WHERE_MUTABLE if frame.is_mutable else ()):
        check.case = scenario.__name__
        with check.aside() if scenario in NOT_EVERYWHERE else nullcontext():
            scenario(check)
    return check.digest()


if __name__ == "__main__":
    main(run)
