"""Every error message of every argument check, and that a refused call changes nothing.

A message says what was wrong, what was got, the rule, and what to do: each row of the tables holds
a piece of each. Every refused call is made by two ranks at once on a Buffer in use, and the Buffer
must then work as before, handles of before the refusal included.
"""

from __future__ import annotations

import builtins
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from ranks import fail_common as common

import epcomm
from epcomm import (
    Buffer,
    ClosedError,
    CommTimeout,
    Config,
    CudaError,
    EpcommError,
    EventOverlap,
    InvalidArgument,
    SingleGroup,
    TransportError,
    UnsupportedConfig,
    as_group,
    decoding,
    env,
    errors,
    gpus,
    run_threads,
    training,
)
from epcomm.topology import from_hosts

pytestmark = pytest.mark.timeout(60)

BF16 = np.dtype(ml_dtypes.bfloat16)
NUM_RANKS = 2
T, H, K, E = 5, 1024, 3, 4
MAX = 8


class Rank:
    """One rank's Buffer and good arguments, which the tables below spoil one at a time."""

    def __init__(self, group: Any) -> None:
        rng = np.random.default_rng(group.rank)
        self.group = group
        self.buffer = Buffer(group, timeout_s=10.0)
        self.shrinking = Buffer(group, enable_shrink=True, timeout_s=10.0)
        self.x = rng.integers(-9, 10, (T, H)).astype(np.float32)
        self.bf16 = self.x.astype(BF16)
        self.idx = np.argsort(rng.random((T, E)), axis=1)[:, :K].astype(np.int64)
        self.weights = np.ones((T, K), np.float32)
        self.per_rank, _, self.per_expert, self.in_rank, _ = self.buffer.get_dispatch_layout(
            self.idx, E
        )
        self.recv, _, _, _, self.handle, _ = self.dispatch()
        *_, self.foreign_handle, _ = self.shrinking.dispatch(self.x, **self.arguments())
        self.rows, _, self.ll_handle, _, _ = self.ll_dispatch(use_fp8=False)

    def arguments(self) -> dict[str, Any]:
        return {
            "num_tokens_per_rank": self.per_rank,
            "is_token_in_rank": self.in_rank,
            "num_tokens_per_expert": self.per_expert,
            "topk_idx": self.idx,
            "topk_weights": self.weights,
        }

    def layout(self, **changed: Any) -> Any:
        arguments = {"topk_idx": self.idx, "num_experts": E} | changed
        return self.buffer.get_dispatch_layout(**arguments)

    def dispatch(self, **changed: Any) -> Any:
        return self.buffer.dispatch(**({"x": self.x} | self.arguments() | changed))

    def again(self, **changed: Any) -> Any:
        return self.buffer.dispatch(**({"x": self.x, "handle": self.handle} | changed))

    def combine(self, **changed: Any) -> Any:
        return self.buffer.combine(**({"x": self.recv, "handle": self.handle} | changed))

    def ll_dispatch(self, **changed: Any) -> Any:
        arguments = {
            "x": self.bf16,
            "topk_idx": self.idx,
            "num_max_dispatch_tokens_per_rank": MAX,
            "num_experts": E,
        }
        return self.buffer.low_latency_dispatch(**(arguments | changed))

    def ll_combine(self, **changed: Any) -> Any:
        arguments = {
            "x": self.rows,
            "topk_idx": self.idx,
            "topk_weights": self.weights,
            "handle": self.ll_handle,
        }
        return self.buffer.low_latency_combine(**(arguments | changed))

    def ll_handle_with(self, **changed: Any) -> tuple[Any, ...]:
        names = ("src_info", "layout_range", "max", "hidden", "experts")
        return tuple((dict(zip(names, self.ll_handle, strict=True)) | changed).values())

    def check_works(self) -> None:
        """Use all that was made before the refusal, and make a round on each Buffer."""
        np.testing.assert_array_equal(self.again()[0], self.recv)
        combined, _, _ = self.combine()
        np.testing.assert_array_equal(combined, self.x * self.in_rank.sum(axis=1, keepdims=True))
        combined, _, _ = self.ll_combine()
        np.testing.assert_array_equal(combined.astype(np.float32), self.x * K)
        for buffer in (self.buffer, self.shrinking):
            common.check_round(buffer, seed=1)
            common.check_low_latency_round(buffer, seed=2)


@dataclass(frozen=True)
class Refused:
    """A call that must be refused.

    Attributes:
        name: Its id.
        call: Makes it.
        pieces: What the message must contain.
        error: Its exact class.
    """

    name: str
    call: Callable[[Rank], Any]
    pieces: tuple[str, ...]
    error: type[EpcommError] = InvalidArgument


def refused(name: str, call: Callable[[Rank], Any], *pieces: str, error: Any = None) -> Any:
    return pytest.param(Refused(name, call, pieces, error or InvalidArgument), id=name)


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


CAPTURED = EventOverlap()

CONSTRUCTION = [
    refused("no-group", lambda r: Buffer(), "a group or a comm", "mpi4py", "run_threads"),
    refused("both", lambda r: Buffer(r.group, comm=r.group), "not both"),
    refused("group", lambda r: Buffer(7), "group is a int", "mpi4py communicator", "run_threads"),
    refused("nvl", lambda r: Buffer(r.group, -1), "num_nvl_bytes is -1", "at least 0"),
    refused("nvl-f", lambda r: Buffer(r.group, 1.5), "num_nvl_bytes is 1.5", "whole number"),
    refused("rdma", lambda r: Buffer(r.group, 0, -2), "num_rdma_bytes is -2", "at least 0"),
    refused("rdma-s", lambda r: Buffer(r.group, 0, "1"), "num_rdma_bytes is '1'", "whole number"),
    refused(
        "engine",
        lambda r: Buffer(r.group, engine="gpu"),
        *("engine is 'gpu'", "auto, host, cuda", "Leave it out", "'host' for arrays in CPU memory"),
    ),
    refused(
        "cuda",
        lambda r: Buffer(r.group, engine="cuda"),
        *("engine='cuda'", "engine='host'"),
        error=UnsupportedConfig,
    ),
    *(
        refused(
            f"timeout-{value}",
            lambda r, value=value: Buffer(r.group, timeout_s=value),
            *(f"timeout_s is {value}", "> 0"),
        )
        for value in (0, -1.5, float("nan"), float("inf"))
    ),
    refused("timeout-s", lambda r: Buffer(r.group, timeout_s="soon"), "timeout_s is", "soon"),
]

