"""The oracle of the contract tests, held to examples worked out by hand and to ml_dtypes."""

from __future__ import annotations

import contract  # noqa: F401 (makes the programs' folder importable)
import ml_dtypes
import numpy as np
import oracle

BF16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)


def test_layout_by_hand() -> None:
    # Two ranks of two experts.
    topk_idx = np.array([[0, 1], [3, 0], [-1, 2], [-1, -1], [3, 3]])
    made = oracle.layout(topk_idx, 4, 2)
    assert made.num_tokens_per_rank.tolist() == [2, 3]
    assert made.num_tokens_per_expert.tolist() == [2, 1, 1, 3]
    assert made.is_token_in_rank.tolist() == [
        *([True, False], [True, True], [False, True], [False, False], [False, True])
    ]


def test_dispatch_by_hand() -> None:
    topk = [np.array([[0, 3], [2, -1]]), np.array([[1, 0], [2, 3], [3, 3]])]
    assert oracle.arrivals(topk, 4, 0) == [(0, 0), (1, 0)]
    assert oracle.arrivals(topk, 4, 1) == [(0, 0), (0, 1), (1, 1), (1, 2)]
    rows = oracle.pick([np.array([[1], [2]]), np.array([[3], [4], [5]])], [(1, 2), (0, 1)])
    assert rows.tolist() == [[5], [2]]
    idx, weights = oracle.received_topk(topk[0], np.array([[0.5, 0.25], [2.0, 3.0]]), 4, 2, me=1)
    assert idx.tolist() == [[-1, 1], [0, -1]]
    assert weights.tolist() == [[0.0, 0.25], [2.0, 0.0]]
    assert oracle.tokens_per_local_expert(topk, 4, 1, 1) == [2, 4]
    assert oracle.tokens_per_local_expert(topk, 4, 1, 3) == [3, 6]


def test_combine_adds_ranks_in_order_from_the_bias() -> None:
    # 1 is lost beside 2^25, unless it is added after 2^25 - 2^25.
    big = np.full((1, 1), 2.0**25, np.float32)
    one = np.ones((1, 1), np.float32)
    both = np.array([[0, 1, 2]])
    assert oracle.combine([big, -big, one], both, 3) == 1
    assert oracle.combine([big, one, -big], both, 3) == 0
    assert oracle.combine([-big, one, one], both, 3, (big,)) == 2
    assert oracle.combine([one, one, one], np.array([[-1, 2, 2]]), 3, (one, one)) == 3
    nothing = oracle.combine([one, one, one], np.array([[-1, -1, -1]]), 3, (-0.0 * one,))
    assert np.signbit(nothing).all()


def test_low_latency_by_hand() -> None:
    topk = [np.array([[2, 0], [3, 2]]), np.array([[2, -1]])]
    rows = oracle.expert_rows(topk, 4, 1)
    assert rows.origins == [[(0, 0), (0, 1), (1, 0)], [(0, 1)]]
    assert rows.layout_range.tolist() == [[2, (2 << 32) + 1], [1, 1 << 32]]
    assert oracle.expert_rows(topk, 4, 1, skipped={0}).origins == [[(1, 0)], []]

    # One token, three choices. 1/256 is half a step of bf16 at 1.
    rows = np.array([[[1.0], [1 / 256], [1 / 256]]], np.float32).astype(BF16)
    idx, ones = np.array([[0, 1, 2]]), np.ones((1, 3), np.float32)
    combine = oracle.low_latency_combine
    assert combine(rows, idx, ones, 3, is_by_rank=False) == 1 + 1 / 128
    assert combine(rows, idx, ones, 1, is_by_rank=True) == 1 + 1 / 128
    assert combine(rows, idx, ones, 1, is_by_rank=True, skipped={0}) == 1 / 128
    assert combine(rows, np.array([[0, 1, -1]]), ones, 1, is_by_rank=True) == 1
    # Rank 0 rounds 1 + 1/256 to 1 before rank 1 adds its 1/256.
    assert combine(rows, idx, ones, 2, is_by_rank=True) == 1
    assert combine(rows, idx, ones, 2, is_by_rank=False) == 1 + 1 / 128
    assert combine(rows, np.array([[-1, -1, -1]]), ones, 1, is_by_rank=True) == 0


def test_rounding_agrees_with_ml_dtypes() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, 20000, np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        want = values.astype(BF16)
    is_nan = np.isnan(values)
    got = oracle.round_to(values, BF16)
    assert (got.view(np.uint16) == want.view(np.uint16))[~is_nan].all()
    assert np.isnan(got[is_nan].astype(np.float32)).all()


def test_fp8_rounding_agrees_with_ml_dtypes() -> None:
    codes = np.arange(0x7F, dtype=np.uint8).view(E4M3).astype(np.float32)
    middles = (codes[1:] + codes[:-1]) / 2
    values = np.concatenate([codes, middles, np.nextafter(middles, 0), np.nextafter(middles, 448)])
    values = np.concatenate([values, -values]).astype(np.float32)
    got, want = oracle.to_e4m3(values), values.astype(E4M3)
    assert (got.view(np.uint8) == want.view(np.uint8)).all()
    assert oracle.to_e4m3(np.array([1e9, -1e9], np.float32)).astype(float).tolist() == [448, -448]


def test_fp8_cast_by_hand() -> None:
    row = np.zeros((1, 512), np.float32)
    row[0, :4] = 448.0, -224.0, 1.0, 0.0
    row[0, 128], row[0, 256] = 1.0, 448.0 * 8.5
    rows, scales = oracle.cast_to_fp8(row.astype(BF16), is_rounded=False)
    assert rows[0, :4].astype(float).tolist() == [448, -224, 1, 0]
    assert rows[0, [128, 256]].astype(float).tolist() == [448, 448]
    want = [1, np.float32(1) / np.float32(448), 8.5, np.float32(1e-4) / np.float32(448)]
    assert scales[0].tolist() == [np.float32(value) for value in want]
    rows, scales = oracle.cast_to_fp8(row.astype(BF16), is_rounded=True)
    assert scales[0].tolist() == [1, 2.0**-8, 16, 2.0**-22]
    assert rows[0, [128, 256]].astype(float).tolist() == [256, 240]
    assert oracle.pack_ue8m0(scales).view(np.uint8).tolist() == [[127, 119, 131, 105]]


def test_difference() -> None:
    one = np.array([1.0, 2.0])
    assert oracle.difference(one, one) == 0
    assert oracle.difference(one, -one) == 2
    assert oracle.difference(0 * one, 0 * one) == 0
