"""Contract of low-latency dispatch and combine: a table of cases, every way to call, one Buffer.

Rows, scales, counts, handles and sums are held to the oracle bit by bit, on poisoned memory, with
other data every round.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
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

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
I32, I64 = np.dtype(np.int32), np.dtype(np.int64)

#: Arguments that choose what is sent.
FP8: dict[str, dict[str, bool]] = {
    "none": {"use_fp8": False},
    "plain": {},
    "round": {"round_scale": True},
    "ue8m0": {"round_scale": True, "use_ue8m0": True},
}


@dataclass(frozen=True)
class Case:
    """One shape of call.

    Attributes:
        id: Its name, in messages.
        num_tokens: Tokens by rank, repeated over the ranks; the next rank's in the next round.
        num_max: ``num_max_dispatch_tokens_per_rank``.
        hidden: Elements of a row.
        num_topk: Choices of a token.
        num_local: Experts of a rank.
        routing: One of the routings of `common.choose_experts`.
        fp8: Key of `FP8`.
        precision: ``combine_precision``.
        idx_dtype: Dtype of the choices.
        is_special: Whether combine sums signed zeros, infinities and NaNs.
    """

    id: str
    num_tokens: tuple[int, ...]
    num_max: int
    hidden: int
    num_topk: int
    num_local: int
    routing: str
    fp8: str = "plain"
    precision: str = "rank"
    idx_dtype: np.dtype[Any] = I64
    is_special: bool = False


UNEVEN = (5, 0, 17, 1, 64, 3, 2, 9)

CASES = (
    Case("plain", (24,), 24, 512, 8, 8, "uniform"),
    Case("bf16", (64,), 64, 128, 8, 8, "uniform", "none"),
    Case("bf16-odd-rows", UNEVEN, 64, 72, 4, 3, "zipf", "none", "expert"),
    Case("one-token-at-most", (1, 0), 1, 128, 1, 1, "uniform"),
    Case("no-tokens", (0,), 8, 128, 2, 2, "uniform", "round"),
    Case("no-choice-at-all", (7,), 7, 128, 4, 2, "none", "none"),
    Case("some-choices", UNEVEN, 64, 1024, 6, 4, "some", "round", "expert", I32),
    Case("packed-scales", UNEVEN, 64, 512, 4, 4, "zipf", "ue8m0"),
    Case("packed-scales-wide", (7, 8, 3), 8, 7168, 8, 2, "some", "ue8m0", "expert"),
    Case("wide", (8, 3), 8, 7168, 8, 2, "uniform", "plain", "expert"),
    Case("not-a-power-of-two", (10, 17), 19, 2560, 6, 5, "uniform", "round"),
    Case("one-expert-takes-all", (64, 13), 64, 128, 2, 4, "one_expert", "none", "rank", I32),
    Case("all-to-the-last-rank", (32,), 32, 256, 6, 8, "one_rank", "plain", "rank"),
    Case("most-tokens", (128, 65, 128, 1), 128, 128, 8, 4, "zipf", "none"),
    Case("most-choices", (9, 20), 20, 128, 32, 32, "some", "plain", "expert"),
    Case("most-choices-by-rank", (20, 9), 20, 64, 32, 16, "uniform", "none", "rank"),
    Case("one-expert-a-rank", (21,), 21, 128, 3, 1, "some", "round"),
    Case("special-values", (24,), 24, 64, 4, 2, "some", "none", "rank", I64, True),
    Case("special-values-by-expert", (24,), 24, 64, 4, 2, "some", "none", "expert", I32, True),
)


# --- data --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """All that one rank passes in one round; and ``base``, of which experts' rows are made."""

    x: Array
    topk_idx: Array
    topk_weights: Array
    base: Array


def any_idx(case: Case) -> Case:
    """Return the case to ask by for what does not depend on the dtype of the choices."""
    return replace(case, idx_dtype=I64)