STATIC = [
    refused("sms-odd", lambda r: Buffer.set_num_sms(3), "num_sms is 3", "even and at least 2"),
    refused("sms-zero", lambda r: Buffer.set_num_sms(0), "num_sms is 0", "even and at least 2"),
    refused("sms-text", lambda r: Buffer.set_num_sms("20"), "num_sms is", "20", "even"),
    refused("config-sms", lambda r: Config(7), "num_sms is 7", "even and at least 2"),
    refused("config-none", lambda r: Config(None), "num_sms is None", "even"),
    refused("dispatch-config", lambda r: Buffer.get_dispatch_config(0), "num_ranks is 0"),
    refused("combine-config", lambda r: Buffer.get_combine_config(-1), "num_ranks is -1"),
    refused(
        "nvl-hint", lambda r: Config().get_nvl_buffer_size_hint(0, 2), "hidden_bytes is 0", "1"
    ),
    refused(
        "nvl-hint-ranks", lambda r: Config().get_nvl_buffer_size_hint(16, 0), "num_ranks is 0", "1"
    ),
    refused(
        "nvl-hint-tokens",
        lambda r: Config().get_nvl_buffer_size_hint(16, 1, num_max_tokens=0),
        *("num_max_tokens is 0", "at least 1"),
    ),
    refused(
        "rdma-hint", lambda r: Config().get_rdma_buffer_size_hint(-1, 2), "hidden_bytes is -1", "1"
    ),
    refused(
        "hidden-bytes-1d",
        lambda r: training.get_hidden_bytes(r.x[0]),
        *("x is a ndarray of shape [1024]", "[num_tokens, hidden]"),
    ),
    refused("hidden-bytes-list", lambda r: training.get_hidden_bytes([]), "x is a list", "pair"),
    refused(
        "training-handle", lambda r: training.combine_forward(r.x, None), "handle is None", "pass"
    ),
    refused(
        "decoding-hidden",
        lambda r: decoding.get_buffer(r.group, MAX, 200, E),
        *("hidden is 200", "a multiple of 128", "use_fp8=False"),
    ),
    refused(
        "ll-hint-tokens",
        lambda r: Buffer.get_low_latency_rdma_size_hint(0, H, 2, E),
        *("num_max_dispatch_tokens_per_rank is 0", "at least 1"),
    ),
    refused(
        "ll-hint-engine",
        lambda r: Buffer.get_low_latency_rdma_size_hint(MAX, H, 2, E, engine="gpu"),
        *("engine is 'gpu'", "auto, host, cuda"),
    ),
    refused(
        "ll-hint-hidden",
        lambda r: Buffer.get_low_latency_rdma_size_hint(MAX, 0, 2, E),
        *("hidden is 0", "at least 1"),
    ),
    refused(
        "ll-hint-ranks",
        lambda r: Buffer.get_low_latency_rdma_size_hint(MAX, H, 0, E),
        *("num_ranks is 0", "at least 1"),
    ),
    refused(
        "ll-hint-experts",
        lambda r: Buffer.get_low_latency_rdma_size_hint(MAX, H, 3, 4),
        *("num_experts is 4", "multiple of the 3 ranks", "Pass 6"),
    ),
    refused("threads", lambda r: run_threads(print, 0), "num_ranks is 0", "at least 1"),
]

EVENTS = [
    case
    for call in ("layout", "dispatch", "again", "combine")
    for case in (
        refused(
            f"{call}-event",
            lambda r, call=call: getattr(r, call)(previous_event=3),
            *("previous_event is a int", "EventOverlap", "Buffer.capture()"),
        ),
        refused(
            f"{call}-event-of-another-kind",
            lambda r, call=call: getattr(r, call)(previous_event=EventOverlap(object())),
            *("previous_event holds a object", "EventHandle", "Buffer.capture()"),
        ),
        refused(
            f"{call}-allocate",
            lambda r, call=call: getattr(r, call)(allocate_on_comm_stream=True),
            *("allocate_on_comm_stream=True needs", "previous_event=", "async_finish=True"),
        ),
        refused(
            f"{call}-allocate-without-async",
            lambda r, call=call: getattr(r, call)(
                allocate_on_comm_stream=True, previous_event=CAPTURED
            ),
            *("allocate_on_comm_stream=True needs", "async_finish=True"),
        ),
    )
]

LAYOUT = [
    refused(
        "layout-1d",
        lambda r: r.layout(topk_idx=r.idx[0]),
        *("topk_idx has shape [3]", "[num_tokens, num_topk]"),
    ),
    refused(
        "layout-dtype",
        lambda r: r.layout(topk_idx=r.x),
        *("topk_idx is float32", "int64, int32"),
    ),
    refused(
        "layout-strided",
        lambda r: r.layout(topk_idx=np.repeat(r.idx, 2, axis=1)[:, ::2]),
        *("topk_idx has strides of", "contiguous", "numpy.ascontiguousarray(topk_idx)"),
    ),
    refused(
        "layout-order",
        lambda r: r.layout(topk_idx=r.idx.astype(">i8")),
        *("topk_idx has byte order", ">i8", "astype"),
    ),
    refused("layout-list", lambda r: r.layout(topk_idx=[[0]]), "topk_idx is a list", "NumPy"),
    refused("layout-none", lambda r: r.layout(topk_idx=None), "topk_idx is None;", "NumPy"),
    refused(
        "layout-high",
        lambda r: r.layout(topk_idx=np.full((1, 1), E)),
        *("topk_idx holds values from 4 to 4", "0 to 3", "-1 for no choice"),
    ),
    refused(
        "layout-low",
        lambda r: r.layout(topk_idx=np.array([[-2, 1]])),
        *("topk_idx holds values from -2 to 1", "0 to 3"),
    ),
    refused(
        "layout-experts",
        lambda r: r.layout(num_experts=5),
        *("num_experts is 5", "multiple of the 2 ranks"),
    ),
    refused("layout-no-experts", lambda r: r.layout(num_experts=0), "num_experts is 0", "least 1"),
    refused(
        "layout-experts-float", lambda r: r.layout(num_experts=4.0), "num_experts is 4.0", "whole"
    ),
]

