"""What the cuda engine decides on the host, without a GPU: before launches, and while it waits."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from epcomm import gpus
from epcomm.arrays import empty_aligned, view_numpy
from epcomm.cuda_layout import MAX_LOCAL_EXPERTS
from epcomm.engines import cuda_failures, cuda_params
from epcomm.engines.base import CombineRequest, DispatchInto, DispatchRequest, LayoutViews, TopK
from epcomm.engines.cuda_limits import Limits
from epcomm.errors import CommTimeout, InvalidArgument, RankMismatch, TransportError
from epcomm.handle import DispatchHandle

cuda = pytest.importorskip("epcomm.engines.cuda", reason="CuPy is not installed")

TIMEOUT, PEER_GAVE_UP, MISMATCH, BAD_EXPERT = 1, 2, 3, 5
EXPERT_TWICE, LOW_LATENCY_MISMATCH, BAD_CHOICES = 6, 7, 8
LIST_TOKENS = 100


@pytest.fixture
def engine() -> Any:
    """An engine of which nothing was made but what its host code looks at."""
    made = cuda.CudaEngine.__new__(cuda.CudaEngine)
    made._group = SimpleNamespace(rank=0, size=2, check=lambda: None)
    made._device, made._timeout_s = 0, 5.0
    made._limits = make_limits()
    made._record = np.zeros((), cuda_params.FAILURE_RECORD)
    made._room = SimpleNamespace()
    made._streams = SimpleNamespace(is_capturing=False)
    made._names = (0, 1)
    made._is_closed = True
    made._wait_call = lambda: None
    return made


def make_limits(num_sharing: int = 1) -> Limits:
    """Return the limits of a GPU of 132 multiprocessors, of which calls use 20."""
    return Limits(0, 132, num_sharing, num_ranks=2, num_sms=lambda: 20)


def wait_counts(engine: Any, summary: Any = None) -> tuple[int, int]:
    """Begin with a dispatch; return the rows that arrive, and the most tokens of any rank."""
    if summary is None:
        summary = np.zeros((), cuda_params.HOST_SUMMARY)
    counts = cuda.Counts(
        *(summary, engine._names[0], engine._timeout_s),
        check=engine._check_call,
        can_move_ahead=True,
    )
    assert counts.begin() == (summary.ctypes.data, 1)
    request = make_request()._replace(
        allocate=lambda shape, dtype: view_numpy(np.zeros(shape, dtype))
    )
    outputs, num_recv, max_tokens = counts.move(request, lambda *args: None, lambda tokens: False)
    assert outputs.data.shape[0] == num_recv
    return num_recv, max_tokens


@pytest.mark.parametrize("failure", [BAD_EXPERT, EXPERT_TWICE])
def test_a_bad_choice_does_not_end_a_dispatch_between_its_kernels(
    engine: Any, failure: int
) -> None:
    """Peers have begun the same dispatch: it is told once this rank has made its part."""
    engine._record["failure"] = failure
    summary = np.zeros((), cuda_params.HOST_SUMMARY)

    def tell() -> None:
        time.sleep(0.05)
        summary["num_recv"], summary["max_tokens"] = 7, 9
        summary["ticket"] = 1

    kernel = threading.Thread(target=tell)
    kernel.start()
    assert wait_counts(engine, summary) == (7, 9)
    kernel.join()
    with pytest.raises(InvalidArgument, match="topk_idx"):
        engine._raise_failures()


def test_what_all_ranks_share_ends_a_dispatch(engine: Any) -> None:
    engine._record["failure"] = MISMATCH
    with pytest.raises(RankMismatch):
        wait_counts(engine)


def test_bad_choices_of_a_rank_end_its_dispatch_on_all(engine: Any) -> None:
    engine._names = (4, 6)
    engine._record["failure"], engine._record["peer"] = BAD_CHOICES, 1
    with pytest.raises(InvalidArgument, match="topk_idx of rank 6"):
        wait_counts(engine)
    engine._raise_failures()  # nothing is left half done


def test_failures_that_end_a_call() -> None:
    ends = [failure for failure in range(8) if cuda_failures.ends_call(failure)]
    assert ends == [1, 2, 3, 4, 7]


@pytest.mark.parametrize(("num_sharing", "num_sms"), [(1, 133), (2, 67)])
def test_combine_refuses_sms_before_it_touches_a_peer(
    engine: Any, num_sharing: int, num_sms: int
) -> None:
    engine._limits = make_limits(num_sharing)
    engine._room.make = lambda *args: pytest.fail("slabs were to grow")
    handle = DispatchHandle(
        buffer_id=1, serial=1, num_tokens=4, num_recv_rows=4, num_recv_tokens=4, routing=None
    )
    request = CombineRequest(
        data=view_numpy(np.zeros((4, 64), np.float32)),
        topk_weights=None,
        biases=(),
        handle=handle,
        num_sms=num_sms,
        allocate=lambda *args: pytest.fail("an output was allocated"),
    )
    with pytest.raises(InvalidArgument, match=f"num_sms is {num_sms}.*Pass at most {num_sms - 1}"):
        engine.combine(request)


def test_threads_that_share_a_gpu_share_its_multiprocessors() -> None:
    limits = make_limits(num_sharing=8)
    assert limits.check_dispatch(make_request()) == 16
    assert limits.check_dispatch(make_request()._replace(num_sms=12)) == 12
    assert limits.num_low_latency_blocks() == 16


# --- in a node of a larger group ---------------------------------------------------------------


def test_a_peer_thread_that_raised_ends_the_wait_for_counts(engine: Any) -> None:
    def check() -> None:
        raise TransportError("rank 1 has failed")

    engine._group.check = check
    with pytest.raises(TransportError, match="rank 1 has failed"):
        wait_counts(engine)


def test_ranks_are_named_as_in_the_whole_group(engine: Any) -> None:
    engine._names, engine._timeout_s = (4, 6), -5.0  # in the past
    with pytest.raises(CommTimeout) as caught:
        wait_counts(engine)
    assert (caught.value.rank, caught.value.peers) == (4, ())
    engine._record["failure"], engine._record["peer"] = TIMEOUT, 1
    with pytest.raises(CommTimeout) as caught:
        engine.check_failed("rows")
    assert (caught.value.rank, caught.value.peers) == (4, (6,))


def test_a_wait_that_a_peer_ended_is_told_as_no_wait_of_this_rank(engine: Any) -> None:
    engine._names = (4, 6)
    record = engine._record
    record["failure"], record["phase"], record["peer"] = PEER_GAVE_UP, 4, 1
    with pytest.raises(CommTimeout) as caught:
        engine._raise_failures()
    error = caught.value
    assert (error.phase, error.rank, error.peers, error.gave_up) == ("combine: rows", 4, (6,), 6)
    assert "combine: rows: rank 6 gave up waiting, so rank 4 ends too. " in str(error)
    assert "waited" not in str(error)
    # It set its own abort cell as well, when it gave up between nodes.
    record["peer"] = 0
    with pytest.raises(TransportError, match="an earlier call on this Buffer failed: rank 4 gave"):
        engine._raise_failures()


@pytest.mark.parametrize(
    ("field", "values", "said"),
    [
        (0, (1, 3), r"call \(rank 0: dispatch, rank 1: combine\).*same calls in the same order"),
        (2, (64, 32), r"hidden \(rank 0: 64, rank 1: 32\).*same call with the same hidden"),
    ],
)
@pytest.mark.parametrize("failure", [MISMATCH, LOW_LATENCY_MISMATCH])
def test_ranks_that_disagree_are_told_the_rule(
    engine: Any, failure: int, field: int, values: tuple[int, int], said: str
) -> None:
    if failure == LOW_LATENCY_MISMATCH:
        values = (1, 2) if field == 0 else values
        said = said.replace("rank 0: dis", "rank 0: low_latency_dis")
        said = said.replace("rank 1: com", "rank 1: low_latency_com")
    record = engine._record
    record["failure"], record["field"], record["values"][:2] = failure, field, values
    with pytest.raises(RankMismatch, match=f"disagree on {said}"):
        engine._raise_failures()


def make_request(num_ranks: int = 0, num_experts: int = 8, **options: Any) -> DispatchRequest:
    """Return a request of 4 tokens; with a layout over so many ranks, or none."""
    idx = np.zeros((4, 3), np.int64)
    layout = None
    if num_ranks:
        shapes = ((num_ranks,), (num_experts,), (4, num_ranks))
        per_rank, per_expert, in_rank = (view_numpy(np.zeros(shape, np.int32)) for shape in shapes)
        layout = LayoutViews(per_rank, None, per_expert, in_rank)
    return DispatchRequest(
        data=view_numpy(empty_aligned((4, 64), np.dtype(np.float32))),
        scales=None,
        layout=layout,
        topk=TopK(view_numpy(idx), view_numpy(idx.astype(np.float32))),
        handle=None,
        expert_alignment=1,
        num_worst_tokens=0,
        num_sms=None,
        allocate=lambda *args: pytest.fail("an output was allocated"),
        num_experts=0 if num_ranks else num_experts,
        **options,
    )


@pytest.fixture
def part_engine(engine: Any) -> Any:
    """Of a node of two among four ranks; lists have room for LIST_TOKENS."""

    def check_tokens(num_tokens: int, staged_row_bytes: int) -> None:
        if num_tokens > LIST_TOKENS:
            raise InvalidArgument(f"x has {num_tokens} tokens")

    engine._has_bulk = True
    engine._room.check_tokens = check_tokens
    return engine


def test_a_part_is_refused_before_anything_is_sent(part_engine: Any) -> None:
    """Other nodes could not be told any more: experts a rank, and tokens of any rank."""
    fits = make_request(4, 4 * MAX_LOCAL_EXPERTS)
    part_engine.check_part(fits, LIST_TOKENS)
    with pytest.raises(InvalidArgument, match=f"x has {LIST_TOKENS + 1} tokens"):
        part_engine.check_part(fits, LIST_TOKENS + 1)
    with pytest.raises(InvalidArgument, match="num_experts is"):
        part_engine.check_part(make_request(4, 4 * MAX_LOCAL_EXPERTS + 4), 4)


@pytest.mark.parametrize(
    ("capability", "expected"),
    # The last has too little shared memory for them.
    [("80", False), ("89", False), ("90", True), ("100", True), ("120", False)],
)
def test_which_gpus_take_bulk_copies(
    monkeypatch: pytest.MonkeyPatch, capability: str, expected: bool
) -> None:
    monkeypatch.setattr("cupy.cuda.Device", lambda: SimpleNamespace(compute_capability=capability))
    assert gpus.has_bulk_copies() == expected


class Launched(Exception):
    """Carries a kernel's argument."""


