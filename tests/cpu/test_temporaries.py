"""Calls that are repeated take no new memory but for their outputs and a few words a token."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from epcomm import Buffer, SingleGroup

NUM_TOKENS, HIDDEN, NUM_TOPK, NUM_EXPERTS = 256, 4096, 4, 8
#: Routing's numbers: far less than a row (8 KiB in bf16).
BYTES_A_TOKEN = 512


def array_bytes(value: Any) -> int:
    """Return the bytes of all arrays in a call's result."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, tuple | list):
        return sum(map(array_bytes, value))
    return 0


def excess_of(call: Callable[[], Any]) -> int:
    """Return the bytes that a warm call takes beside its outputs, at its peak."""
    call()
    tracemalloc.start()
    try:
        result = call()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return peak - array_bytes(result)


@pytest.fixture
def inputs() -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((NUM_TOKENS, HIDDEN), np.float32).astype(ml_dtypes.bfloat16)
    idx = np.argsort(rng.random((NUM_TOKENS, NUM_EXPERTS)), axis=1)[:, :NUM_TOPK]
    return x, np.ascontiguousarray(idx), np.ones((NUM_TOKENS, NUM_TOPK), np.float32)


def test_throughput_calls(inputs: tuple[Any, Any, Any]) -> None:
    x, idx, weights = inputs
    with_scales = x.view(np.uint8), np.ones((NUM_TOKENS, 64), np.float32)
    buffer = Buffer(SingleGroup(), engine="host")
    *_, handle, _ = buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_experts=NUM_EXPERTS)
    for call in (
        lambda: buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_experts=NUM_EXPERTS),
        lambda: buffer.dispatch(with_scales, handle=handle),
        lambda: buffer.combine(x, handle, weights, bias=(x, x)),
    ):
        assert excess_of(call) < NUM_TOKENS * BYTES_A_TOKEN
    buffer.destroy()


@pytest.mark.parametrize("use_fp8", [True, False], ids=["fp8", "bf16"])
def test_low_latency_dispatch(inputs: tuple[Any, Any, Any], use_fp8: bool) -> None:
    x, idx, _ = inputs
    buffer = Buffer(SingleGroup(), engine="host")

    def call() -> Any:
        return buffer.low_latency_dispatch(x, idx, NUM_TOKENS, NUM_EXPERTS, use_fp8=use_fp8)

    assert excess_of(call) < NUM_TOKENS * BYTES_A_TOKEN
    buffer.destroy()


@pytest.mark.parametrize("precision", ["rank", "expert"])
def test_low_latency_combine(inputs: tuple[Any, Any, Any], precision: str) -> None:
    x, idx, weights = inputs
    buffer = Buffer(SingleGroup(), engine="host")
    recv, _, handle, _, _ = buffer.low_latency_dispatch(
        x, idx, NUM_TOKENS, NUM_EXPERTS, use_fp8=False
    )
    recv = np.zeros_like(recv)  # rows that nothing arrived in hold anything

    def call() -> Any:
        return buffer.low_latency_combine(recv, idx, weights, handle, combine_precision=precision)

    assert excess_of(call) < NUM_TOKENS * BYTES_A_TOKEN
    buffer.destroy()