DISPATCH = [
    refused("x-1d", lambda r: r.dispatch(x=r.x[0]), "x has shape [1024]", "[num_tokens, hidden]"),
    refused("x-list", lambda r: r.dispatch(x="rows"), "x is a str", "__dlpack__"),
    refused(
        "x-row",
        lambda r: r.dispatch(x=zeros(T, 3)),
        *("x has rows of 12 bytes (3 float32)", "multiple of 16 bytes", "pad"),
    ),
    refused("x-empty-row", lambda r: r.dispatch(x=zeros(T, 0)), "x has rows of 0 bytes", "pad"),
    refused(
        "x-dtype",
        lambda r: r.dispatch(x=zeros(T, H, dtype=complex)),
        *("x is complex128", "one of: bool, uint8", "x.astype(numpy.float32)"),
    ),
    refused("x-object", lambda r: r.dispatch(x=zeros(T, H, dtype=object)), "x is object"),
    refused(
        "x-strided",
        lambda r: r.dispatch(x=r.x.T.copy().T),
        *("x has strides of", "contiguous", "x.contiguous()"),
    ),
    refused(
        "x-triple",
        lambda r: r.dispatch(x=(r.x, r.x, r.x)),
        *("x is a tuple of 3", "(data, scales)"),
    ),
    refused(
        "x-pair-dtype",
        lambda r: r.dispatch(x=(r.x, zeros(T, 8))),
        *("x[0] is float32", "x[0].astype(ml_dtypes.float8_e4m3fn)"),
    ),
    refused(
        "x-pair-row",
        lambda r: r.dispatch(x=(zeros(T, 24, dtype=np.uint8), zeros(T, 8))),
        *("x[0] has rows of 24 bytes", "multiple of 16"),
    ),
    refused(
        "scales-rows",
        lambda r: r.dispatch(x=(zeros(T, 16, dtype=np.uint8), zeros(T + 1, 8))),
        *("x[1] has shape [6, 8]", "[5, num_scales]: as many rows as x[0]"),
    ),
    refused(
        "scales-dtype",
        lambda r: r.dispatch(x=(zeros(T, 16, dtype=np.uint8), zeros(T, 8, dtype=float))),
        *("x[1] is float64", "float32, int32"),
    ),
    refused(
        "layout-missing",
        lambda r: r.buffer.dispatch(r.x),
        *("num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank", "get_dispatch_layout"),
    ),
    refused(
        "num-experts-missing",
        lambda r: r.buffer.dispatch(r.x, topk_idx=r.idx, topk_weights=r.weights),
        *("num_experts= is missing", "Pass num_experts=", "get_dispatch_layout"),
    ),
    refused(
        "layout-missing-one",
        lambda r: r.dispatch(is_token_in_rank=None),
        *("got no is_token_in_rank;", "get_dispatch_layout"),
    ),
    refused(
        "per-rank-shape",
        lambda r: r.dispatch(num_tokens_per_rank=zeros(3, dtype=np.int32)),
        *("num_tokens_per_rank has shape [3]", "[2]"),
    ),
    refused(
        "per-rank-dtype",
        lambda r: r.dispatch(num_tokens_per_rank=r.per_rank.astype(np.int64)),
        *("num_tokens_per_rank is int64", "int32"),
    ),
    refused(
        "per-expert-ranks",
        lambda r: r.dispatch(num_tokens_per_expert=zeros(5, dtype=np.int32)),
        *("num_experts is 5", "multiple of the 2 ranks"),
    ),
    refused(
        "in-rank-shape",
        lambda r: r.dispatch(is_token_in_rank=zeros(T + 1, 2, dtype=bool)),
        *("is_token_in_rank has shape [6, 2]", "[5, 2]"),
    ),
    refused(
        "in-rank-dtype",
        lambda r: r.dispatch(is_token_in_rank=r.in_rank.astype(np.uint8)),
        *("is_token_in_rank is uint8", "bool"),
    ),
    refused(
        "layout-contradicts",
        lambda r: r.dispatch(is_token_in_rank=np.zeros_like(r.in_rank)),
        *("num_tokens_per_rank is [", "is_token_in_rank has [0, 0]", "one get_dispatch_layout"),
    ),
    refused(
        "idx-alone",
        lambda r: r.dispatch(topk_weights=None),
        *("topk_idx was passed without topk_weights", "both or neither"),
    ),
    refused(
        "weights-alone",
        lambda r: r.dispatch(topk_idx=None),
        *("topk_weights was passed without topk_idx", "both or neither"),
    ),
    refused(
        "idx-rows",
        lambda r: r.dispatch(topk_idx=r.idx[1:]),
        *("topk_idx has shape [4, 3]", "[5, num_topk]: as many rows as x"),
    ),
    refused(
        "idx-dtype",
        lambda r: r.dispatch(topk_idx=r.idx.astype(np.int16)),
        *("topk_idx is int16", "one of: int64, int32", "topk_idx.astype(numpy.int64)"),
    ),
    refused(
        "idx-range",
        lambda r: r.dispatch(topk_idx=r.idx + E),
        *("topk_idx holds values from", "0 to 3"),
    ),
    refused(
        "weights-shape",
        lambda r: r.dispatch(topk_weights=r.weights[:, 1:]),
        *("topk_weights has shape [5, 2]", "[5, 3]: as topk_idx has"),
    ),
    refused(
        "weights-dtype",
        lambda r: r.dispatch(topk_weights=r.weights.astype(float)),
        *("topk_weights is float64", "it must be float32.", "topk_weights.astype(numpy.float32)"),
    ),
    refused(
        "idx-without-choices",
        lambda r: r.dispatch(topk_idx=r.idx[:, :0], topk_weights=r.weights[:, :0]),
        *("topk_idx has no choices, shape [5, 0]", "pass at least one"),
    ),
    refused(
        "idx-of-another-layout",
        lambda r: r.dispatch(topk_idx=np.zeros_like(r.idx)),
        *("num_tokens_per_expert[0] is ", "topk_idx chooses expert 0 15 times", "was made of"),
    ),
    refused(
        "alignment", lambda r: r.dispatch(expert_alignment=0), "expert_alignment is 0", "least 1"
    ),
    refused(
        "alignment-large",
        lambda r: r.dispatch(expert_alignment=2**63),
        *("expert_alignment is 9223372036854775808", "at most 2147483647"),
    ),
    refused(
        "worst-negative",
        lambda r: r.dispatch(num_worst_tokens=-1),
        *("num_worst_tokens is -1", "at least 0"),
    ),
    refused(
        "worst-few",
        lambda r: r.dispatch(num_worst_tokens=1),
        *("num_worst_tokens is 1 on rank 0", "rows arrive there", "The sum of all ranks' tokens"),
    ),
    refused("config", lambda r: r.dispatch(config=20), "config is a int", "epcomm.Config or None"),
    refused(
        "experts-without-idx",
        lambda r: r.buffer.dispatch(r.x, num_experts=E),
        *("num_experts= stands for the layout arrays", "pass it with topk_idx"),
    ),
    refused(
        "experts-and-layout",
        lambda r: r.dispatch(num_experts=E),
        *("num_experts= stands for the layout arrays", "without num_tokens_per_rank"),
    ),
    refused("handle", lambda r: r.again(handle=(1, 2)), "handle is a tuple", "dispatch returned"),
    refused(
        "handle-foreign",
        lambda r: r.again(handle=r.foreign_handle),
        *("handle comes from another Buffer", "whose dispatch returned it"),
    ),
    refused(
        "handle-topk",
        lambda r: r.again(topk_idx=r.idx, topk_weights=r.weights),
        *("topk_idx and topk_weights were passed with a handle", "one or the other"),
    ),
    refused(
        "handle-rows",
        lambda r: r.again(x=r.x[1:]),
        *("x has 4 rows", "the handle's dispatch had 5"),
    ),
    refused("handle-config", lambda r: r.again(config={}), "config is a dict", "epcomm.Config"),
]