# An empty array has no address.
@pytest.mark.parametrize(("makes_layout", "idx_ptr"), [(False, 64), (True, 64), (True, 0)])
@pytest.mark.parametrize("num_into", [None, 0, 7])
def test_what_route_is_told(
    part_engine: Any,
    monkeypatch: pytest.MonkeyPatch,
    makes_layout: bool,
    idx_ptr: int,
    num_into: int | None,
) -> None:
    """Who makes the layout, and where is room for all rows that are fetched."""
    made: list[tuple[int, int]] = []

    def alloc(num_bytes: int) -> Any:
        made.append((1 << 20, num_bytes))
        return SimpleNamespace(ptr=1 << 20)

    def launch(*args: Any, params: Any, **options: Any) -> None:
        raise Launched(np.frombuffer(params, cuda_params.ROUTE)[0])

    monkeypatch.setattr(cuda.cupy.cuda, "alloc", alloc)
    part_engine._launch = launch
    part_engine._room.areas = SimpleNamespace(list_tokens=LIST_TOKENS)
    part_engine._room.call = bytes(cuda_params.CALL_BYTES)
    part_engine._counts = SimpleNamespace(begin=lambda: (64, 5))
    into = None
    if num_into is not None:
        rows = view_numpy(np.zeros((num_into, 64), np.float32))
        into = DispatchInto(rows, None, None, ())
    request = make_request(0 if makes_layout else 2, into=into)
    assert request.topk is not None
    topk = request.topk._replace(idx=request.topk.idx._replace(ptr=idx_ptr))
    with pytest.raises(Launched) as caught:
        part_engine.dispatch(request._replace(topk=topk))
    told = caught.value.args[0]
    assert (told["num_tokens"], told["num_experts"]) == (4, 8)
    assert (told["host"], told["ticket"]) == (64, 5)
    assert told["makes_layout"] == makes_layout == (told["is_token_in_rank"] == 0)
    choices = (told["topk_idx"], told["num_topk"], told["is_64_bit"])
    assert choices == ((idx_ptr, 3, 1) if makes_layout else (0, 0, 0))
    ((ptr, num_bytes),) = made
    num_rows = (ptr + num_bytes - told["work"]) // 8
    assert num_rows == (LIST_TOKENS if num_into is None else max(1, num_into))


def test_a_graph_is_told_that_the_host_cannot_wait_in_it(engine: Any) -> None:
    engine._streams.is_capturing, engine._has_bulk = True, True
    with pytest.raises(InvalidArgument, match="num_worst_tokens"):
        engine.dispatch(make_request())
