"""From what a kernel wrote when a call failed to the error that the caller gets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from epcomm.arrays import DTYPES
from epcomm.cuda_layout import AGREED, LOW_LATENCY_AGREED
from epcomm.errors import CommTimeout, EpcommError, InvalidArgument, RankMismatch, failed_before

#: Calls by the number that their header carries.
CALLS = ("", "dispatch", "dispatch with a handle", "combine")
CALL_INDEX = {name: index for index, name in enumerate(CALLS)}
LOW_LATENCY_CALLS = ("", "low_latency_dispatch", "low_latency_combine")
LOW_LATENCY_CALL_INDEX = {name: index for index, name in enumerate(LOW_LATENCY_CALLS)}

# As the enums of comm/call.cuh.
_TIMEOUT, _PEER_GAVE_UP, _MISMATCH, _TOO_MANY_ROWS, _BAD_EXPERT = range(1, 6)
_EXPERT_TWICE, _LOW_LATENCY_MISMATCH, _BAD_CHOICES = 6, 7, 8
_PHASES = {
    1: "arrival",
    2: "dispatch: counts",
    3: "dispatch: staged rows",
    4: "combine: rows",
    5: "low latency: receiving of an earlier call (its hook, or the rank's next call)",
    6: "low latency: choices",
    7: "low latency: rows",
    8: "low latency: rows",  # of few tokens
}


def ends_call(failure: int) -> bool:
    """Return whether a failure ends the call: bad choices are left out, and told later."""
    return failure not in (0, _BAD_EXPERT, _EXPERT_TWICE)


def error_in(
    record: npt.NDArray[np.void], rank: int, names: Sequence[int], timeout_s: float
) -> EpcommError | None:
    """Return the error that a record tells of, or None.

    Errors that all ranks share and that left nothing half done are taken out of the record, so
    that the Buffer works on; a wait that failed stays in it.

    Args:
        record: FAILURE_RECORD, in memory that kernels write.
        rank: This rank.
        names: What the error calls each rank.
        timeout_s: The deadline of waits.
    """
    failure = int(record["failure"])
    if failure == 0:
        return None
    peer = names[int(record["peer"])]
    if failure in (_TIMEOUT, _PEER_GAVE_UP):
        phase = _PHASES.get(int(record["phase"]), "a kernel")
        me = names[rank]
        if failure == _TIMEOUT:
            detail = f"expected epoch {int(record['expected'])}, saw {int(record['seen'])}"
            return CommTimeout(phase, me, [peer], timeout_s, detail)
        if peer == me:  # it gave up on the host
            return failed_before(phase, f"rank {me} gave up waiting")
        return CommTimeout(phase, me, [peer], timeout_s, gave_up=peer)
    record["failure"] = 0
    if failure == _MISMATCH:
        return _mismatch(record, names, AGREED, CALLS)
    if failure == _LOW_LATENCY_MISMATCH:
        return _mismatch(record, names, LOW_LATENCY_AGREED, LOW_LATENCY_CALLS)
    if failure == _EXPERT_TWICE:
        return InvalidArgument(
            "topk_idx chooses an expert twice for one token; low-latency calls have room for one "
            "row a (token, expert), so a token's choices must differ. The later one was left out."
        )
    if failure == _TOO_MANY_ROWS:
        return InvalidArgument(
            f"num_worst_tokens is {int(record['expected'])} on rank {peer}, but "
            f"{int(record['seen'])} rows arrive there; it must be at least that. The sum of all "
            "ranks' tokens is always enough. Nothing was written past the end."
        )
    if failure == _BAD_CHOICES:
        return InvalidArgument(
            f"topk_idx of rank {peer} holds values that are neither expert ids nor -1. Check that "
            "num_experts counts the experts of all ranks. The call was given up on all ranks."
        )
    return InvalidArgument(
        "topk_idx holds values that are neither expert ids nor -1; they were left out. Check that "
        "num_experts counts the experts of all ranks."
    )


def _mismatch(
    record: npt.NDArray[np.void], names: Sequence[int], agreed: Sequence[str], calls: Sequence[str]
) -> RankMismatch:
    name = agreed[int(record["field"])]
    values: list[int] = record["values"].tolist()

    def shown(value: int) -> str:
        if name == "call":
            return calls[value] if 0 <= value < len(calls) else str(value)
        if name.endswith("dtype") and 0 <= value < len(DTYPES):
            return DTYPES[value].name
        return str(value)

    listed = ", ".join(
        f"rank {rank}: {shown(value)}" for rank, value in zip(names, values, strict=False)
    )
    rule = "same calls in the same order" if name == "call" else f"same call with the same {name}"
    return RankMismatch(
        f"ranks disagree on {name} ({listed}). Every rank must make the {rule}. The call was given "
        "up on all ranks."
    )
