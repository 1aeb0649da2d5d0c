"""Dispatch before its counts are known: what is launched, and with which outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from epcomm.arrays import ArrayView, empty_aligned, view_numpy
from epcomm.engines import cuda_params
from epcomm.engines.base import DispatchInto, DispatchRequest, TopK
from epcomm.errors import CommTimeout

counts = pytest.importorskip("epcomm.engines.cuda_counts", reason="CuPy is not installed")

HIDDEN, NUM_TOPK = 64, 3
FLOAT32 = np.dtype(np.float32)


def make_request(**options: Any) -> DispatchRequest:
    """Return a request of 4 tokens that makes its layout of its choices, of 8 experts."""
    idx = np.zeros((4, NUM_TOPK), np.int64)
    return DispatchRequest(
        data=view_numpy(empty_aligned((4, HIDDEN), FLOAT32)),
        scales=None,
        layout=None,
        topk=TopK(view_numpy(idx), view_numpy(idx.astype(np.float32))),
        handle=None,
        expert_alignment=1,
        num_worst_tokens=0,
        num_sms=None,
        **{"num_experts": 8, **options},
    )


class Rank:
    """A rank whose route.cu tells at once what arrives, and whose dispatch.cu is only noted.

    Attributes:
        launches: Rows of the outputs of each launch, and what it knew.
        written: Address of the rows of each launch.
        most_rows: Rows that there is memory for.
        grows: Whether slabs have to grow.
    """

    def __init__(self, can_move_ahead: bool = True) -> None:
        self.summary = np.zeros((), cuda_params.HOST_SUMMARY)
        self.counts = counts.Counts(
            *(self.summary, 0, 5.0), check=self.check, can_move_ahead=can_move_ahead
        )
        self.launches: list[tuple[int, str]] = []
        self.written: list[int] = []
        self.most_rows, self.grows, self.fails = 1000, False, False

    def check(self) -> None:
        if self.fails:
            raise CommTimeout("dispatch: counts", 0, [1], 5.0)

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> ArrayView:
        if shape[0] > self.most_rows:
            raise MemoryError
        return view_numpy(np.zeros(shape, dtype))

    def launch(self, outputs: Any, launch: Any) -> None:
        self.launches.append((outputs.data.shape[0], launch.name))
        self.written.append(outputs.data.ptr)

    def dispatch(self, num_recv: int, **options: Any) -> tuple[Any, list[tuple[int, str]]]:
        """Return the outputs, and the launches that it took."""
        self.launches, self.written = [], []
        address, ticket = self.counts.begin()
        assert address == self.summary.ctypes.data
        self.summary["num_recv"], self.summary["max_tokens"] = num_recv, 4
        self.summary["ticket"] = 0 if self.fails else ticket

        def grow(max_tokens: int) -> bool:
            assert max_tokens == 4
            return self.grows

        request = make_request(allocate=self.allocate, **options)
        outputs, told, max_tokens = self.counts.move(request, self.launch, grow)
        assert (told, max_tokens) == (num_recv, 4)
        assert outputs.data.ptr == self.written[-1]  # of the launch that writes
        assert outputs.data.shape == (num_recv, HIDDEN)
        return outputs, self.launches


def test_a_dispatch_like_the_last_ones_is_launched_before_its_counts_are_known() -> None:
    rank = Rank()
    for num_recv in (16, 17):  # nothing to go by
        assert rank.dispatch(num_recv)[1] == [(num_recv, "WHOLE")]
    outputs, launches = rank.dispatch(15)
    assert launches == [(19, "AHEAD")]
    assert [part.shape for part in outputs.topk] == [(15, NUM_TOPK), (15, NUM_TOPK)]
    assert rank.dispatch(20)[1] == [(19, "AHEAD"), (20, "RESUMES")]
    assert rank.dispatch(0)[1] == [(22, "AHEAD")]
    assert rank.counts._ahead is None


def test_counts_that_vary_are_waited_for() -> None:
    """Callers may keep what they get, and all of its memory with it."""
    rank = Rank()
    for num_recv in (40, 19, 40, 0, 0, 0):
        assert rank.dispatch(num_recv)[1] == [(num_recv, "WHOLE")]


def test_each_shape_has_a_forecast_of_its_own() -> None:
    rank = Rank()
    for num_experts in (8, 8, 16, 16, 8):
        assert rank.dispatch(16, num_experts=num_experts)[1] == [(16, "WHOLE")]


@pytest.mark.parametrize("num_recv", [1, 16])
def test_a_part_is_launched_at_once(num_recv: int) -> None:
    """Its outputs are there, for exactly the rows that arrive: nothing has to be forecast."""
    rank = Rank()
    rank.most_rows = 0
    rows = view_numpy(np.zeros((num_recv, HIDDEN), FLOAT32))
    idx, weights = (
        view_numpy(np.zeros((num_recv, NUM_TOPK), dtype)) for dtype in (np.int64, np.float32)
    )
    into = DispatchInto(rows, None, TopK(idx, weights), ())
    for _ in range(2):
        outputs, launches = rank.dispatch(num_recv, into=into)
        assert launches == [(num_recv, "AHEAD")]
        assert outputs == (rows, None, (idx, weights))
    rank.grows = True
    assert rank.dispatch(num_recv, into=into)[1] == [(num_recv, "AHEAD"), (num_recv, "WHOLE")]


def test_a_part_of_no_rows_has_no_outputs_to_launch_with() -> None:
    into = DispatchInto(view_numpy(np.zeros((0, HIDDEN), FLOAT32)), None, None, ())
    assert Rank().dispatch(0, into=into)[1] == [(0, "WHOLE")]


def test_a_dispatch_that_finds_its_slab_too_small_is_launched_anew() -> None:
    rank = Rank()
    rank.dispatch(16)
    rank.dispatch(16)
    rank.grows = True
    assert rank.dispatch(17)[1] == [(18, "AHEAD"), (17, "WHOLE")]


def test_memory_that_is_short_of_the_forecast_may_do() -> None:
    rank = Rank()
    rank.dispatch(16)
    rank.dispatch(16)
    rank.most_rows = 16
    assert rank.dispatch(16)[1] == [(16, "WHOLE")]


def test_threads_launch_alike() -> None:
    """They meet around launches; forecasts may differ."""
    rank = Rank(can_move_ahead=False)
    for _ in range(3):
        assert rank.dispatch(16)[1] == [(16, "WHOLE")]


def test_outputs_live_on_where_a_dispatch_fails_while_it_runs() -> None:
    rank = Rank()
    rank.dispatch(16)
    rank.dispatch(16)
    rank.fails = True
    with pytest.raises(CommTimeout):
        rank.dispatch(16)
    assert rank.counts._ahead.data.shape == (18, HIDDEN)


def test_pairs_of_experts_are_rounded_up() -> None:
    rank = Rank()
    rank.summary["expert_counts"][:4] = (0, 1, 128, 129)
    assert rank.counts.of_experts(3, 1) == [0, 1, 128]
    assert rank.counts.of_experts(4, 128) == [0, 128, 128, 256]
