"""Contract of `epcomm.training` and `epcomm.decoding`: a few steps as their callers make them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import contract_dispatch as calls
import contract_low_latency as low_latency
import ml_dtypes
import numpy as np
import oracle
from common import TIMEOUT_S, Array, Checker, main, rng_of
from contract_dispatch import BF16, E4M3, F32, I32, Case, Scales
from frames import NumpyFrame

from epcomm import decoding, training

TRAINING_CASES = (
    Case("train-uneven", (17, 3, 0, 40), 64, 4, 4, "zipf"),
    Case("train-f32", (9, 1), 32, 2, 3, "some", F32, I32),
    Case("train-one-expert", (12,), 64, 1, 2, "one_expert"),
    Case("train-nothing-chosen", (5,), 64, 2, 2, "none"),
)
PAIR_CASE = Case("train-fp8", (7, 20), 64, 4, 2, "uniform", E4M3, scales=Scales(4, F32, "columns"))


def one_buffer_a_rank(check: Checker, module: Any, small: tuple, large: tuple) -> None:
    """get_buffer keeps its Buffer until there is a reason for another."""

    def get(size: tuple) -> Any:
        return module.get_buffer(check.group, *size, **check.place)

    first = get(small)
    check.holds(get(small) is first, "get_buffer", "made a second one")
    larger = get(large)
    check.holds(larger is not first, "get_buffer", "kept a Buffer that is too small")
    check.holds(first.is_destroyed, "get_buffer", "left the smaller Buffer open")
    check.holds(get(small) is larger, "get_buffer", "shrank the Buffer")
    larger.destroy()
    check.holds(not get(small).is_destroyed, "get_buffer", "is closed")


def hidden_bytes_are_told(check: Checker) -> None:
    """Bytes of a row, at least two an element, of rows or of the first of a pair."""
    for dtype, want in ((BF16, 128), (F32, 256), (E4M3, 128)):
        rows = check.frame.make(np.zeros((3, 64), dtype))
        check.equal(f"hidden bytes of {dtype}", training.get_hidden_bytes(rows), want)
        pair = (rows, check.frame.make(np.zeros((3, 4), F32)))
        check.equal(f"hidden bytes of a pair of {dtype}", training.get_hidden_bytes(pair), want)


def train_step(check: Checker, case: Case, round_: int) -> None:
    """Dispatch, combine, and both backwards, as a framework's autograd would call them."""
    check.case = f"case {case.id}, round {round_}"
    everyone = calls.all_inputs(case, round_, check.size)
    mine, num_experts = everyone[check.rank], case.num_local * check.size
    topk = [inputs.topk_idx for inputs in everyone]
    weights = [inputs.topk_weights for inputs in everyone]
    x = calls.make_x(check, case, mine)
    hidden_bytes = training.get_hidden_bytes(x)
    buffer = training.get_buffer(check.group, hidden_bytes, **check.place)
    recv_x, recv_idx, recv_weights, counts, handle, event = training.dispatch_forward(
        x,
        check.make("topk_idx", mine.topk_idx),
        check.make("topk_weights", mine.topk_weights),
        num_experts,
        previous_event=buffer.capture() if round_ else None,
    )
    event.current_stream_wait()
    origins = oracle.arrivals(topk, num_experts, check.rank)
    calls.check_rows(check, recv_x, everyone, origins, len(origins))
    picked = oracle.pick(topk, origins), oracle.pick(weights, origins)
    want_idx, want_weights = oracle.received_topk(*picked, num_experts, check.size, check.rank)
    check.array("recv_topk_idx", recv_idx, want_idx)
    check.array("recv_topk_weights", recv_weights, want_weights)
    want_counts = oracle.tokens_per_local_expert(topk, num_experts, check.rank, 1)
    check.equal("num_recv_tokens_per_expert_list", counts, want_counts)

    def summed(rank: int) -> Array:
        return calls.experts_result(case, round_, rank, mine.base)

    rows = calls.experts_result(
        case, round_, check.rank, oracle.pick([i.base for i in everyone], origins)
    )
    combined_x, event = training.combine_forward(check.make("rows", rows), handle)
    event.current_stream_wait()
    want = check.combined([summed(rank) for rank in range(check.size)], mine.topk_idx, num_experts)
    check.array("combined_x", combined_x, want)

    grads = [grad_of(case, round_, rank, check.size) for rank in range(check.size)]
    grad_rows, event = training.combine_backward(check.make("grad", grads[check.rank]), handle)
    event.current_stream_wait()
    check.array("grad_x of combine", grad_rows, oracle.pick(grads, origins))

    factor = np.float32(check.rank + 1)
    grad_weights = check.make("grad of weights", want_weights * factor)
    grad_x, grad_topk_weights, event = training.dispatch_backward(grad_rows, grad_weights, handle)
    event.current_stream_wait()
    want = check.combined([grads[check.rank]] * check.size, mine.topk_idx, num_experts)
    check.array("grad_x of dispatch", grad_x, want)
    holder = mine.topk_idx // case.num_local
    want = np.where(holder >= 0, mine.topk_weights * (holder + 1).astype(F32), F32.type(0))
    check.array("grad_topk_weights", grad_topk_weights, want)
    grad_x, none, event = training.dispatch_backward(grad_rows, None, handle)
    event.current_stream_wait()
    check.equal("grad_topk_weights without any", none, None)
    check.unchanged()


