"""The fp8 cast against float64 arithmetic: values, the three kinds of scale, and the extremes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epcomm import fp8
from epcomm.engines.base import Fp8Format

pytestmark = pytest.mark.timeout(60)

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = 448.0
LEAST_AMAX = 1e-4
FORMATS = [
    Fp8Format.FLOAT_SCALES,
    Fp8Format.POWER_OF_TWO_SCALES,
    Fp8Format.PACKED_UE8M0_SCALES,
]
EXPONENTIAL = FORMATS[1:]


def unpack_ue8m0(packed: np.ndarray) -> np.ndarray:
    """Return the f32 scales ``[..., 4 n]`` that packed words ``[..., n]`` stand for."""
    exponents = np.ascontiguousarray(packed).view(np.uint8).astype(np.int32)
    return np.ldexp(np.float32(1.0), exponents - 127)


def cast(rows: np.ndarray, kind: Fp8Format) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the e4m3 values, the scales as they are sent, and the scales as float64."""
    out = np.full(rows.shape, np.nan, E4M3)
    shape = len(rows), fp8.num_scales(kind, rows.shape[1])
    scales = np.full(shape, -1, fp8.scales_dtype(kind))
    fp8.cast_to_fp8(rows.astype(np.float32), kind, out, scales)
    plain = unpack_ue8m0(scales) if kind is Fp8Format.PACKED_UE8M0_SCALES else scales
    return out, scales, plain.astype(np.float64)


def amax_of(rows: np.ndarray) -> np.ndarray:
    blocks = np.abs(rows.astype(np.float64)).reshape(len(rows), -1, fp8.BLOCK)
    return np.maximum(blocks.max(axis=2), LEAST_AMAX)


