"""Contract of layout, dispatch and combine: a table of cases, several rounds each, on one Buffer.

Every output is held to the oracle bit by bit, on poisoned memory, with other data every round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import oracle
from common import (
    SPECIAL,
    Array,
    Checker,
    choose_experts,
    expand,
    frozen,
    main,
    once,
    random_bits,
    rng_of,
)
from frames import NumpyFrame, poison

from epcomm import Buffer

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
I8, U8, I32, I64 = map(np.dtype, (np.int8, np.uint8, np.int32, np.int64))


@dataclass(frozen=True)
class Scales:
    """The second array of a pair.

    Attributes:
        num: Scales a token.
        dtype: f32 or i32.
        order: How they lie in memory, one of `frames.MEMORY_ORDERS`.
    """

    num: int
    dtype: np.dtype[Any]
    order: str


@dataclass(frozen=True)
class Case:
    """One shape of call.

    Attributes:
        id: Its name, in messages.
        num_tokens: Tokens by rank, repeated over the ranks.
        hidden: Elements of a row.
        num_topk: Choices of a token.
        num_local: Experts of a rank.
        routing: One of the routings of `common.choose_experts`.
        dtype: Dtype of the rows.
        idx_dtype: Dtype of the choices.
        scales: The scales of a pair, or None.
        alignment: ``expert_alignment``.
        num_spare: With ``num_worst_tokens``: rows beyond those that arrive; else None.
        is_special: Whether combine sums signed zeros, infinities and NaNs.
        num_rounds: Rounds; round i adds i % 3 biases.
    """

    id: str
    num_tokens: tuple[int, ...]
    hidden: int
    num_topk: int
    num_local: int
    routing: str
    dtype: np.dtype[Any] = BF16
    idx_dtype: np.dtype[Any] = I64
    scales: Scales | None = None
    alignment: int = 1
    num_spare: int | None = None
    is_special: bool = False
    num_rounds: int = 3


UNEVEN = (5, 0, 17, 1, 64, 3, 2, 9)

CASES = (
    Case("plain", (64,), 256, 8, 8, "uniform"),
    Case("uneven-tokens", UNEVEN, 2880, 8, 4, "zipf", alignment=128),
    Case("no-tokens", (0,), 64, 2, 2, "uniform"),
    Case("one-token", (1,), 7168, 8, 8, "uniform"),
    Case("one-rank-has-tokens", (0, 33, 0), 64, 4, 3, "uniform", F32),
    Case("one-expert-takes-all", (13, 64, 1), 72, 1, 4, "one_expert", idx_dtype=I32),
    Case("one-expert-a-rank", (21,), 64, 2, 1, "uniform", F16),
    Case("no-choice-at-all", (9,), 64, 4, 2, "none", F32),
    Case("some-choices", UNEVEN, 512, 16, 16, "some", F16, I32, alignment=4),
    Case("repeated-choices", (33,), 64, 8, 2, "repeats", F32),
    Case("all-to-the-last-rank", (64,), 128, 4, 8, "one_rank", F32),
    Case("long-rows", (20, 3, 0, 5), 8192, 2, 4, "uniform", F32),
    Case("odd-rows", (30, 31), 100, 3, 5, "zipf", F32, alignment=3),
    Case("many-experts", (16,), 64, 8, 64, "zipf"),
    Case("many-tokens", (1500, 700, 0), 64, 8, 4, "zipf", num_rounds=1),
    Case("more-choices-than-experts", (6,), 64, 16, 1, "some"),
    Case("fp8-pair", (37,), 1024, 6, 4, "uniform", E4M3, scales=Scales(8, F32, "rows")),
    Case("fp8-scales-by-column", UNEVEN, 1536, 4, 4, "zipf", E4M3, I32, Scales(12, F32, "columns")),
    Case("fp8-e5m2-packed-scales", (8, 0), 512, 2, 2, "some", E5M2, scales=Scales(1, I32, "gaps")),
    Case("int8-pair-with-gaps", (19,), 160, 8, 8, "some", I8, scales=Scales(5, F32, "gaps")),
    Case("uint8-pair-one-scale", (19, 2), 48, 2, 4, "zipf", U8, scales=Scales(3, I32, "expanded")),
    Case("uint8-alone", (20,), 48, 2, 2, "repeats", U8),
    Case("worst-tokens-exact", (11, 3), 64, 4, 4, "uniform", num_spare=0),
    Case("worst-tokens-spare", UNEVEN, 128, 8, 4, "zipf", F32, I32, num_spare=13),
    Case("worst-tokens-none-arrive", (4,), 64, 2, 2, "none", num_spare=7),
    Case(
        *("worst-tokens-pair", (12, 0, 5), 256, 3, 2, "some", E4M3),
        scales=Scales(2, F32, "columns"),
        num_spare=3,
    ),
    Case("special-values", (48,), 64, 4, 2, "some", is_special=True, num_rounds=6),
    Case("special-values-f32", (24,), 64, 4, 2, "uniform", F32, is_special=True),
    Case("special-values-f16", (24,), 64, 4, 2, "uniform", F16, is_special=True),
    # Engines may go by what arrived in the last calls of as many tokens: then it is far fewer, far
    # more, or none; or as many, of rows that are longer than any before.
    Case("arrivals-vary", (40,), 64, 2, 3, "a_rank_each", num_rounds=8),
    Case(
        "arrivals-vary-in-pairs", (40,), 64, 2, 3, "a_rank_each", E4M3, I32, Scales(3, F32, "gaps")
    ),
    Case("arrivals-stay", (40,), 64, 2, 3, "uniform", num_rounds=4),
    Case("longer-rows-than-before", (40,), 16384, 2, 3, "uniform", F32, num_rounds=1),
)


# --- data --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """All that one rank passes in one round; and ``base``, of which experts' rows are made."""

    x: Array
    scales: Array | None
    topk_idx: Array
    topk_weights: Array
    base: Array
    biases: tuple[Array, ...]