COMBINE = [
    refused(
        "rows",
        lambda r: r.combine(x=zeros(len(r.recv) + 1, H)),
        *("x has shape [", "hidden]: as many rows as this rank received with the handle"),
    ),
    refused(
        "dtype",
        lambda r: r.combine(x=r.recv.astype(np.int32)),
        *("x is int32", "bfloat16, float16, float32"),
    ),
    refused(
        "row",
        lambda r: r.combine(x=r.recv[:, :3].copy()),
        *("x has rows of 12 bytes", "multiple of 16", "pad"),
    ),
    refused("strided", lambda r: r.combine(x=r.recv[:, ::2]), "x has strides", "contiguous"),
    refused("list", lambda r: r.combine(x=[1]), "x is a list", "__dlpack__"),
    refused("no-handle", lambda r: r.combine(handle=None), "handle is None;", "dispatch"),
    refused(
        "foreign", lambda r: r.combine(handle=r.foreign_handle), "handle comes from another Buffer"
    ),
    refused("ll-handle", lambda r: r.combine(handle=r.ll_handle), "handle is a tuple", "dispatch"),
    refused(
        "weights-rows",
        lambda r: r.combine(topk_weights=zeros(len(r.recv) + 1, K)),
        *("topk_weights has shape [", "num_topk]"),
    ),
    refused(
        "weights-dtype",
        lambda r: r.combine(topk_weights=zeros(len(r.recv), K, dtype=float)),
        *("topk_weights is float64", "float32"),
    ),
    refused(
        "bias-shape",
        lambda r: r.combine(bias=zeros(T, 4)),
        "bias[0] has shape [5, 4]",
        "[5, 1024]: as",
    ),
    refused("bias-dtype", lambda r: r.combine(bias=r.bf16), "bias[0] is bfloat16", "float32"),
    refused("bias-second", lambda r: r.combine(bias=(r.x, r.bf16)), "bias[1] is bfloat16"),
    refused("bias-three", lambda r: r.combine(bias=(r.x,) * 3), "bias has 3 arrays", "one or two"),
    refused("config", lambda r: r.combine(config="fast"), "config is a str", "epcomm.Config"),
]

LL_DISPATCH = [
    refused("x-dtype", lambda r: r.ll_dispatch(x=r.x), "x is float32", "bfloat16"),
    refused("x-1d", lambda r: r.ll_dispatch(x=r.bf16[0]), "x has shape [1024]", "hidden]"),
    refused(
        "x-row",
        lambda r: r.ll_dispatch(x=r.bf16[:, :4].copy(), use_fp8=False),
        *("x has rows of 8 bytes", "multiple of 16"),
    ),
    refused("x-list", lambda r: r.ll_dispatch(x=[1]), "x is a list", "__dlpack__"),
    refused("x-strided", lambda r: r.ll_dispatch(x=r.bf16[:, ::2]), "x has strides", "contiguous"),
    refused(
        "tokens",
        lambda r: r.ll_dispatch(num_max_dispatch_tokens_per_rank=4),
        *("x has 5 tokens", "num_max_dispatch_tokens_per_rank is 4", "at least as many"),
    ),
    refused(
        "max",
        lambda r: r.ll_dispatch(num_max_dispatch_tokens_per_rank=0),
        *("num_max_dispatch_tokens_per_rank is 0", "at least 1"),
    ),
    refused("experts", lambda r: r.ll_dispatch(num_experts=3), "num_experts is 3", "the 2 ranks"),
    refused(
        "idx-rows",
        lambda r: r.ll_dispatch(topk_idx=r.idx[1:]),
        *("topk_idx has shape [4, 3]", "[5, num_topk]"),
    ),
    refused("idx-dtype", lambda r: r.ll_dispatch(topk_idx=r.x), "topk_idx is float32", "int64"),
    refused(
        "idx-many",
        lambda r: r.ll_dispatch(topk_idx=np.full((T, 33), -1)),
        *("topk_idx has 33 choices", "at most 32", "Use dispatch and combine"),
    ),
    refused(
        "idx-range",
        lambda r: r.ll_dispatch(topk_idx=np.full((T, 1), E)),
        *("topk_idx holds values from 4 to 4", "0 to 3"),
    ),
    refused(
        "idx-twice",
        lambda r: r.ll_dispatch(topk_idx=np.array([[0, 1]] * 4 + [[3, 3]])),
        *("topk_idx[4] is [3, 3]", "must differ"),
    ),
    refused(
        "fp8-hidden",
        lambda r: r.ll_dispatch(x=r.bf16[:, :64].copy()),
        *("hidden size 64", "multiple of 128", "use_fp8=False"),
    ),
    refused(
        "ue8m0-hidden",
        lambda r: r.ll_dispatch(x=r.bf16[:, :128].copy(), use_ue8m0=True, round_scale=True),
        *("hidden size 128", "use_ue8m0", "multiple of 512"),
    ),
    refused(
        "ue8m0-round",
        lambda r: r.ll_dispatch(use_ue8m0=True),
        *("use_ue8m0=True needs round_scale=True", "powers of two"),
    ),
    refused(
        "round-bf16",
        lambda r: r.ll_dispatch(round_scale=True, use_fp8=False),
        *("round_scale=True needs use_fp8=True", "no scales"),
    ),
    refused(
        "async-hook",
        lambda r: r.ll_dispatch(async_finish=True, return_recv_hook=True),
        *("async_finish and return_recv_hook exclude each other", "pass one"),
    ),
    refused(
        "stats-shape",
        lambda r: r.ll_dispatch(cumulative_local_expert_recv_stats=zeros(E, dtype=np.int32)),
        *("cumulative_local_expert_recv_stats has shape [4]", "[2]"),
    ),
    refused(
        "stats-dtype",
        lambda r: r.ll_dispatch(cumulative_local_expert_recv_stats=zeros(2, dtype=np.int64)),
        *("cumulative_local_expert_recv_stats is int64", "int32"),
    ),
    refused(
        "stats-read-only",
        lambda r: r.ll_dispatch(
            cumulative_local_expert_recv_stats=read_only(zeros(2, dtype=np.int32))
        ),
        *("cumulative_local_expert_recv_stats is read-only", "writable"),
    ),
    refused(
        "wait-stats-dtype",
        lambda r: r.ll_dispatch(dispatch_wait_recv_cost_stats=zeros(2, dtype=np.int32)),
        *("dispatch_wait_recv_cost_stats is int32", "int64"),
    ),
]

