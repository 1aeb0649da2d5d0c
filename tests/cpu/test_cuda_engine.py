"""What the cuda engine decides on the host, without a GPU: before launches, and while it waits."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from epcomm.arrays import view_numpy
from epcomm.engines import cuda_failures, cuda_params
from epcomm.engines.base import CombineRequest
from epcomm.errors import InvalidArgument, RankMismatch
from epcomm.handle import DispatchHandle

cuda = pytest.importorskip("epcomm.engines.cuda", reason="CuPy is not installed")

MISMATCH, BAD_EXPERT, EXPERT_TWICE = 3, 5, 6


@pytest.fixture
def engine() -> Any:
    """An engine of which nothing was made but what its host code looks at."""
    made = cuda.CudaEngine.__new__(cuda.CudaEngine)
    made._group = SimpleNamespace(rank=0, size=2, check=lambda: None)
    made._device, made._num_multiprocessors, made._timeout_s = 0, 132, 5.0
    made._num_sms = lambda: 20
    made._record = np.zeros((), cuda_params.FAILURE_RECORD)
    made._summary = np.zeros((), cuda_params.HOST_SUMMARY)
    made._room = SimpleNamespace(slabs=SimpleNamespace(num_sharing=1))
    made._names = (0, 1)
    made._is_closed = True
    made._wait_call = lambda: None
    return made


@pytest.mark.parametrize("failure", [BAD_EXPERT, EXPERT_TWICE])
def test_a_bad_choice_does_not_end_a_dispatch_between_its_kernels(
    engine: Any, failure: int
) -> None:
    """Peers have begun the same dispatch: it is told once this rank has made its part."""
    engine._record["failure"] = failure

    def tell() -> None:
        time.sleep(0.05)
        engine._summary["num_recv"], engine._summary["max_tokens"] = 7, 9
        engine._summary["ticket"] = 3

    kernel = threading.Thread(target=tell)
    kernel.start()
    assert engine._wait_counts(3) == (7, 9)
    kernel.join()
    with pytest.raises(InvalidArgument, match="topk_idx"):
        engine._raise_failures()


def test_what_all_ranks_share_ends_a_dispatch(engine: Any) -> None:
    engine._record["failure"] = MISMATCH
    with pytest.raises(RankMismatch):
        engine._wait_counts(3)


def test_failures_that_end_a_call() -> None:
    ends = [failure for failure in range(8) if cuda_failures.ends_call(failure)]
    assert ends == [1, 2, 3, 4, 7]


@pytest.mark.parametrize(("num_sharing", "num_sms"), [(1, 133), (2, 67)])
def test_combine_refuses_sms_before_it_touches_a_peer(
    engine: Any, num_sharing: int, num_sms: int
) -> None:
    engine._room.slabs.num_sharing = num_sharing
    engine._make_room = lambda *args: pytest.fail("slabs were to grow")
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


def test_threads_that_share_a_gpu_share_its_multiprocessors(engine: Any) -> None:
    engine._room.slabs.num_sharing = 8
    assert engine._num_blocks(None) == 16
    assert engine._num_blocks(12) == 12