def combined_dtype(case: Case) -> np.dtype[Any]:
    """Return the dtype of combined rows: that of the rows, where it can be summed."""
    return case.dtype if case.dtype in (BF16, F16, F32) else BF16


@once
def inputs_of(case: Case, round_: int, rank: int, num_ranks: int) -> Inputs:
    rng = rng_of(case.id, round_, rank, num_ranks)
    num_tokens = expand(case.num_tokens, rank + round_)
    shape = (num_tokens, case.hidden)
    scales = None
    if case.scales is not None:
        scales = random_bits(rng, (num_tokens, case.scales.num), case.scales.dtype)
        if case.scales.order == "expanded":
            scales[:] = scales[:, :1]
        frozen(scales)
    topk_shape = (num_tokens, case.num_topk)
    num_experts = case.num_local * num_ranks
    idx = choose_experts(case.routing, rng, *topk_shape, num_experts, num_ranks)
    base, *biases = (
        rng.choice(SPECIAL, shape) if case.is_special else rng.standard_normal(shape, np.float32)
        for _ in range(1 + round_ % 3)
    )
    return Inputs(
        x=frozen(random_bits(rng, shape, case.dtype)),
        scales=scales,
        topk_idx=frozen(idx.astype(case.idx_dtype)),
        topk_weights=frozen(rng.standard_normal(topk_shape, np.float32)),
        base=frozen(base),
        biases=tuple(
            frozen(oracle.round_to(np.ascontiguousarray(bias), combined_dtype(case)))
            for bias in biases
        ),
    )


def all_inputs(case: Case, round_: int, num_ranks: int) -> list[Inputs]:
    """Return the inputs of all ranks."""
    return [inputs_of(case, round_, rank, num_ranks) for rank in range(num_ranks)]


def experts_result(case: Case, round_: int, rank: int, base: Array) -> Array:
    """Return what a rank makes of rows: other numbers on every rank, large and small ones mixed.

    Sums of such numbers depend on the order of the additions.
    """
    if case.is_special:
        return oracle.round_to(np.ascontiguousarray(base), combined_dtype(case))
    return oracle.round_to(base * factor_of(case, round_, rank), combined_dtype(case))


@once
def factor_of(case: Case, round_: int, rank: int) -> Array:
    """Return what the experts of a rank multiply rows with.

    Half the numbers of odd ranks are those of the rank before with the other sign: what is added
    between the two loses bits that what is added after them keeps.
    """
    rng = rng_of(case.id, round_, "factor of rank", rank)
    spread = 4 if combined_dtype(case) == F16 else 12
    exponent = rng.integers(-spread, spread, case.hidden).astype(np.float32)
    factor = rng.standard_normal(case.hidden, np.float32) * np.float32(2) ** exponent
    if rank % 2:
        factor = np.where(rng.random(case.hidden) < 0.5, -factor_of(case, round_, rank - 1), factor)
    return frozen(factor)