LL_COMBINE = [
    refused(
        "x-shape",
        lambda r: r.ll_combine(x=r.rows[:, 1:].copy()),
        *("x has shape [2, 15, 1024]", "[2, 16, 1024]"),
    ),
    refused("x-dtype", lambda r: r.ll_combine(x=r.rows.astype(np.float32)), "x is float32", "bfl"),
    refused("x-list", lambda r: r.ll_combine(x=[1]), "x is a list", "__dlpack__"),
    refused(
        "idx-many",
        lambda r: r.ll_combine(topk_idx=np.full((T, 33), -1), topk_weights=zeros(T, 33)),
        *("topk_idx has 33 choices", "at most 32"),
    ),
    refused(
        "idx-range",
        lambda r: r.ll_combine(topk_idx=r.idx - 3),
        *("topk_idx holds values from", "0 to 3"),
    ),
    refused(
        "idx-twice",
        lambda r: r.ll_combine(topk_idx=np.array([[0, 1, 2]] * 4 + [[1, 2, 1]])),
        *("topk_idx[4] is [1, 2, 1]", "must differ"),
    ),
    refused(
        "idx-tokens",
        lambda r: r.ll_combine(
            topk_idx=np.zeros((MAX * NUM_RANKS * 2 + 1, 1), np.int64),
            topk_weights=zeros(MAX * NUM_RANKS * 2 + 1, 1),
        ),
        *("topk_idx has 33", "8"),
    ),
    refused(
        "weights-shape",
        lambda r: r.ll_combine(topk_weights=zeros(T, 2)),
        *("topk_weights has shape [5, 2]", "[5, 3]"),
    ),
    refused(
        "weights-dtype",
        lambda r: r.ll_combine(topk_weights=zeros(T, K, dtype=BF16)),
        *("topk_weights is bfloat16", "float32"),
    ),
    refused(
        "handle", lambda r: r.ll_combine(handle=r.handle), "handle is a DispatchHandle", "returned"
    ),
    refused(
        "handle-short", lambda r: r.ll_combine(handle=r.ll_handle[:4]), "must be the tuple of 5"
    ),
    refused(
        "handle-range-dtype",
        lambda r: r.ll_combine(handle=r.ll_handle_with(layout_range=zeros(2, 2, dtype=np.int32))),
        *("handle[1] is int32", "int64"),
    ),
    refused(
        "handle-range-shape",
        lambda r: r.ll_combine(handle=r.ll_handle_with(layout_range=zeros(2, 3, dtype=np.int64))),
        *("handle[1] has shape [2, 3]", "[2, 2]"),
    ),
    refused(
        "handle-experts",
        lambda r: r.ll_combine(handle=r.ll_handle_with(experts=3)),
        *("num_experts is 3", "the 2 ranks"),
    ),
    refused(
        "handle-max",
        lambda r: r.ll_combine(handle=r.ll_handle_with(max=0)),
        *("num_max_dispatch_tokens_per_rank is 0", "at least 1"),
    ),
    refused(
        "zero-copy",
        lambda r: r.ll_combine(zero_copy=True),
        *("zero_copy=True, but x is not", "get_next_low_latency_combine_buffer", "zero_copy=False"),
    ),
    refused(
        "precision",
        lambda r: r.ll_combine(combine_precision="best"),
        *("combine_precision is 'best'", "'rank' or 'expert'"),
    ),
    refused(
        "precision-type",
        lambda r: r.ll_combine(combine_precision=1),
        *("combine_precision is 1", "'rank' or 'expert'"),
    ),
    refused(
        "async-hook",
        lambda r: r.ll_combine(async_finish=True, return_recv_hook=True),
        "exclude each other",
    ),
    refused(
        "out-shape",
        lambda r: r.ll_combine(out=zeros(T + 1, H, dtype=BF16)),
        *("out has shape [6, 1024]", "[5, 1024]"),
    ),
    refused("out-dtype", lambda r: r.ll_combine(out=zeros(T, H)), "out is float32", "bfloat16"),
    refused(
        "out-read-only",
        lambda r: r.ll_combine(out=read_only(zeros(T, H, dtype=BF16))),
        *("out is read-only", "written", "pass a writable array"),
    ),
    refused(
        "stats-shape",
        lambda r: r.ll_combine(combine_wait_recv_cost_stats=zeros(3, dtype=np.int64)),
        *("combine_wait_recv_cost_stats has shape [3]", "[2]"),
    ),
]

