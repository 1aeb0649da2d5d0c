"""The demo's text: where it comes from, and each rank's shard of it."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from epcomm.cli.exchange import Array
from epcomm.errors import InvalidArgument

MAX_DEFAULT_BYTES = 4 << 20
# One part in so many is never trained on.
HELD_OUT_PART = 16


def read_text(path: Path | None, min_bytes: int) -> bytes:
    """Read the text to learn.

    Args:
        path: a file, or None for the sources of this Python's own standard library: its top-level
            modules by name, up to `MAX_DEFAULT_BYTES`.
        min_bytes: what the ranks' shards need.

    Raises:
        InvalidArgument: the file cannot be read, or the text is too short.
    """
    if path is None:
        text, source = _standard_library(), "Python's own sources"
    else:
        source = f"--text {path}"
        try:
            text = path.read_bytes()
        except OSError as error:
            raise InvalidArgument(
                f"{source}: {error.strerror}. The text must be a file that rank 0 can read; "
                "without --text the demo reads Python's own sources."
            ) from error
    if len(text) < min_bytes:
        raise InvalidArgument(
            f"{source}: got {len(text)} bytes of text, but these ranks and this --context need "
            f"{min_bytes} at least. Pass a longer file as --text, or use fewer ranks."
        )
    return text


def _standard_library() -> bytes:
    folder = Path(sysconfig.get_path("stdlib"))
    text = b""
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= MAX_DEFAULT_BYTES:
            break
    return text[:MAX_DEFAULT_BYTES]


def get_min_bytes(num_ranks: int, context: int) -> int:
    """Return how long a text must be for every rank's held-out shard to hold one token."""
    return HELD_OUT_PART * num_ranks * (context + 2)


class Shard:
    """One rank's part of the text, in consecutive slices by rank.

    Args:
        xp: namespace of the arrays to return.
        text: [num_bytes] uint8, NumPy, the same on every rank.
        context: bytes that a token sees.
        rank, num_ranks: whose part.
        seed: of the draws; every rank draws its own.
    """

    def __init__(
        self, xp: Any, text: Array, context: int, *, rank: int, num_ranks: int, seed: int
    ) -> None:
        self._xp = xp
        self._context = context
        self._rng = np.random.default_rng([seed, rank])
        begin_held_out = len(text) - len(text) // HELD_OUT_PART
        self._train = _slice_of(text[:begin_held_out], rank, num_ranks)
        self._held_out = _slice_of(text[begin_held_out:], rank, num_ranks)

    @property
    def prompt(self) -> Array:
        """The first bytes of the held-out part: [context] uint8, NumPy."""
        return self._held_out[: self._context]

    def draw(self, num_tokens: int) -> tuple[Array, Array]:
        """Draw tokens to train on: contexts [T, context] and targets [T], int64."""
        return self._draw(self._train, num_tokens)

    def draw_held_out(self, num_tokens: int) -> tuple[Array, Array]:
        """Draw tokens that are never trained on, as `draw`."""
        return self._draw(self._held_out, num_tokens)

    def _draw(self, text: Array, num_tokens: int) -> tuple[Array, Array]:
        places = self._rng.integers(self._context, len(text), num_tokens)
        windows = text[places[:, None] + np.arange(-self._context, 1)].astype(np.int64)
        windows = self._xp.asarray(windows)
        return windows[:, :-1], windows[:, -1]


def _slice_of(text: Array, rank: int, num_ranks: int) -> Array:
    length = len(text) // num_ranks
    return text[rank * length : (rank + 1) * length]