# --- the calls ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """A dispatch that was checked, and what is needed to check its combine."""

    handle: Any
    origins: list[oracle.Origin]
    recv_topk_weights: Array
    num_rows: int


def check_layout(check: Checker, buffer: Buffer, topk_idx: Any, num_experts: int) -> tuple:
    """Call get_dispatch_layout, check it, and return what dispatch takes of it."""
    *arrays, event = buffer.get_dispatch_layout(topk_idx, num_experts)
    event.current_stream_wait()
    per_rank, per_node, per_expert, in_rank = arrays
    want = oracle.layout(check.frame.numpy(topk_idx), num_experts, check.size, check.nodes)
    if check.num_nodes == 1:
        check.equal("num_tokens_per_rdma_rank", per_node, None)
    else:
        check.array("num_tokens_per_rdma_rank", per_node, want.num_tokens_per_node)
    check.array("num_tokens_per_rank", per_rank, want.num_tokens_per_rank)
    check.array("num_tokens_per_expert", per_expert, want.num_tokens_per_expert)
    check.array("is_token_in_rank", in_rank, want.is_token_in_rank)
    return per_rank, per_node, in_rank, per_expert


def events_of(round_: int) -> dict[str, Any]:
    """Return stream arguments, others every round."""
    if round_ % 3 == 0:
        return {}
    if round_ % 3 == 1:
        return {"async_finish": True, "config": Buffer.get_dispatch_config(8)}
    return {
        "previous_event": Buffer.capture(),
        "async_finish": True,
        "allocate_on_comm_stream": True,
    }


def make_x(check: Checker, case: Case, inputs: Inputs, name: str = "x") -> Any:
    """Make the first argument of dispatch: rows, or a pair."""
    rows = check.make(name, inputs.x)
    if inputs.scales is None or case.scales is None:
        return rows
    return rows, check.make(f"scales of {name}", inputs.scales, case.scales.order)


def check_rows(
    check: Checker, got: Any, sent: Sequence[Inputs], origins: list[oracle.Origin], num_rows: int
) -> None:
    """Hold received rows, and scales, to what all ranks sent."""
    parts = {"recv_x": [inputs.x for inputs in sent]}
    if sent[0].scales is not None:
        check.holds(isinstance(got, tuple) and len(got) == 2, "recv_x", "is no pair")
        parts["recv scales"] = [inputs.scales for inputs in sent if inputs.scales is not None]
    else:
        got = (got,)
    for (name, by_rank), array in zip(parts.items(), got, strict=True):
        want = pad(oracle.pick(by_rank, origins), num_rows)
        check.array(name, array, want, parts=[np.s_[: len(origins)]])
        if check.frame.has_strides and min(want.shape) > 1:
            check.equal(f"strides of {name}", check.frame.strides(array), (want.shape[1], 1))


def pad(rows: Array, num_rows: int) -> Array:
    """Add poisoned rows at the end."""
    tail = poison(np.empty((num_rows - len(rows), *rows.shape[1:]), rows.dtype))
    return np.concatenate([rows, tail])


def check_dispatch(check: Checker, buffer: Buffer, case: Case, round_: int) -> Sent:
    """Lay out and dispatch a round of a case; check all that comes out."""
    everyone = all_inputs(case, round_, check.size)
    topk_by_rank = [inputs.topk_idx for inputs in everyone]
    mine, num_experts = everyone[check.rank], case.num_local * check.size
    idx = check.make("topk_idx", mine.topk_idx)
    layout = check_layout(check, buffer, idx, num_experts)
    origins = oracle.arrivals(topk_by_rank, num_experts, check.rank)
    num_rows, num_worst = len(origins), 0
    if case.num_spare is not None:
        # 0 would mean that no limit is given.
        num_rows = num_worst = max(1, len(origins) + case.num_spare)
    recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
        make_x(check, case, mine),
        None,
        *layout,
        idx,
        check.make("topk_weights", mine.topk_weights),
        case.alignment,
        num_worst,
        **events_of(round_),
    )
    event.current_stream_wait()
    check_rows(check, recv_x, everyone, origins, num_rows)
    picked = [
        oracle.pick([getattr(inputs, name) for inputs in everyone], origins)
        for name in ("topk_idx", "topk_weights")
    ]
    want_idx, want_weights = oracle.received_topk(*picked, num_experts, check.size, check.rank)
    tail = np.full((num_rows - len(origins), case.num_topk), -1, want_idx.dtype)
    check.array("recv_topk_idx", recv_idx, np.concatenate([want_idx, tail]))
    want = pad(want_weights, num_rows)
    check.array("recv_topk_weights", recv_weights, want, parts=[np.s_[: len(origins)]])
    want_counts = oracle.tokens_per_local_expert(
        topk_by_rank, num_experts, check.rank, case.alignment
    )
    check.equal("num_recv_tokens_per_expert_list", counts, [] if num_worst else want_counts)
    check.holds(handle is not None, "handle", "is None")
    check.unchanged()
    return Sent(handle, origins, want_weights, num_rows)


