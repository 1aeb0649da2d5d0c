"""How a dispatch learns how many rows arrive: from route.cu, which tells the host.

Where that can be known before, outputs are made ahead, and dispatch.cu launched with them: then the
GPU does not wait for the host.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from epcomm.engines.base import DispatchRequest
from epcomm.engines.cuda_dispatch import Launch, Outputs, make_outputs, num_experts_of
from epcomm.errors import CommTimeout
from epcomm.waiting import Deadline, poll_until


class Counts:
    """What route.cu tells the host, of one dispatch after the other.

    Args:
        summary: HOST_SUMMARY, in memory that kernels write.
        rank: What errors call this rank.
        timeout_s: Deadline of the device's waits, in seconds.
        check: Raises what has ended the call in hand, where something has.
        can_move_ahead: Whether dispatch.cu may be launched before the counts are known.
    """

    def __init__(
        self,
        summary: npt.NDArray[np.void],
        rank: int,
        timeout_s: float,
        *,
        check: Callable[[], None],
        can_move_ahead: bool,
    ) -> None:
        self._summary, self._address = summary, int(summary.ctypes.data)
        self._rank, self._timeout_s = rank, timeout_s
        self._check, self._can_move_ahead = check, can_move_ahead
        self._tickets = itertools.count(1)
        self._ticket = 0
        self._forecast = RowForecast()
        #: Outputs made ahead: kept here as well, for where the call fails while a kernel runs.
        self._ahead: Outputs | None = None

    def begin(self) -> tuple[int, int]:
        """Begin with the next dispatch.

        Returns:
            Where route.cu is to write: the summary's address, and the ticket, which comes last.
        """
        self._ticket = next(self._tickets)
        return self._address, self._ticket

    def move(
        self,
        request: DispatchRequest,
        launch: Callable[[Outputs, Launch], None],
        grow: Callable[[int], bool],
    ) -> tuple[Outputs, int, int]:
        """Launch dispatch.cu, behind route.cu, with outputs of as many rows as arrive.

        Args:
            request: The call.
            launch: Launches it with outputs.
            grow: Makes slabs large enough for so many tokens; returns whether they were not.

        Returns:
            The outputs, how many rows arrive, and the most tokens of any rank.
        """
        ahead = self._make_outputs_ahead(request)
        if ahead is not None:
            launch(ahead, Launch.AHEAD)
        num_recv, max_tokens = self._wait()
        self._forecast.note(request, num_recv)
        has_grown = grow(max_tokens)
        self._ahead = None
        if ahead is not None and not has_grown and num_recv <= ahead.data.shape[0]:
            return ahead.leading(num_recv), num_recv, max_tokens
        # Launched ahead it has written no outputs; where slabs were too small, done nothing at all.
        how = Launch.WHOLE if ahead is None or has_grown else Launch.RESUMES
        ahead = None  # before others are made: its memory may do
        outputs = make_outputs(request, num_recv)
        launch(outputs, how)
        return outputs, num_recv, max_tokens

    def _make_outputs_ahead(self, request: DispatchRequest) -> Outputs | None:
        """Make outputs for as many rows as are forecast; None where nothing is, or in vain."""
        num_rows = self._forecast.num_rows(request) if self._can_move_ahead else 0
        if num_rows == 0:
            return None
        try:
            self._ahead = make_outputs(request, num_rows)
        except Exception:  # no memory, in the words of any framework; it may do for fewer rows
            return None
        return self._ahead

    def _wait(self) -> tuple[int, int]:
        """Wait, without holding the GIL, until route.cu has told the host.

        Returns:
            Rows that arrive here, and the most tokens of any rank.
        """
        summary, ticket = self._summary, self._ticket
        seen = summary["ticket"]

        def is_known() -> bool:
            if int(seen) == ticket:
                return True
            self._check()
            return False

        # The device's own deadline comes first; this one is for a device that does not answer.
        if not poll_until(is_known, Deadline(2 * self._timeout_s + 10)):
            raise CommTimeout("dispatch: counts", self._rank, [], self._timeout_s)
        return int(summary["num_recv"]), int(summary["max_tokens"])

    def of_experts(self, num_local: int, multiple: int) -> list[int]:
        """Return the pairs of each local expert, as route.cu told them, rounded up."""
        pairs = self._summary["expert_counts"][:num_local].astype(np.int64)
        rounded: list[int] = (-(-pairs // multiple) * multiple).tolist()
        return rounded


class RowForecast:
    """How many rows will arrive.

    A part of a larger dispatch has as many as its outputs. Else this goes by the last two
    dispatches of as many tokens and experts: training and prefill repeat their shapes, and from
    call to call counts differ by little. Where they do not there is no forecast: callers keep
    arrays, and with them all of the memory.
    """

    def __init__(self) -> None:
        self._shape = (0, 0)
        self._counts: tuple[int, ...] = ()

    def num_rows(self, request: DispatchRequest) -> int:
        """Return for how many rows to make outputs; 0 where that is not known."""
        if request.into is not None:
            return request.into.data.shape[0]
        if self._shape != _shape_of(request) or len(self._counts) < 2:
            return 0
        least, most = sorted(self._counts)
        return most + most // 8 if most <= 2 * least else 0

    def note(self, request: DispatchRequest, num_recv: int) -> None:
        """Take note of how many rows arrived."""
        shape = _shape_of(request)
        before = self._counts[-1:] if shape == self._shape else ()
        self._shape, self._counts = shape, (*before, num_recv)


def _shape_of(request: DispatchRequest) -> tuple[int, int]:
    return request.data.shape[0], num_experts_of(request)
