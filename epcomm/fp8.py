"""The fp8 cast of low-latency dispatch: e4m3, one scale a block of 128. The kernels' oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from epcomm.arrays import BFLOAT16, FLOAT8_E4M3
from epcomm.engines.base import Fp8Format

#: Values that share a scale.
BLOCK = 128
#: Largest finite e4m3 value.
_MAX = np.float32(448.0)
#: Blocks of smaller values than this are scaled as if they held it.
_MIN_AMAX = np.float32(1e-4)
#: UE8M0 exponents in one packed word.
_PACK = 4


def data_dtype(fp8: Fp8Format) -> np.dtype[Any]:
    """Return the dtype of the rows that are sent."""
    dtype: np.dtype[Any] = BFLOAT16 if fp8 is Fp8Format.NONE else FLOAT8_E4M3
    return dtype


def scales_dtype(fp8: Fp8Format) -> np.dtype[Any]:
    """Return the dtype of the scales: f32, or i32 with four packed exponents."""
    return np.dtype(np.int32 if fp8 is Fp8Format.PACKED_UE8M0_SCALES else np.float32)


def num_scales(fp8: Fp8Format, hidden: int) -> int:
    """Return the scales of one row."""
    if fp8 is Fp8Format.NONE:
        return 0
    return hidden // BLOCK // (_PACK if fp8 is Fp8Format.PACKED_UE8M0_SCALES else 1)


def cast_to_fp8(
    rows: npt.NDArray[np.float32],
    fp8: Fp8Format,
    out: npt.NDArray[Any],
    out_scales: npt.NDArray[Any],
) -> None:
    """Cast rows to e4m3.

    Args:
        rows: ``[num_rows, hidden] f32``, hidden a multiple of 128. Overwritten: it serves as
            memory for what is scaled.
        fp8: The kind of scale, not NONE.
        out: ``[num_rows, hidden]`` float8_e4m3fn, written.
        out_scales: ``[num_rows, num_scales]``, written: what an e4m3 value is multiplied with to
            get its row's value back.
    """
    # Infinities and NaNs are the caller's own values, as on a GPU: no warnings.
    with np.errstate(all="ignore"):
        _cast(rows, fp8, out, out_scales)


def _cast(
    rows: npt.NDArray[np.float32],
    fp8: Fp8Format,
    out: npt.NDArray[Any],
    out_scales: npt.NDArray[Any],
) -> None:
    blocks = rows.reshape(len(rows), rows.shape[1] // BLOCK, BLOCK)
    amax = np.maximum(np.maximum(blocks.max(axis=2), -blocks.min(axis=2)), _MIN_AMAX)
    inverse = amax / _MAX
    if fp8 is Fp8Format.FLOAT_SCALES:
        scale = _MAX / amax
    else:
        exponent = _ceil_log2(inverse)
        inverse = np.ldexp(np.float32(1.0), exponent)
        scale = np.ldexp(np.float32(1.0), -exponent)
    # The product can end one rounding above the largest value.
    blocks *= scale[:, :, None]
    np.clip(blocks, -_MAX, _MAX, out=blocks)
    np.copyto(out, rows, casting="unsafe")
    out_scales[...] = _pack_ue8m0(inverse) if fp8 is Fp8Format.PACKED_UE8M0_SCALES else inverse


def _ceil_log2(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """Return the least exponent whose power of two is not below a normal positive value."""
    bits = values.view(np.int32)
    has_fraction = (bits & 0x7FFFFF) != 0
    exponents: npt.NDArray[np.int32] = (bits >> 23) - 127 + has_fraction
    return exponents


def _pack_ue8m0(powers: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """Pack the exponent bytes of four neighbours into each word, the first one lowest."""
    exponents = (powers.view(np.int32) >> 23).astype(np.uint8)
    return np.ascontiguousarray(exponents).view("<i4").astype(np.int32)