def restored(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return values.astype(np.float64) * np.repeat(scales, fp8.BLOCK, axis=1)


def random_rows(seed: int, num_rows: int, hidden: int, spread: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((num_rows, hidden)) * 10.0 ** (
        rng.uniform(-spread, spread, (num_rows, hidden // fp8.BLOCK)).repeat(fp8.BLOCK, axis=1)
    )
    return rows.astype(BF16)


def check_error(rows: np.ndarray, values: np.ndarray, scales: np.ndarray) -> None:
    """Half a step of e4m3: 2^-4 of a normal value, and 2^-10 of the scale of a subnormal one."""
    wanted = rows.astype(np.float64)
    by_element = np.repeat(scales, fp8.BLOCK, axis=1)
    allowed = np.maximum(np.abs(wanted) * 2.0**-4, by_element * 2.0**-10) * (1 + 1e-5)
    assert (np.abs(restored(values, scales) - wanted) <= allowed).all()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", [(1, 512), (7, 1024), (3, 7168), (64, 2048)])
def test_values_against_float64(kind: Fp8Format, shape: tuple[int, int]) -> None:
    rows = random_rows(0, *shape, spread=3.0)
    values, _, scales = cast(rows, kind)
    assert np.isfinite(values.astype(np.float32)).all()
    check_error(rows, values, scales)


@pytest.mark.parametrize("shape", [(5, 512), (9, 640)])
def test_float_scales_are_amax_over_448(shape: tuple[int, int]) -> None:
    rows = random_rows(1, *shape, spread=5.0)
    values, sent, scales = cast(rows, Fp8Format.FLOAT_SCALES)
    assert sent.dtype == np.float32
    np.testing.assert_allclose(scales, amax_of(rows) / LARGEST, rtol=1.2e-7)
    # The largest value of each block that is not tiny is the largest that there is.
    blocks = np.abs(values.astype(np.float64)).reshape(*scales.shape, fp8.BLOCK)
    assert (blocks.max(axis=2) == LARGEST)[amax_of(rows) > LEAST_AMAX].all()


@pytest.mark.parametrize("kind", EXPONENTIAL)
def test_power_of_two_scales_are_the_least_that_hold_amax(kind: Fp8Format) -> None:
    rows = random_rows(2, 40, 1024, spread=6.0)
    values, _, scales = cast(rows, kind)
    mantissa, _ = np.frexp(scales)
    assert (mantissa == 0.5).all()
    amax = amax_of(rows)
    assert (amax / scales <= LARGEST * (1 + 1e-6)).all()
    assert (amax / (scales / 2) > LARGEST * (1 - 1e-6)).all()
    assert np.abs(values.astype(np.float64)).max() <= LARGEST


@pytest.mark.parametrize("kind", EXPONENTIAL)
def test_power_of_two_cast_is_a_plain_cast_of_the_scaled_value(kind: Fp8Format) -> None:
    """Scaling by a power of two is exact, so each value is one rounding from its origin."""
    rows = random_rows(3, 16, 512, spread=2.0)
    values, _, scales = cast(rows, kind)
    by_element = np.repeat(scales, fp8.BLOCK, axis=1)
    wanted = (rows.astype(np.float64) / by_element).astype(np.float32).astype(E4M3)
    np.testing.assert_array_equal(values.view(np.uint8), wanted.view(np.uint8))


@pytest.mark.parametrize("exponent", [-14, -3, 0, 1, 9, 40])
@pytest.mark.parametrize("kind", EXPONENTIAL)
def test_amax_that_needs_no_rounding_up(kind: Fp8Format, exponent: int) -> None:
    """448 times a power of two has that power as its scale; the next larger bf16 the double."""
    rows = np.zeros((2, 512), BF16)
    rows[0, 5] = LARGEST * 2.0**exponent
    rows[1, 5] = (LARGEST + 2) * 2.0**exponent
    _, _, scales = cast(rows, kind)
    least = amax_of(np.zeros((1, 128), BF16))[0, 0] / LARGEST
    wanted = max(2.0**exponent, 2.0 ** np.ceil(np.log2(least)))
    assert scales[0, 0] == wanted
    assert scales[1, 0] == max(2.0 ** (exponent + 1), 2.0 ** np.ceil(np.log2(least)))


def test_packed_scales_hold_the_exponents_of_the_plain_ones() -> None:
    rows = random_rows(4, 11, 2048, spread=8.0)
    plain_values, plain, _ = cast(rows, Fp8Format.POWER_OF_TWO_SCALES)
    values, packed, unpacked = cast(rows, Fp8Format.PACKED_UE8M0_SCALES)
    np.testing.assert_array_equal(values.view(np.uint8), plain_values.view(np.uint8))
    np.testing.assert_array_equal(unpacked, plain)
    assert packed.dtype == np.int32
    assert packed.shape == (11, 2048 // 512)
    for row, word in np.ndindex(packed.shape):
        bits = int(packed[row, word]) & 0xFFFFFFFF
        for i in range(4):
            exponent = bits >> 8 * i & 0xFF
            assert 2.0 ** (exponent - 127) == plain[row, 4 * word + i]


@given(st.lists(st.integers(1, 254), min_size=4, max_size=32).filter(lambda v: len(v) % 4 == 0))
def test_packing_and_unpacking(exponents: list[int]) -> None:
    powers = np.ldexp(np.float32(1.0), np.array(exponents, np.int32) - 127)[None]
    packed = fp8._pack_ue8m0(powers.astype(np.float32))
    assert packed.shape == (1, len(exponents) // 4)
    np.testing.assert_array_equal(unpack_ue8m0(packed), powers)


@pytest.mark.parametrize("kind", FORMATS)
def test_zeros(kind: Fp8Format) -> None:
    rows = np.zeros((3, 512), BF16)
    rows[1, ::2] = -0.0
    values, _, scales = cast(rows, kind)
    assert (values.astype(np.float32) == 0).all()
    assert np.isfinite(scales).all()
    assert (scales > 0).all()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("amax", [1e-4, 1e-5, 1e-20, 1e-38, 9e-41])
def test_tiny(kind: Fp8Format, amax: float) -> None:
    """Blocks below 1e-4 are scaled as if they held it: small values vanish, none becomes NaN."""
    rows = (random_rows(5, 2, 512).astype(np.float64) * amax).astype(BF16)
    values, _, scales = cast(rows, kind)
    assert np.isfinite(values.astype(np.float32)).all()
    least = LEAST_AMAX / LARGEST
    assert (scales >= least * (1 - 1e-6)).all()
    assert (scales <= 2 * max(least, float(amax_of(rows).max()) / LARGEST)).all()
    check_error(rows, values, scales)


@pytest.mark.parametrize("kind", FORMATS)
def test_huge(kind: Fp8Format) -> None:
    largest = float(ml_dtypes.finfo(BF16).max)
    rows = random_rows(6, 4, 512)
    rows[0] = largest
    rows[1, ::3] = -largest
    rows[2] = 1e30
    values, _, scales = cast(rows, kind)
    assert np.isfinite(values.astype(np.float32)).all()
    assert np.isfinite(scales).all()
    check_error(rows, values, scales)


@pytest.mark.parametrize("kind", FORMATS)
def test_blocks_do_not_touch_each_other(kind: Fp8Format) -> None:
    rows = random_rows(7, 3, 1024)
    before, _, scales_before = cast(rows, kind)
    rows[1, 128:256] *= 1000
    after, _, scales_after = cast(rows, kind)
    changed = np.zeros(rows.shape, bool)
    changed[1, 128:256] = True
    np.testing.assert_array_equal(before.view(np.uint8)[~changed], after.view(np.uint8)[~changed])
    assert (scales_before != scales_after).sum() == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_any_float_is_cast(dtype: Any) -> None:
    rows = random_rows(8, 4, 512).astype(dtype)
    values, _, scales = cast(rows, Fp8Format.FLOAT_SCALES)
    check_error(rows, values, scales)


@pytest.mark.parametrize("kind", FORMATS)
def test_no_rows(kind: Fp8Format) -> None:
    values, scales, _ = cast(np.zeros((0, 1024), BF16), kind)
    assert values.shape == (0, 1024)
    assert len(scales) == 0


@pytest.mark.parametrize("kind", FORMATS)
def test_input_is_left_alone(kind: Fp8Format) -> None:
    rows = random_rows(9, 4, 512)
    copy = rows.copy()
    rows.flags.writeable = False
    cast(rows, kind)
    np.testing.assert_array_equal(rows, copy)


def test_table_of_formats() -> None:
    for hidden in (512, 1024, 7168):
        assert fp8.num_scales(Fp8Format.NONE, hidden) == 0
        assert fp8.num_scales(Fp8Format.FLOAT_SCALES, hidden) == hidden // 128
        assert fp8.num_scales(Fp8Format.POWER_OF_TWO_SCALES, hidden) == hidden // 128
        assert fp8.num_scales(Fp8Format.PACKED_UE8M0_SCALES, hidden) == hidden // 512
    assert fp8.data_dtype(Fp8Format.NONE) == BF16
    assert all(fp8.data_dtype(kind) == E4M3 for kind in FORMATS)
    assert [fp8.scales_dtype(kind) for kind in FORMATS] == [np.float32, np.float32, np.int32]