SLAB_AND_MASK = [
    refused(
        "next-handle",
        lambda r: r.buffer.get_next_low_latency_combine_buffer(3),
        *("it must be the tuple of 5", "low_latency_dispatch returned"),
    ),
    refused(
        "next-small",
        lambda r: r.shrinking.get_next_low_latency_combine_buffer(r.ll_handle_with(max=4096)),
        *("too small", "dispatch with it first"),
    ),
    refused(
        "clean",
        lambda r: r.buffer.clean_low_latency_buffer(MAX, H, 3),
        *("num_experts is 3", "the 2 ranks"),
    ),
    refused(
        "clean-hidden",
        lambda r: r.buffer.clean_low_latency_buffer(MAX, 0, E),
        *("hidden is 0", "at least 1"),
    ),
    refused(
        "local-size",
        lambda r: r.buffer.get_local_buffer_tensor(np.float32, (1 << 40,)),
        *("size [1099511627776] of float32 from byte 0", "the slab's", "num_nvl_bytes"),
    ),
    refused(
        "local-size-of-no-integer",
        lambda r: r.buffer.get_local_buffer_tensor(np.float32, (2.5,)),
        *("size is 2.5", "whole number"),
    ),
    refused(
        "local-offset",
        lambda r: r.buffer.get_local_buffer_tensor(np.float32, (1,), offset=2),
        *("from byte 2", "multiple of 4"),
    ),
    refused(
        "local-offset-past",
        lambda r: r.buffer.get_local_buffer_tensor(np.uint8, None, offset=1 << 40),
        *("from byte 1099511627776", "the slab's"),
    ),
    refused(
        "local-negative",
        lambda r: r.buffer.get_local_buffer_tensor(np.uint8, (-1,)),
        *("size is -1", "at least 0"),
    ),
    refused(
        "local-offset-negative",
        lambda r: r.buffer.get_local_buffer_tensor(np.uint8, (1,), offset=-1),
        *("offset is -1", "at least 0"),
    ),
    refused(
        "local-dtype",
        lambda r: r.buffer.get_local_buffer_tensor("rows"),
        *("dtype is 'rows'", "NumPy or a torch dtype"),
    ),
    refused(
        "local-dtype-object", lambda r: r.buffer.get_local_buffer_tensor(object, (1,)), "object"
    ),
    *(
        refused(
            f"{name}-without-shrink",
            lambda r, call=call: call(r.buffer),
            *("this Buffer masks no ranks", "enable_shrink=True"),
        )
        for name, call in (
            ("update", lambda buffer: buffer.low_latency_update_mask_buffer(0, True)),
            ("query", lambda buffer: buffer.low_latency_query_mask_buffer(zeros(2))),
            ("clean", lambda buffer: buffer.low_latency_clean_mask_buffer()),
        )
    ),
    refused(
        "mask-rank",
        lambda r: r.shrinking.low_latency_update_mask_buffer(2, True),
        *("rank_to_mask is 2", "below 2"),
    ),
    refused(
        "mask-negative",
        lambda r: r.shrinking.low_latency_update_mask_buffer(-1, True),
        *("rank_to_mask is -1", "at least 0"),
    ),
    refused(
        "query-none",
        lambda r: r.shrinking.low_latency_query_mask_buffer(None),
        *("mask_status is None", "[num_ranks] int32"),
    ),
    refused(
        "query-dtype",
        lambda r: r.shrinking.low_latency_query_mask_buffer(zeros(2, dtype=bool)),
        *("mask_status is bool", "int32"),
    ),
    refused(
        "query-read-only",
        lambda r: r.shrinking.low_latency_query_mask_buffer(read_only(zeros(2, dtype=np.int32))),
        *("mask_status is read-only", "writable"),
    ),
]


def check_refused(case: Refused, rank: Rank) -> None:
    """Make the call; hold its error to the table and to the form that all messages have."""
    try:
        case.call(rank)
    except EpcommError as error:
        found = error
    else:
        raise AssertionError("the call was not refused")
    assert type(found) is case.error
    message = str(found)
    for piece in case.pieces:
        assert piece in message
    assert re.fullmatch(r"[^\n]*\.", message), "one line that ends with a full stop"


def run_refused(case: Refused) -> None:
    def fn(group: Any) -> None:
        rank = Rank(group)
        check_refused(case, rank)
        rank.check_works()
        rank.buffer.destroy()
        rank.shrinking.destroy()

    run_threads(fn, NUM_RANKS)


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_construction(case: Refused) -> None:
    run_refused(case)


@pytest.mark.parametrize("case", STATIC)
def test_static(case: Refused) -> None:
    before = Buffer.num_sms
    run_refused(case)
    assert Buffer.num_sms == before


@pytest.mark.parametrize("case", EVENTS)
def test_events(case: Refused) -> None:
    run_refused(case)


@pytest.mark.parametrize("case", LAYOUT)
def test_layout(case: Refused) -> None:
    run_refused(case)


@pytest.mark.parametrize("case", DISPATCH)
def test_dispatch(case: Refused) -> None:
    run_refused(case)


@pytest.mark.parametrize("case", COMBINE)
def test_combine(case: Refused) -> None:
    run_refused(case)


@pytest.mark.parametrize("case", LL_DISPATCH)
def test_low_latency_dispatch(case: Refused) -> None:
    run_refused(case)


@pytest.mark.parametrize("case", LL_COMBINE)
def test_low_latency_combine(case: Refused) -> None:
    run_refused(case)


@pytest.mark.parametrize("case", SLAB_AND_MASK)
def test_slab_and_mask(case: Refused) -> None:
    run_refused(case)


def test_refused_arguments_are_not_written() -> None:
    def fn(group: Any) -> None:
        rank = Rank(group)
        stats = np.full(2, 7, np.int32)
        out = np.full((T, H), 7, BF16)
        with pytest.raises(InvalidArgument):
            rank.ll_dispatch(cumulative_local_expert_recv_stats=stats, topk_idx=np.full((T, 1), E))
        with pytest.raises(InvalidArgument):
            rank.ll_combine(out=out, combine_precision="best")
        assert (stats == 7).all()
        assert (out == 7).all()

    run_threads(fn, NUM_RANKS)