def grad_of(case: Case, round_: int, rank: int, num_ranks: int) -> Array:
    """Return a rank's gradient of its combined rows."""
    shape = calls.inputs_of(case, round_, rank, num_ranks).x.shape
    values = rng_of(case.id, "grad", round_, rank).standard_normal(shape, np.float32)
    return oracle.round_to(values, calls.combined_dtype(case))


def decode_step(check: Checker, case: low_latency.Case, round_: int) -> None:
    """Both calls of a layer, with receive hooks."""
    check.case = f"case {case.id}, round {round_}"
    mine = low_latency.inputs_of(case, round_, check.rank, check.size)
    num_experts = case.num_local * check.size
    shape = (case.num_max, case.hidden, num_experts)
    decoding.get_buffer(check.group, *shape, **check.place)
    idx = check.make("topk_idx", mine.topk_idx)
    recv_x, count, handle, _, hook = decoding.low_latency_dispatch(
        check.make("x", mine.x), idx, case.num_max, num_experts
    )
    topk = [inputs.topk_idx for inputs in low_latency.all_inputs(case, round_, check.size)]
    rows = oracle.expert_rows(topk, num_experts, check.rank)
    sent = low_latency.Sent(case, round_, idx, recv_x, count, handle, hook, rows)
    low_latency.receive(check, sent)
    shape = (case.num_local, check.size * case.num_max, case.hidden)
    filled = low_latency.fill_rows(check, sent, np.empty(shape, ml_dtypes.bfloat16))
    combined_x, _, hook = decoding.low_latency_combine(
        check.make("rows", filled), idx, check.make("topk_weights", mine.topk_weights), handle
    )
    want = oracle.low_latency_combine(
        low_latency.results_of_choices(case, mine, num_experts),
        mine.topk_idx,
        mine.topk_weights,
        case.num_local,
        is_by_rank=True,
    )
    low_latency.finish(check, low_latency.Combined(combined_x, hook, want))


def run(group: Any, frame: NumpyFrame, engine: str) -> str:
    """Run all steps; return the digest of all outputs."""
    check = Checker(group, frame, engine)
    hidden_bytes_are_told(check)
    check.case = "training.get_buffer"
    one_buffer_a_rank(check, training, (64,), (256,))
    for case in (*TRAINING_CASES, PAIR_CASE):
        for round_ in range(2):
            train_step(check, calls.for_frame(case, frame), round_)
    training.get_buffer(group, 64, **check.place).destroy()
    if engine != "cuda" and check.num_nodes == 1:
        with check.aside():
            decode_steps(check)
    check.ranks.barrier(timeout_s=TIMEOUT_S)
    return check.digest()


def decode_steps(check: Checker) -> None:
    """A few layers of decoding."""
    check.case = "decoding.get_buffer"
    small, large = (4, 128, check.size), (16, 256, 2 * check.size)
    one_buffer_a_rank(check, decoding, small, large)
    case = low_latency.Case("decode", (9, 16, 0), 16, 256, 4, 4, "some")
    case = replace(case, idx_dtype=check.frame.dtype(case.idx_dtype))
    for round_ in range(3):
        decode_step(check, case, round_)
    decoding.get_buffer(check.group, *small, **check.place).destroy()


if __name__ == "__main__":
    main(run)