def check_repeated(check: Checker, buffer: Buffer, case: Case, round_: int, sent: Sent) -> None:
    """Dispatch other rows along the same routes."""
    number = round_ + case.num_rounds
    others = [
        with_rows(case, inputs, number, rank)
        for rank, inputs in enumerate(all_inputs(case, round_, check.size))
    ]
    x = make_x(check, case, others[check.rank], "x with a handle")
    recv_x, *rest, event = buffer.dispatch(x, handle=sent.handle, **events_of(round_ + 1))
    event.current_stream_wait()
    check.equal("what a dispatch with a handle returns", rest, [None] * 4)
    check_rows(check, recv_x, others, sent.origins, sent.num_rows)
    check.unchanged()


def with_rows(case: Case, inputs: Inputs, number: int, rank: int) -> Inputs:
    """Return the same inputs with other rows and scales."""
    rng = rng_of(case.id, "again", number, rank)
    scales = inputs.scales
    if scales is not None:
        scales = random_bits(rng, scales.shape, scales.dtype)
        if case.scales is not None and case.scales.order == "expanded":
            scales[:] = scales[:, :1]
    x = random_bits(rng, inputs.x.shape, inputs.x.dtype)
    return Inputs(x, scales, inputs.topk_idx, inputs.topk_weights, inputs.base, inputs.biases)


def check_combine(
    check: Checker,
    buffer: Buffer,
    case: Case,
    round_: int,
    sent: Sent,
    *,
    has_weights: bool = True,
) -> None:
    """Combine what experts made of a dispatch's rows; check sums and weights."""
    everyone = all_inputs(case, round_, check.size)
    mine, num_experts = everyone[check.rank], case.num_local * check.size
    rows = experts_result(
        case, round_, check.rank, oracle.pick([i.base for i in everyone], sent.origins)
    )
    biases = [check.make(f"bias {i}", bias) for i, bias in enumerate(mine.biases)]
    weights = None
    if has_weights:
        weights = check.make("topk_weights", pad(sent.recv_topk_weights, sent.num_rows))
    combined_x, combined_weights, event = buffer.combine(
        check.make("rows", pad(rows, sent.num_rows)),
        sent.handle,
        weights,
        # One bias may come alone or as a tuple of one.
        bias=None if not biases else biases[0] if round_ == 1 else tuple(biases),
        **events_of(round_ + 2),
    )
    event.current_stream_wait()
    by_rank = [experts_result(case, round_, rank, mine.base) for rank in range(check.size)]
    want = check.combined(by_rank, mine.topk_idx, num_experts, mine.biases)
    check.array("combined_x", combined_x, want, any_nan=True)
    if has_weights:
        # Each choice has its weight on one rank and 0.0 on the others.
        want_weights = np.where(mine.topk_idx >= 0, mine.topk_weights, np.float32(0.0))
        check.array("combined_topk_weights", combined_weights, want_weights)
    else:
        check.equal("combined_topk_weights", combined_weights, None)
    check.unchanged()


def run(group: Any, frame: NumpyFrame, engine: str) -> str:
    """Run all cases; return the digest of all outputs."""
    check = Checker(group, frame, engine)
    with check.buffer() as buffer:
        for case in CASES:
            case = for_frame(case, frame)
            for round_ in range(case.num_rounds):
                check.case = f"case {case.id}, round {round_}"
                sent = check_dispatch(check, buffer, case, round_)
                check.poison_slabs(buffer)
                check_combine(check, buffer, case, round_, sent, has_weights=round_ != 1)
                if round_ == 1:
                    check_repeated(check, buffer, case, round_, sent)
                    check_combine(check, buffer, case, round_, sent)
    return check.digest()


def for_frame(case: Case, frame: NumpyFrame) -> Case:
    """Return the case with dtypes that the framework has."""
    return replace(case, dtype=frame.dtype(case.dtype), idx_dtype=frame.dtype(case.idx_dtype))


if __name__ == "__main__":
    main(run)