# --- what only shows after other calls ------------------------------------------------------------


def test_third_low_latency_result_is_refused() -> None:
    def fn(group: Any) -> None:
        rank = Rank(group)
        *_, first_hook = rank.ll_dispatch(return_recv_hook=True)
        *_, second_hook = rank.ll_dispatch(return_recv_hook=True)
        for call in (rank.ll_dispatch, rank.ll_combine):
            with pytest.raises(InvalidArgument) as caught:
                call()
            assert "2 earlier low-latency results wait for their hook" in str(caught.value)
            assert re.search(r"call .* hook(\(\))? first|call a hook\(\) first", str(caught.value))
        first_hook()
        second_hook()
        rank.check_works()

    run_threads(fn, NUM_RANKS)


@pytest.mark.parametrize("call", ["ll_dispatch", "ll_combine"])
def test_hook_called_twice_is_refused(call: str) -> None:
    def fn(group: Any) -> None:
        rank = Rank(group)
        *_, hook = getattr(rank, call)(return_recv_hook=True)
        hook()
        with pytest.raises(InvalidArgument, match="this hook was called before; call each hook"):
            hook()
        rank.check_works()

    run_threads(fn, NUM_RANKS)


@pytest.mark.parametrize("num_outstanding", [1, 2])
def test_hooks_that_are_dropped_are_told_of(num_outstanding: int) -> None:
    def fn(group: Any) -> None:
        rank = Rank(group)
        for _ in range(num_outstanding):
            rank.ll_dispatch(return_recv_hook=True)
        if num_outstanding == 2:
            with pytest.raises(InvalidArgument, match=r"wait for their hook.* first\."):
                rank.ll_dispatch()
        else:
            rank.ll_dispatch()

    run_threads(fn, NUM_RANKS)


def test_larger_shape_while_a_result_is_outstanding() -> None:
    """Either it works, or it is refused with the number of bytes that lets it work."""

    def attempt(group: Any, num_rdma_bytes: int) -> int:
        with_room = Buffer(group, num_rdma_bytes=num_rdma_bytes, timeout_s=5.0)
        rows = np.zeros((T, H), BF16)
        idx = np.zeros((T, 1), np.int64)
        *_, hook = with_room.low_latency_dispatch(rows, idx, MAX, E, return_recv_hook=True)
        needed = 0
        try:
            with_room.low_latency_dispatch(rows, idx, 4 * MAX, E)
        except InvalidArgument as error:
            needed = int(re.search(r"hook first.* num_rdma_bytes=(\d+)", str(error))[1])
        hook()
        with_room.low_latency_dispatch(rows, idx, 4 * MAX, E)
        with_room.destroy()
        return needed

    def fn(group: Any) -> None:
        needed = attempt(group, 0)
        assert attempt(group, needed) == 0

    run_threads(fn, NUM_RANKS)


def test_zero_copy_buffer_is_good_for_one_combine() -> None:
    def fn(group: Any) -> None:
        rank = Rank(group)
        place = rank.buffer.get_next_low_latency_combine_buffer(rank.ll_handle)
        place[...] = rank.rows
        combined, _, _ = rank.ll_combine(x=place, zero_copy=True)
        np.testing.assert_array_equal(combined.astype(np.float32), rank.x * K)
        with pytest.raises(InvalidArgument, match="x is not the buffer"):
            rank.ll_combine(x=place, zero_copy=True)
        rank.check_works()

    run_threads(fn, NUM_RANKS)


USES: dict[str, Callable[[Rank], Any]] = {
    "layout": lambda r: r.layout(),
    "dispatch": lambda r: r.dispatch(),
    "dispatch-again": lambda r: r.again(),
    "combine": lambda r: r.combine(),
    "ll-dispatch": lambda r: r.ll_dispatch(),
    "ll-combine": lambda r: r.ll_combine(),
    "next": lambda r: r.buffer.get_next_low_latency_combine_buffer(r.ll_handle),
    "local": lambda r: r.buffer.get_local_buffer_tensor(np.uint8),
    "stream": lambda r: r.buffer.get_comm_stream(),
    "clean": lambda r: r.buffer.clean_low_latency_buffer(MAX, H, E),
    "update": lambda r: r.buffer.low_latency_update_mask_buffer(0, True),
    "query": lambda r: r.buffer.low_latency_query_mask_buffer(zeros(2, dtype=np.int32)),
    "clean-mask": lambda r: r.buffer.low_latency_clean_mask_buffer(),
}


@pytest.mark.parametrize("use", USES)
def test_use_after_destroy(use: str) -> None:
    def fn(group: Any) -> None:
        rank = Rank(group)
        assert not rank.buffer.is_destroyed
        rank.buffer.destroy()
        assert rank.buffer.is_destroyed
        rank.buffer.destroy()
        assert f"rank {group.rank} of 2, destroyed" in repr(rank.buffer)
        with pytest.raises(ClosedError) as caught:
            USES[use](rank)
        assert "came after destroy(); make a new Buffer." in str(caught.value)
        common.check_round(rank.shrinking, seed=3)

    run_threads(fn, NUM_RANKS)


def test_training_and_decoding_without_a_buffer() -> None:
    def fn(group: Any) -> None:
        x, idx, weights = zeros(1, 16), zeros(1, 1, dtype=np.int64), zeros(1, 1)
        with pytest.raises(ClosedError, match=r"no Buffer yet; call training\.get_buffer first"):
            training.dispatch_forward(x, idx, weights, 2)
        with pytest.raises(ClosedError, match=r"no Buffer yet; call decoding\.get_buffer first"):
            decoding.low_latency_dispatch(x, idx, 1, 2)
        with pytest.raises(ClosedError, match=r"no Buffer yet; call decoding\.get_buffer first"):
            decoding.low_latency_combine(x, idx, weights, (None, None, 1, 16, 2))

    run_threads(fn, 1)


def test_training_of_a_thread_never_takes_the_buffer_of_the_process() -> None:
    buffer = training.get_buffer(SingleGroup(), 64)
    try:
        test_training_and_decoding_without_a_buffer()
    finally:
        buffer.destroy()