@once
def inputs_of(case: Case, round_: int, rank: int, num_ranks: int) -> Inputs:
    rng = rng_of(case.id, round_, rank, num_ranks)
    num_tokens = expand(case.num_tokens, rank + round_)
    shape, topk_shape = (num_tokens, case.hidden), (num_tokens, case.num_topk)
    if case.fp8 == "none":
        x = random_bits(rng, shape, BF16)
    else:
        # Blocks from far below the smallest scale to far above 448, some all zeros.
        blocks = rng.standard_normal((num_tokens, case.hidden // 128, 128), np.float32)
        exponent = rng.integers(-30, 20, (*blocks.shape[:2], 1)).astype(np.float32)
        blocks *= np.float32(2) ** exponent * (rng.random(exponent.shape) < 0.95)
        x = oracle.round_to(np.ascontiguousarray(blocks, np.float32).reshape(shape), BF16)
    num_experts = case.num_local * num_ranks
    idx = choose_experts(case.routing, rng, *topk_shape, num_experts, num_ranks)
    weights = rng.standard_normal(topk_shape, np.float32)
    weights[::2] = 0.5  # equal ones, so that rows cancel
    base = rng.standard_normal(shape, np.float32)
    if case.is_special:
        base = rng.choice(SPECIAL, shape)
    return Inputs(
        x=frozen(x),
        topk_idx=frozen(idx.astype(case.idx_dtype)),
        topk_weights=frozen(weights),
        base=frozen(base),
    )


def all_inputs(case: Case, round_: int, num_ranks: int) -> list[Inputs]:
    """Return the inputs of all ranks."""
    return [inputs_of(case, round_, rank, num_ranks) for rank in range(num_ranks)]


@once
def factor_of(case: Case, expert: int) -> Array:
    """Return what an expert multiplies a row with: large and small numbers, some cancelling."""
    if case.is_special:
        return frozen(np.ones(case.hidden, np.float32))
    rng = rng_of(case.id, "factor of expert", expert)
    exponent = rng.integers(-12, 12, case.hidden).astype(np.float32)
    factor = rng.standard_normal(case.hidden, np.float32) * np.float32(2) ** exponent
    if expert % 2:
        opposite = -factor_of(case, expert - 1)
        factor = np.where(rng.random(case.hidden) < 0.5, opposite, factor)
    return frozen(factor)


def experts_result(case: Case, expert: int, base: Array) -> Array:
    """Return what an expert makes of rows; sums of these depend on the order of the additions."""
    return oracle.round_to(base * factor_of(any_idx(case), expert), BF16)


@once
def wanted_sums(
    case: Case, round_: int, rank: int, num_ranks: int, skipped: frozenset[int]
) -> Array:
    """Return what low_latency_combine must give a rank; the same for all frameworks."""
    mine = inputs_of(case, round_, rank, num_ranks)
    return frozen(
        oracle.low_latency_combine(
            results_of_choices(case, mine, case.num_local * num_ranks),
            mine.topk_idx,
            mine.topk_weights,
            case.num_local,
            case.precision == "rank",
            skipped,
        )
    )


def results_of_choices(case: Case, inputs: Inputs, num_experts: int) -> Array:
    """Return ``[num_tokens, num_topk, hidden]`` what the chosen experts make of a rank's tokens."""
    factors = np.stack([factor_of(case, expert) for expert in range(num_experts)])
    return oracle.round_to(inputs.base[:, None] * factors[inputs.topk_idx], BF16)


@once
def cast_of(case: Case, round_: int, rank: int, num_ranks: int) -> tuple[Array, Array | None]:
    """Return what a rank sends for its tokens: rows, and scales or None."""
    x = inputs_of(case, round_, rank, num_ranks).x
    if case.fp8 == "none":
        return x, None
    rows, scales = oracle.cast_to_fp8(x, is_rounded=case.fp8 != "plain")
    return rows, oracle.pack_ue8m0(scales) if case.fp8 == "ue8m0" else scales


# --- the calls ---------------------------------------------------------------------------------


@dataclass
class Stats:
    """Statistics that calls add to."""

    recv: Any
    dispatch_wait: Any
    combine_wait: Any
    wanted_recv: Array
    waited: dict[str, Array] = field(default_factory=dict)

    @classmethod
    def make(cls, check: Checker, case: Case) -> Stats:
        recv = np.arange(7, 7 + case.num_local, dtype=I32)
        waits = [check.frame.make_writable(np.arange(check.size, dtype=I64)) for _ in range(2)]
        return cls(check.frame.make_writable(recv), *waits, recv)

    def check_waits(self, check: Checker) -> None:
        """Check that waiting times only grow."""
        for name in ("dispatch_wait", "combine_wait"):
            now = np.array(check.frame.numpy(getattr(self, name)))
            before = self.waited.get(name, np.arange(check.size))
            check.holds((now >= before).all(), f"{name} statistics", f"{now}, before {before}")
            self.waited[name] = now


@dataclass
class Sent:
    """A low-latency dispatch; `receive` waits for it where a hook was asked for."""

    case: Case
    round_: int
    idx: Any
    recv_x: Any
    recv_count: Any
    handle: Any
    hook: Callable[[], None] | None
    rows: oracle.ExpertRows


def send(
    check: Checker,
    buffer: Buffer,
    case: Case,
    round_: int,
    stats: Stats | None = None,
    skipped: Collection[int] = (),
    **options: Any,
) -> Sent:
    """Call low_latency_dispatch; without a hook all is there then."""
    everyone = all_inputs(case, round_, check.size)
    mine, num_experts = everyone[check.rank], case.num_local * check.size
    x = check.make("x", mine.x)
    idx = check.make("topk_idx", mine.topk_idx)
    recv_x, recv_count, handle, event, hook = buffer.low_latency_dispatch(
        x,
        idx,
        case.num_max,
        num_experts,
        stats.recv if stats else None,
        stats.dispatch_wait if stats else None,
        **FP8[case.fp8],
        **options,
    )
    event.current_stream_wait()
    check.equal("hook is callable", callable(hook), options.get("return_recv_hook", False))
    rows = oracle.expert_rows([i.topk_idx for i in everyone], num_experts, check.rank, skipped)
    if stats is not None:
        stats.wanted_recv = stats.wanted_recv + np.array([*map(len, rows.origins)], I32)
    return Sent(case, round_, idx, recv_x, recv_count, handle, hook, rows)


def receive(check: Checker, sent: Sent, stats: Stats | None = None) -> None:
    """Call the hook, where there is one, and check all that low_latency_dispatch gives."""
    if sent.hook is not None:
        sent.hook()
    case = sent.case
    num_rows, num_experts = check.size * case.num_max, case.num_local * check.size
    counts = [len(origins) for origins in sent.rows.origins]
    valid = [np.s_[local, :count] for local, count in enumerate(counts)]
    check.array("recv_count", sent.recv_count, np.array(counts, I32))

    casts = [cast_of(any_idx(case), sent.round_, rank, check.size) for rank in range(check.size)]
    got = sent.recv_x if isinstance(sent.recv_x, tuple) else (sent.recv_x,)
    check.equal("arrays in recv_x", len(got), 1 if case.fp8 == "none" else 2)
    sent_parts = [[part for part in parts if part is not None] for parts in casts]
    names = ("recv_x", "scales")[: len(got)]
    for name, array, by_rank in zip(names, got, zip(*sent_parts, strict=True), strict=True):
        want = poison(np.empty((case.num_local, num_rows, by_rank[0].shape[1]), by_rank[0].dtype))
        for local, origins in enumerate(sent.rows.origins):
            want[local, : counts[local]] = oracle.pick(by_rank, origins)
        want = want.view(check.frame.dtype(want.dtype))
        check.array(name, array, want, parts=valid)
        if check.frame.has_strides and min(want.shape) > 1:
            rows, columns = want.shape[1:]
            packed = (columns, 1) if name == "recv_x" else (1, rows)
            check.equal(f"strides of {name}", check.frame.strides(array), (rows * columns, *packed))

    src_info, layout_range, *numbers = sent.handle
    want = np.full((case.num_local, num_rows), -1, I32)
    for local, origins in enumerate(sent.rows.origins):
        want[local, : counts[local]] = [token for _, token in origins]
    check.array("src_info", src_info, want)
    check.array("layout_range", layout_range, sent.rows.layout_range)
    check.equal("numbers in the handle", numbers, [case.num_max, case.hidden, num_experts])
    if stats is not None:
        got_stats = check.frame.numpy(stats.recv)
        check.same("cumulative_local_expert_recv_stats", got_stats, stats.wanted_recv)
        stats.check_waits(check)
    check.unchanged()


@dataclass
class Combined:
    """A low-latency combine, and what it must give."""

    x: Any
    hook: Callable[[], None] | None
    want: Array
    frame: NumpyFrame | None = None


def fill_rows(check: Checker, sent: Sent, rows: Array) -> Array:
    """Fill ``[num_local, num_rows, hidden] bf16`` with the experts' results and else NaNs."""
    case = sent.case
    base = [inputs.base for inputs in all_inputs(case, sent.round_, check.size)]
    poison(rows)
    for local, origins in enumerate(sent.rows.origins):
        expert = check.rank * case.num_local + local
        result = experts_result(case, expert, oracle.pick(base, origins))
        rows[local, : len(origins)] = result
    return rows


def send_back(
    check: Checker,
    buffer: Buffer,
    sent: Sent,
    stats: Stats | None = None,
    skipped: Collection[int] = (),
    *,
    has_out: bool = False,
    **options: Any,
) -> Combined:
    """Call low_latency_combine."""
    case, frame = sent.case, check.frame.writable
    mine = inputs_of(case, sent.round_, check.rank, check.size)
    if options.get("zero_copy"):
        rows = buffer.get_next_low_latency_combine_buffer(sent.handle)
        check.holds(frame.owns(rows, BF16), "combine buffer", f"is a {type(rows)}")
        frame.fill(rows, fill_rows(check, sent, np.empty(rows.shape, BF16)))
    else:
        shape = (case.num_local, check.size * case.num_max, case.hidden)
        rows = check.make("rows", fill_rows(check, sent, np.empty(shape, BF16)))
    out = None
    if has_out:
        out = frame.make_writable(poison(np.empty(mine.x.shape, BF16)))
    combined, event, hook = buffer.low_latency_combine(
        rows,
        sent.idx,
        check.make("topk_weights", mine.topk_weights),
        sent.handle,
        out=out,
        combine_wait_recv_cost_stats=stats.combine_wait if stats else None,
        combine_precision=case.precision,
        **options,
    )
    event.current_stream_wait()
    check.holds(out is None or combined is out, "combined_x", "is not the array passed as out=")
    check.equal("hook is callable", callable(hook), options.get("return_recv_hook", False))
    want = wanted_sums(any_idx(case), sent.round_, check.rank, check.size, frozenset(skipped))
    is_written = has_out or options.get("zero_copy")
    return Combined(combined, hook, want, frame if is_written else None)


def finish(check: Checker, combined: Combined, stats: Stats | None = None) -> None:
    """Call the hook, where there is one, and check the sums."""
    if combined.hook is not None:
        combined.hook()
    check.array("combined_x", combined.x, combined.want, any_nan=True, frame=combined.frame)
    if stats is not None:
        stats.check_waits(check)
    check.unchanged()


# --- ways to call ------------------------------------------------------------------------------


def call_plainly(check: Checker, buffer: Buffer, case: Case) -> None:
    sent = send(check, buffer, case, 0)
    receive(check, sent)
    check.poison_slabs(buffer, is_low_latency=True)
    finish(check, send_back(check, buffer, sent))


def call_with_extras(check: Checker, buffer: Buffer, case: Case) -> None:
    stats = Stats.make(check, case)
    for round_ in (1, 2):
        sent = send(check, buffer, case, round_, stats, async_finish=round_ == 1)
        receive(check, sent, stats)
        extras = {"use_logfmt": round_ == 2, "has_out": round_ == 1}
        back = send_back(check, buffer, sent, stats, async_finish=round_ == 2, **extras)
        finish(check, back, stats)


def call_without_copy(check: Checker, buffer: Buffer, case: Case) -> None:
    for round_ in (3, 4):
        sent = send(check, buffer, case, round_)
        receive(check, sent)
        finish(check, send_back(check, buffer, sent, zero_copy=True, has_out=round_ == 4))


def call_with_hooks(check: Checker, buffer: Buffer, case: Case) -> None:
    """Two micro-batches, of which each is sent while the other is computed."""
    first, second = (send(check, buffer, case, round_, return_recv_hook=True) for round_ in (5, 6))
    receive(check, first)
    back = send_back(check, buffer, first, return_recv_hook=True)
    receive(check, second)
    finish(check, back)
    backs = [
        send_back(check, buffer, second, return_recv_hook=True, has_out=True),
        send_back(check, buffer, first, return_recv_hook=True),
    ]
    for back in backs:
        finish(check, back)


WAYS = (call_plainly, call_with_extras, call_without_copy, call_with_hooks)


def run(group: Any, frame: NumpyFrame, engine: str) -> str:
    """Run all cases in all ways; return the digest of all outputs."""
    check = Checker(group, frame, engine)
    with check.buffer() as buffer:
        for case in CASES:
            case = replace(case, idx_dtype=frame.dtype(case.idx_dtype))
            for way in WAYS:
                check.case = f"case {case.id}, {way.__name__}"
                way(check, buffer, case)
    return check.digest()


if __name__ == "__main__":
    main(run)