@pytest.mark.parametrize("wrong", [{"engine": "gpu"}, {"device": -1}], ids=["engine", "device"])
def test_a_refused_get_buffer_leaves_the_buffer_as_it_is(
    wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # With or without GPUs: one is said to be there, which nobody uses.
    monkeypatch.setattr("epcomm.buffer.find_num_gpus", lambda: 1)

    def fn(group: Any) -> None:
        for get in (
            lambda **place: training.get_buffer(group, 64, **place),
            lambda **place: decoding.get_buffer(group, MAX, H, E, **place),
        ):
            buffer = get(engine="host")
            with pytest.raises(InvalidArgument):
                get(**wrong)
            assert get(engine="host") is buffer
            common.check_round(buffer, seed=5)
            buffer.destroy()

    run_threads(fn, NUM_RANKS)


def test_a_failed_call_of_cuda_is_an_error_of_epcomm(monkeypatch: pytest.MonkeyPatch) -> None:
    class CUDARuntimeError(RuntimeError):
        """What CuPy would raise."""

    def fail(*args: Any) -> None:
        raise CUDARuntimeError("cudaErrorLaunchFailure: unspecified launch failure")

    monkeypatch.setattr(gpus, "cuda_error_types", lambda: (CUDARuntimeError,))
    buffer = Buffer(SingleGroup(), engine="host")
    for name in ("dispatch", "low_latency_dispatch"):
        monkeypatch.setattr(buffer._engine, name, fail)
    x, idx = zeros(2, 128, dtype=BF16), zeros(2, 1, dtype=np.int64)
    for call in (
        lambda: buffer.dispatch(x, topk_idx=idx, topk_weights=zeros(2, 1), num_experts=1),
        lambda: buffer.low_latency_dispatch(x, idx, 2, 1),
    ):
        with pytest.raises(
            CudaError, match="rank 0: CUDA failed: cudaErrorLaunchFailure"
        ) as caught:
            call()
        assert isinstance(caught.value.__cause__, CUDARuntimeError)
    monkeypatch.undo()
    buffer.destroy()


def test_training_with_a_handle_of_a_buffer_that_is_gone() -> None:
    def fn(group: Any) -> None:
        rank = Rank(group)
        for call in (
            lambda: training.combine_forward(rank.recv, rank.handle),
            lambda: training.combine_backward(rank.x, rank.handle),
            lambda: training.dispatch_backward(rank.recv, None, rank.handle),
        ):
            with pytest.raises(ClosedError, match="the handle's Buffer is gone; pass a handle of"):
                call()

    run_threads(fn, NUM_RANKS)


def test_group_over_several_nodes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPCOMM_RANKS_PER_NODE", "1")
    env.settings.cache_clear()
    try:
        with pytest.raises(UnsupportedConfig) as caught:
            run_threads(Buffer, 2)
    finally:
        monkeypatch.undo()
        env.settings.cache_clear()
    message = str(caught.value)
    assert "spans 2 nodes (0, 1)" in message
    assert "Pass an mpi4py communicator" in message
    assert "EPCOMM_RANKS_PER_NODE" in message


def test_nodes_that_differ_are_refused() -> None:
    with pytest.raises(epcomm.RankMismatch) as caught:
        from_hosts(0, ["a", "a"], [2, None])
    assert "EPCOMM_RANKS_PER_NODE differs: rank 0 has 2, rank 1 has None" in str(caught.value)
    assert "same value on every rank" in str(caught.value)


# --- the tree -------------------------------------------------------------------------------------


def test_the_tree_is_the_one_in_the_docstring() -> None:
    """The drawing in errors.py names every class once, below its real base."""
    drawn = re.findall(r"^(.*?)(\w+)(?: \((\w+)\))?(?:  .*)?$", _drawing(), flags=re.MULTILINE)
    path: list[type] = []
    for indent, name, extra in drawn:
        kind = getattr(errors, name)
        depth = (len(indent) - 4) // 4
        del path[depth:]
        if path:
            assert path[-1] in kind.__bases__
        if extra:
            assert issubclass(kind, getattr(builtins, extra))
        assert getattr(epcomm, name) is kind
        path.append(kind)
    defined = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert defined - {"Sequence"} == {name for _, name, _ in drawn}


def _drawing() -> str:
    return errors.__doc__.partition("::\n\n")[2].partition("\n\n")[0]


def test_comm_timeout_tells_who_waits_for_whom() -> None:
    error = CommTimeout("combine: arrival", 2, [0, 5], 1.5, "rank 0 is gone")
    assert isinstance(error, TransportError)
    assert isinstance(error, TimeoutError)
    assert (error.phase, error.rank, error.peers, error.timeout_s) == (
        *("combine: arrival", 2, (0, 5), 1.5),
    )
    assert str(error).startswith(
        "combine: arrival: rank 2 waited 1.5 s for rank(s) 0, 5; rank 0 is gone. "
    )
    assert "raise timeout_s= or EPCOMM_TIMEOUT_S" in str(error)
    assert str(error).endswith("destroy that Buffer on every rank and make a new one.")
    assert error.gave_up is None
    assert "for other ranks" in str(CommTimeout("x", 0, [], 1.0))


def test_comm_timeout_tells_no_wait_of_a_rank_that_another_ended() -> None:
    error = CommTimeout("combine: arrival", 2, [0], 1.5, gave_up=1)
    assert error.gave_up == 1
    assert str(error).startswith(
        "combine: arrival: rank 1 gave up waiting for rank(s) 0, so rank 2 ends too. "
    )
    assert "waited" not in str(error)


def test_comm_timeout_where_nobody_tells_whom_the_other_waited_for() -> None:
    error = CommTimeout("combine: rows", 2, [1], 1.5, gave_up=1)
    assert (error.peers, error.gave_up) == ((1,), 1)
    assert str(error).startswith("combine: rows: rank 1 gave up waiting, so rank 2 ends too. ")


def test_as_group_refuses_what_is_no_group() -> None:
    for wrong in (None, 3, "world", object(), SingleGroup):
        with pytest.raises(InvalidArgument, match="it must be an mpi4py communicator"):
            as_group(wrong)
